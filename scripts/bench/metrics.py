"""What the measures cost beside the softmax that they need: seconds and memory.

    python scripts/bench/metrics.py                 # 50,000 x 1,000, as ImageNet's validation
    python scripts/bench/metrics.py --threads 1

Each line is measured in turns with torch's float32 softmax of the same logits, the baseline; shown
are the fastest of the rounds and the median ratio. Memory is the peak above what was held before,
in multiples of the logits (float32).
"""

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from paired import interval, table

from pskd.metrics import measures, per_sample, summarize


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def peak_bytes(work: Callable[[], object]) -> int:
    """Above what this process holds now."""

    def of_process(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = of_process("VmRSS")
    work()
    return max(0, of_process("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.samples, arguments.classes)
    logits_NC = 3 * torch.randn(shape, generator=generator)
    labels_N = torch.randint(shape[1], (shape[0],), generator=generator)
    records, array_NC, array_N = (
        per_sample(logits_NC, labels_N),
        logits_NC.numpy(),
        labels_N.numpy(),
    )
    works: dict[str, Callable[[], object]] = {
        "softmax, float32": lambda: logits_NC.softmax(dim=1),
        "softmax, all in float64": lambda: logits_NC.double().softmax(dim=1),
        "per_sample": lambda: per_sample(logits_NC, labels_N),
        "measures of the records": lambda: measures(records, shape[1]),
        "summarize, of tensors": lambda: summarize(logits_NC, labels_N),
        "summarize, of arrays": lambda: summarize(array_NC, array_N),
    }
    memory = {name: peak_bytes(work) / logits_NC.nbytes for name, work in works.items()}
    rounds = [
        {name: seconds(work) for name, work in works.items()} for _ in range(arguments.rounds)
    ]
    baseline = next(iter(works))
    lines = [["work", "s", "s beyond the softmax", "ratio to it", "memory / logits"]]
    for name in works:
        best = min(times[name] for times in rounds)
        beyond = min(times[name] - times[baseline] for times in rounds)
        ratios = np.array([times[name] / times[baseline] for times in rounds])
        lines.append(
            [name, f"{best:.3f}", f"{beyond:.3f}", interval(ratios), f"{memory[name]:.2f}"]
        )
    print(f"{shape[0]:,} x {shape[1]:,}, {arguments.threads} threads")
    print(table(lines))


if __name__ == "__main__":
    main()
