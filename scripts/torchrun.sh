#!/usr/bin/env bash
# Train by torchrun, on one node or on many. On many: start it on each node, with the same FLAGS.
#
#   scripts/torchrun.sh [options] -- FLAGS OF train.py, with --run.dir DIR
#
#   --processes P          on each node (default: one a GPU; without GPUs 2)
#   --nodes N --master ADDRESS[:PORT]      how many nodes, and the address of one of them that the
#                          others reach (default port: 29500)
#   --node-rank R          this node's number, 0 for the master's (static rendezvous)
#   --rendezvous c10d      instead: nodes find each other at the master, and need no numbers
#   --id NAME              with c10d: of this job, if the master serves several (default: pskd)
#   --doctor               do not train: pskd doctor, whether all nodes together can
#
# Under c10d, torchrun takes a node for the master if its own host name says so, and tells the others
# this node's host name; where that resolves to loopback, as in containers, neither works. So both
# are derived from the route to the master here. The interface that gloo binds is chosen likewise, by
# the trainer; GLOO_SOCKET_IFNAME overrules it, NCCL_SOCKET_IFNAME is NCCL's.
# A run that shall survive faults: scripts/run_until_done.sh scripts/torchrun.sh ..., on each node.
set -euo pipefail

source "$(dirname "$0")/common.sh"

nodes=1 node_rank="" master="" processes="" rendezvous=static id=pskd program=""
[ $# -gt 0 ] || { usage; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        -h|--help) usage; exit 0 ;;
        --) shift; break ;;
        --doctor) program="-m pskd.cli doctor"; shift; continue ;;
        --nodes|--node-rank|--master|--processes|--rendezvous|--id)
            [ $# -gt 1 ] || refuse "$1 needs a value." ;;
        *) refuse "unknown option $1; flags of train.py go behind --. See $0 --help." ;;
    esac
    name=${1#--}
    printf -v "${name//-/_}" %s "$2"
    shift 2
done
[ -n "$(run_dir_of "$@")" ] || refuse "the flags need --run.dir DIR: all nodes and restarts must agree on it."

environment torchrun
[ -n "$processes" ] || processes=$(processes_of_node)
# By default it would die of SIGUSR1, which batch systems send before the time is up.
start=("$bin/torchrun" --nproc-per-node "$processes")
start+=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1)
if [ "$nodes" -eq 1 ]; then
    start+=(--standalone)
else
    [ -n "$master" ] || refuse "--nodes $nodes needs --master ADDRESS[:PORT]."
    port=29500
    case $master in *:*) port=${master##*:} ;; esac
    start+=(--nnodes "$nodes")
    address=${master%:*}
    case $rendezvous in
        static)
            [ -n "$node_rank" ] || refuse "--nodes $nodes needs --node-rank R, or --rendezvous c10d."
            start+=(--node-rank "$node_rank" --master-addr "$address" --master-port "$port") ;;
        c10d)
            # The address by which this node reaches the master. UDP: connecting sends nothing.
            mine=$("$bin/python" - "$address" <<'PYTHON'
import socket, sys
try:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((sys.argv[1], 9))
        own = probe.getsockname()[0]
        print(own, str(own == probe.getpeername()[0]).lower())
except OSError as error:
    sys.exit(f"error: the master {sys.argv[1]} cannot be reached: {error.strerror}.")
PYTHON
            )
            start+=(--rdzv-backend c10d --rdzv-id "$id" --rdzv-endpoint "$address:$port")
            start+=(--rdzv-conf "is_host=${mine#* }" --local-addr "${mine% *}") ;;
        *) refuse "--rendezvous $rendezvous: use static or c10d." ;;
    esac
fi
if [ -n "$program" ]; then start+=($program); else start+=("$here/train.py"); fi
exec "${start[@]}" "$@"
