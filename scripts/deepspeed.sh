#!/usr/bin/env bash
# Train by DeepSpeed's launcher, on one node or on many that a hostfile names.
#
#   scripts/deepspeed.sh [options] -- FLAGS OF train.py, with --run.dir DIR
#
#   --processes P          on this node alone (default: one a GPU; without GPUs 2)
#   --hostfile FILE        instead, on many: lines of NAME slots=PROCESSES. Started on one node, it
#                          starts the others by pdsh and ssh, without passwords.
#   --ssh-port PORT        of all nodes (anything else about ssh: ~/.ssh/config)
#   --no-ssh --node-rank R with the hostfile: start this script on each node, R is the node's place
#                          in the hostfile from 0
#   --master ADDRESS[:PORT]      of the hostfile's first node, as the others reach it (default: found by
#                          its name, where that is loopback by the route to the second node; 29500)
#
# On all nodes the repository and its environment must lie at the same path. Of this shell's variables
# pdsh hands on those that begin with PYTHON, MLFLOW, UCX, MV2 and, on GPUs, NCCL; others, such as
# GLOO_SOCKET_IFNAME, belong into ~/.deepspeed_env (lines of NAME=VALUE, none of them empty).
# When one node fails, pdsh does not stop the others: their ranks find out by themselves, at once or
# within run.timeout_s. Stopping the launcher stops all launches of this Python on all nodes.
# A run that shall survive faults: scripts/run_until_done.sh scripts/deepspeed.sh ..., on the node
# that starts the others; with --no-ssh on each.
set -euo pipefail

source "$(dirname "$0")/common.sh"

processes="" hostfile="" ssh_port="" no_ssh="" node_rank="" master=""
[ $# -gt 0 ] || { usage; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        -h|--help) usage; exit 0 ;;
        --) shift; break ;;
        --no-ssh) no_ssh=yes; shift; continue ;;
        --processes|--hostfile|--ssh-port|--node-rank|--master)
            [ $# -gt 1 ] || refuse "$1 needs a value." ;;
        *) refuse "unknown option $1; flags of train.py go behind --. See $0 --help." ;;
    esac
    name=${1#--}
    printf -v "${name//-/_}" %s "$2"
    shift 2
done
[ -n "$(run_dir_of "$@")" ] || refuse "the flags need --run.dir DIR: all nodes and restarts must agree on it."

environment deepspeed
start=("$bin/deepspeed" --quiet)
if [ -z "$hostfile" ]; then
    [ -z "$no_ssh$node_rank$ssh_port$master" ] || refuse "--no-ssh, --node-rank, --ssh-port and --master need --hostfile FILE."
    [ -n "$processes" ] || processes=$(processes_of_node)
    start+=(--num_gpus "$processes") # also of processes without a GPU
else
    [ -z "$processes" ] || refuse "the hostfile says how many processes a node has: leave --processes out."
    # DeepSpeed would train on this node alone, without a word that stops.
    [ -r "$hostfile" ] || refuse "the hostfile $hostfile cannot be read."
    mapfile -t names < <(awk '!/^[[:space:]]*(#|$)/ {print $1}' "$hostfile")
    [ "${#names[@]}" -gt 0 ] || refuse "the hostfile $hostfile names no node; its lines are: NAME slots=PROCESSES."
    if [ -n "$no_ssh" ]; then
        [ -n "$node_rank" ] || refuse "--no-ssh needs --node-rank R, this node's place in $hostfile from 0."
        start+=(--no_ssh --node_rank "$node_rank")
    else
        [ -z "$node_rank" ] || refuse "--node-rank goes with --no-ssh."
        command -v pdsh >/dev/null || refuse "pdsh is missing: install it, or start this script on each node with --no-ssh."
        start+=(--force_multi) # else a hostfile of one node would be taken for this one
        [ -z "$ssh_port" ] || start+=(--ssh_port "$ssh_port")
    fi
    port=29500
    case $master in *:*) port=${master##*:} ;; esac
    address=${master%:*}
    if [ -z "$address" ]; then
        address=$("$bin/python" - "${names[@]:0:2}" <<'PYTHON'
import socket, sys
try:
    address = socket.gethostbyname(sys.argv[1])
    if address.startswith("127.") and len(sys.argv) > 2:  # this node, by a name for itself
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((sys.argv[2], 9))  # UDP: sends nothing
            address = probe.getsockname()[0]
    print(address)
except OSError as error:
    sys.exit(f"error: no address is known for {' or '.join(sys.argv[1:])} of the hostfile "
             f"({error.strerror}). Name the first node's with --master.")
PYTHON
        )
    fi
    start+=(--hostfile "$hostfile" --master_addr "$address" --master_port "$port")
fi
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes" # ask nobody for a password
exec "${start[@]}" "$here/train.py" "$@"
