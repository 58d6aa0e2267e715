#!/usr/bin/env bash
# PS-KD against the baseline on Fashion-MNIST, three paired seeds each, last epoch: the two tables
# of the README. About 40 minutes on two CPU cores; started again, it resumes.
#
#   scripts/fashion_mnist.sh [2k|10k ...]      default: both
#
# The data: data/ or a folder given as DATA, Debian's dataset-fashion-mnist, or fetched.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
processes=$(( gpus == 1 ? 1 : 2 ))
[ $# -gt 0 ] || set -- 2k 10k
for part in "$@"; do
    runs=()
    for seed in 0 1 2; do
        for method in baseline pskd; do
            run=runs/fashion-mnist/$part-$method-seed$seed
            OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node "$processes" \
                train.py --recipe "fashion-mnist-$part-$method" --train.seed "$seed" \
                --evaluation.every 10 --data.download true ${DATA:+--data.root "$DATA"} \
                --run.dir "$run"
            runs+=("$run")
        done
    done
    .venv/bin/pskd compare "${runs[@]}"
done
