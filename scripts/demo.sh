#!/usr/bin/env bash
# The main job on data that is at hand: train the handwritten digits of scikit-learn twice, with
# one-hot targets and with PS-KD, and print the five measures of both. Two processes on a CPU.
#
# Started again, it resumes what was interrupted and trains nothing that is complete.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
bin=${PSKD_BIN:-.venv/bin}

gpus=$("$bin/python" -c 'import torch; print(torch.cuda.device_count())')
processes=$(( gpus == 1 ? 1 : 2 ))
runs=runs/demo
for recipe in digits-baseline digits-pskd; do
    echo
    echo "== $recipe on $processes processes"
    OMP_NUM_THREADS=1 "$bin/torchrun" --standalone --nproc-per-node "$processes" \
        train.py --recipe "$recipe" --run.dir "$runs/$recipe"
done
echo
"$bin/pskd" compare "$runs/digits-baseline" "$runs/digits-pskd"
echo
echo "Measures on the 360 digits held out, after the last epoch."
echo "So easy a data set says nothing about the methods: PS-KD need not gain here."
echo "The runs lie in $runs; delete it to train again."
