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
# and, for many nodes, what scripts/torchrun.sh and scripts/deepspeed.sh take: --nodes, --node-rank,
# --master, --rendezvous, --id; --hostfile, --ssh-port.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || { usage; exit 2; }
case $1 in
    -h|--help) usage; exit 0 ;;
    -*) refuse "TABLE comes first, the beginning of recipes' names; $1 is none. See $0 --help." ;;
esac
table=$1; shift
seeds="0 1 2" root=runs/reproduce launcher=torchrun print="" options=()
while [ $# -gt 0 ]; do
    case $1 in
        --print) print=yes; shift; continue ;;
        --) shift; break ;;
        --*) [ $# -gt 1 ] || refuse "$1 needs a value." ;;
        *) refuse "unknown option $1; flags of train.py go behind --. See $0 --help." ;;
    esac
    case $1 in
        --seeds) seeds=$2 ;;
        --root) root=$2 ;;
        --launcher) launcher=$2 ;;
        --processes|--nodes|--node-rank|--master|--rendezvous|--id|--hostfile|--ssh-port)
            options+=("$1" "$2") ;;
        *) refuse "unknown option $1; flags of train.py go behind --. See $0 --help." ;;
    esac
    shift 2
done

[[ $seeds =~ ^[0-9]+(\ +[0-9]+)*$ ]] || refuse "--seeds $seeds: give whole numbers, parted by spaces."

scripts/setup.sh
bin=${PSKD_BIN:-.venv/bin}
case $launcher in
    torchrun|deepspeed) start=("scripts/$launcher.sh" "${options[@]}" --) ;;
    python)
        [ ${#options[@]} -eq 0 ] || refuse "--launcher python takes no ${options[0]}."
        start=("$bin/python" train.py) ;;
    *) refuse "--launcher $launcher: use torchrun, deepspeed or python." ;;
esac

recipes=$("$bin"/pskd recipes "$table" --names)
runs=()
for recipe in $recipes; do
    for seed in $seeds; do
        run=$root/$recipe-seed$seed
        command=("${start[@]}" --recipe "$recipe" --train.seed "$seed" --run.dir "$run")
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
