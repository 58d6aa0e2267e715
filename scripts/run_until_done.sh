#!/usr/bin/env bash
# Start a training command again and again until its run is complete; each start resumes the run.
#
#   scripts/run_until_done.sh torchrun --standalone --nproc-per-node 2 train.py ... --run.dir DIR
#
# Ends with 0 when DIR/status.json says complete. Gives up with 1, and the reason, when TRIES starts
# in a row (default 3) ended without a newer checkpoint, or when the command never began a run.
# A command that does not end END_S seconds (default 60) after its run, or whose run gives no sign of life
# for STALE_S (900; more than run.timeout_s), is ended: no launcher notices a rank that hangs.
# SIGTERM, SIGINT and SIGUSR1 are passed on to the command, and end the loop: with 75 if the run can be
# resumed.
set -uo pipefail
set -m # a process group for the command: signals reach it once, and nothing of it is left behind

source "$(dirname "$0")/common.sh"
case ${1:-} in -h|--help) usage; exit 0 ;; esac

run=$(run_dir_of "$@")
[ -n "$run" ] || die "the command needs --run.dir DIR: the run is resumed there"

look() { # sets starts, state, newest (checkpoint), of (the start that wrote the state), age (s), reason
    mapfile -t seen < <(python3 - "$run" <<'PYTHON'
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[1])
def read(name, default):
    try:
        return json.loads((run / name).read_text())
    except (OSError, ValueError):
        return default
status = read("status.json", {})
newest = max((p.name for p in run.glob("checkpoints/[0-9]*-*")), default="")
reason = " ".join((status.get("reason") or "").split())
age = int(time.time() - status.get("heartbeat", 0))
state, of = status.get("state", "unknown"), status.get("start", -1)
print(len(read("env.json", [])), state, newest, of, age, reason, sep="\n")
PYTHON
    )
    starts=${seen[0]} state=${seen[1]} newest=${seen[2]} of=${seen[3]} age=${seen[4]} reason=${seen[5]}
    [ "$state" != running ] || reason="it was killed"
}

watch() { # $1: a process group that should have ended, or made progress. No launcher sees a stopped rank.
    while sleep 10; do
        look
        { [ "$starts" -gt "$before" ] && [ "$of" -eq $((starts - 1)) ]; } || continue # of an earlier start
        local patience=${END_S:-60}
        [ "$state" != running ] || patience=${STALE_S:-900}
        if [ "$age" -gt "$patience" ]; then
            echo "ending the command: the run is $state, and its last sign of life $age s old" >&2
            kill -TERM -- -"$1"
            sleep "${END_S:-60}" # launchers give their ranks 30 s
            kill -KILL -- -"$1"
        fi
    done
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
    watch "$child" &
    watching=$!
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done # a signal ends `wait`
    while kill -0 -- -"$child" 2>/dev/null; do sleep 0.1; done # some launchers end before the rest
    kill -KILL -- -"$watching" 2>/dev/null
    wait "$watching" 2>/dev/null
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
