#!/usr/bin/env bash
# Train in containers, on one node or on many. On many: start it on each node, with the same FLAGS.
#
#   scripts/docker.sh [options] [options of scripts/torchrun.sh] -- FLAGS OF train.py, with --run.dir runs/NAME
#
#   --image IMAGE    default: pskd, as `docker build -t pskd .` names it
#   --runs DIR       where runs lie on this node, in the container runs/ (default: runs)
#   --data DIR       where data lie, in the container data/ (default: data, if it is there)
#   --once           end with the first failure; else scripts/run_until_done.sh starts again
#   --print          print the command, run nothing
#
# The other options, such as --processes, --nodes, --node-rank and --master, go to scripts/torchrun.sh
# in the container. The container runs as this user, in the foreground, and is removed at its end.
# With --nodes it has the network of its host: the nodes reach each other by the hosts' addresses.
# It gets all GPUs, where nvidia-smi lists some. To stop it so that it can be resumed: SIGTERM or
# SIGINT to this command, or `docker stop`.
#
# DOCKER=podman chooses the command, DOCKER_OPTIONS="-d --memory 64g -e NCCL_SOCKET_IFNAME=eth0" adds
# to its options. `DOCKER_OPTIONS=-d` trains in the background.
set -euo pipefail

source "$(dirname "$0")/common.sh"

image=pskd runs=runs data="" print="" loop=scripts/run_until_done.sh launch=() many=""
[ $# -gt 0 ] || { usage; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        -h|--help) usage; exit 0 ;;
        --print) print=yes; shift; continue ;;
        --once) loop=""; shift; continue ;;
        --) break ;;
        --image|--runs|--data|--nodes|--node-rank|--master|--processes|--rendezvous|--id)
            [ $# -gt 1 ] && [ "$2" != -- ] || refuse "$1 needs a value." ;;
        *) refuse "unknown option $1; flags of train.py go behind --. See $0 --help." ;;
    esac
    case $1 in
        --image|--runs|--data) printf -v "${1#--}" %s "$2" ;;
        --nodes) many=yes; launch+=("$1" "$2") ;;
        *) launch+=("$1" "$2") ;;
    esac
    shift 2
done
[ $# -gt 0 ] || refuse "there is no --, and behind it flags of train.py. See $0 --help."

run=$(run_dir_of "$@")
case $run in
    "") refuse "the flags need --run.dir runs/NAME: all nodes and restarts must agree on it." ;;
    *..*) refuse "--run.dir $run: a path without .. is needed." ;;
    /runs/?*) ;;
    runs/?*) run=/$run ;;
    *) refuse "--run.dir $run would be lost with the container: use runs/NAME, and --runs DIR for where runs lie." ;;
esac
docker=${DOCKER:-docker}
command -v "$docker" >/dev/null || refuse "$docker is missing: install it, or name another command with DOCKER=podman."

mounts=(--volume "$(realpath -m "$runs"):/runs")
if [ -n "$data" ]; then
    [ -d "$data" ] || refuse "--data $data is no directory."
elif [ -d data ]; then
    data=data
fi
[ -z "$data" ] || mounts+=(--volume "$(realpath "$data"):/data")
# /dev/shm is 64 MB otherwise, too small for NCCL; torchrun gives its workers 30 s to end.
start=("$docker" run --rm --shm-size 8g --stop-timeout 60 --user "$(id -u):$(id -g)")
start+=("${mounts[@]}" --env "PSKD_RUN_DIR=$run")
[ -z "$many" ] || start+=(--network host)
if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    case $docker in
        *podman*) start+=(--device nvidia.com/gpu=all) ;;
        *) start+=(--gpus all) ;;
    esac
fi
read -r -a more <<<"${DOCKER_OPTIONS:-}"
start+=("${more[@]}" "$image" $loop scripts/torchrun.sh "${launch[@]}" "$@")
if [ -n "$print" ]; then
    printf '%q ' "${start[@]}"; echo
    exit 0
fi
mkdir -p "$runs" # or docker would make it, as root
exec "${start[@]}"
