#!/usr/bin/env bash
# Train every recipe of a table, and set what was measured beside what was published.
#
#   scripts/reproduce.sh TABLE [options] [-- FLAGS OF train.py]
#
# TABLE: the beginning of recipes' names, such as cifar100, cifar100-preact_resnet18, imagenet,
# fashion-mnist-2k; `pskd recipes TABLE` lists them. Complete runs are skipped, others are resumed.
#
#   --seeds "0 1 2"      one run of each recipe a seed (default: 0 1 2)
#   --root DIR           runs go to DIR/<recipe>-seed<seed> (default: runs/reproduce)
#   --print              print the commands, run nothing
#   --launcher NAME      torchrun (default), deepspeed or python
#   --processes P        a node (default: one a GPU; without GPUs 2)
#   --nodes N            with torchrun: start this script on each node, with
#   --node-rank R --master ADDRESS[:PORT]      the same master on all of them
#   --hostfile FILE      with deepspeed: start it on one node
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
refuse() { echo "error: $1" >&2; exit 2; }

[ $# -gt 0 ] || { usage; exit 2; }
case $1 in -h|--help) usage; exit 0 ;; esac
table=$1; shift
seeds="0 1 2" root=runs/reproduce launcher=torchrun nodes=1 node_rank=0
print="" processes="" master="" hostfile=""
while [ $# -gt 0 ]; do
    case $1 in
        --print) print=yes; shift; continue ;;
        --) shift; break ;;
        --seeds|--root|--launcher|--processes|--nodes|--node-rank|--master|--hostfile)
            [ $# -gt 1 ] || refuse "$1 needs a value." ;;
        *) refuse "unknown option $1; flags of train.py go behind --. See $0 --help." ;;
    esac
    name=${1#--}
    printf -v "${name//-/_}" %s "$2"
    shift 2
done

scripts/setup.sh
bin=${PSKD_BIN:-.venv/bin}
if [ -z "$processes" ]; then
    processes=$("$bin"/python -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
case $launcher in
    torchrun)
        start=("$bin"/torchrun --nproc-per-node "$processes")
        if [ "$nodes" -gt 1 ]; then
            [ -n "$master" ] || refuse "--nodes $nodes needs --master ADDRESS."
            port=29500
            case $master in *:*) port=${master##*:} ;; esac
            start+=(--nnodes "$nodes" --node-rank "$node_rank")
            start+=(--master-addr "${master%:*}" --master-port "$port")
        else
            start+=(--standalone)
        fi ;;
    deepspeed)
        start=("$bin"/deepspeed)
        if [ -n "$hostfile" ]; then start+=(--hostfile "$hostfile")
        else start+=(--num_gpus "$processes"); fi ;;
    python) start=("$bin"/python) ;;
    *) refuse "--launcher $launcher: use torchrun, deepspeed or python." ;;
esac

recipes=$("$bin"/pskd recipes "$table" --names)
runs=()
for recipe in $recipes; do
    for seed in $seeds; do
        run=$root/$recipe-seed$seed
        command=("${start[@]}" train.py --recipe "$recipe" --train.seed "$seed" --run.dir "$run")
        case $recipe in
            *-tfkd_self) command+=(--method.teacher "$root/${recipe%-tfkd_self}-baseline-seed$seed") ;;
        esac
        command+=("$@")
        runs+=("$run")
        if [ -n "$print" ]; then
            printf '%q ' "${command[@]}"; echo
        elif ! grep -qs '"state": "complete"' "$run/status.json"; then
            OMP_NUM_THREADS=1 "${command[@]}"
        fi
    done
done
[ -n "$print" ] || "$bin"/pskd compare --by-recipe "${runs[@]}"
