#!/usr/bin/env bash
# Run the tests, in the environment of the demo. Arguments go to pytest: scripts/test.sh -m slow
# Without any, two processes share the files.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
# Tests of several ranks are written for CPUs: GPUs are for those marked so, which are asked for.
[[ "$*" == *gpu* ]] || export CUDA_VISIBLE_DEVICES=
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
exec "${PSKD_BIN:-.venv/bin}/python" -m pytest "$@"
