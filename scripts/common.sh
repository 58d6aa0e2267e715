# What the launch scripts share; they source it. Each explains itself in the comment at its top.

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
refuse() { echo "error: $1" >&2; exit 2; } # what was asked for
die() { echo "error: $*" >&2; exit 1; }    # what was met

# The value of --run.dir among flags of train.py, the last one; nothing if it is not there.
run_dir_of() {
    local i next found=
    for ((i = 1; i <= $#; i++)); do
        next=$((i + 1))
        case ${!i} in
            --run.dir=*) found=${!i#*=} ;;
            --run.dir) found=${!next:-} ;;
        esac
    done
    echo "$found"
}

# The repository, and the environment's bin that holds a launcher. Sets here and bin.
environment() {
    here=$(cd "$(dirname "$0")/.." && pwd)
    bin=${PSKD_BIN:-$here/.venv/bin}
    [ -x "$bin/$1" ] || refuse "$bin/$1 is missing: run scripts/setup.sh, or name the environment's bin with PSKD_BIN."
}

# Sets PSKD, unless it is: the environment's pskd command. In the repository; installs it if need be.
find_pskd() {
    [ -z "${PSKD:-}" ] || return 0
    scripts/setup.sh
    PSKD=${PSKD_BIN:-.venv/bin}/pskd
}

# Processes of a node, if nothing else was said: one a GPU; without GPUs 2.
processes_of_node() { "$bin/python" -c 'import torch; print(torch.cuda.device_count() or 2)'; }
