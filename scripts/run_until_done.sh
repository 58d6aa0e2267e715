#!/usr/bin/env bash
# Start a training command again and again until its run is complete; each start resumes the run.
#
#   scripts/run_until_done.sh torchrun --standalone --nproc-per-node 2 train.py ... --run.dir DIR
#
# Ends with 0 when DIR/status.json says complete. Gives up with 1, and the reason, when TRIES starts
# in a row (default 3) ended without a newer checkpoint, or when the command never began a run.
# SIGTERM, SIGINT and SIGUSR1 are passed on to the command, and end the loop: with 75 if the run can be
# resumed.
set -uo pipefail
set -m # a process group for the command: signals reach it once, and nothing of it is left behind

run=
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
    --run.dir=*) run=${!i#*=} ;;
    --run.dir) run=${!next:-} ;;
    esac
done
[ -n "$run" ] || { echo "error: the command needs --run.dir DIR: the run is resumed there" >&2; exit 1; }

look() { # sets starts, state, newest (checkpoint), reason
    mapfile -t seen < <(python3 - "$run" <<'PYTHON'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
def read(name, default):
    try:
        return json.loads((run / name).read_text())
    except (OSError, ValueError):
        return default
status = read("status.json", {})
newest = max((p.name for p in run.glob("checkpoints/[0-9]*-*")), default="")
reason = " ".join((status.get("reason") or "").split())
print(len(read("env.json", [])), status.get("state", "unknown"), newest, reason, sep="\n")
PYTHON
    )
    starts=${seen[0]} state=${seen[1]} newest=${seen[2]} reason=${seen[3]}
    [ "$state" != running ] || reason="it was killed"
}

asked= child=
pass_on() { asked=1; [ -z "$child" ] || kill -"$1" -- -"$child" 2>/dev/null; }
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on USR1' USR1

give_up() { echo "gave up: $1" >&2; exit 1; }

look
best=$newest tries=0
while [ -z "$asked" ]; do
    before=$starts
    "$@" &
    child=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done # a signal ends `wait`
    while kill -0 -- -"$child" 2>/dev/null; do sleep 0.1; done # some launchers end before the rest
    child=
    look
    [ "$starts" -gt "$before" ] || reason="it ended with $code before it resumed the run"
    case $state$code in complete0) exit 0 ;; esac
    [ "$state" = complete ] && [ "$starts" -gt "$before" ] && exit 0
    [ "$starts" -gt 0 ] || give_up "the command ended with $code and began no run in $run"
    if [[ $newest > $best ]]; then best=$newest tries=0; else tries=$((tries + 1)); fi
    [ "$tries" -lt "${TRIES:-3}" ] || [ -n "$asked" ] || give_up \
        "$tries starts in a row brought no checkpoint after '${best:-none}'. The last: $state, $reason"
    [ -n "$asked" ] || echo "starting again from '${newest:-the beginning}': $state, $reason" >&2
done
echo "asked to stop: the run is $state" >&2
[ "$state" = stopped ] && exit 75
exit 1
