"""What `pskd inspect` costs a row: reading a generation, judging it, finding label errors.

    python scripts/bench/inspection.py [--rows 200000] [--classes 1000]

On a made float16 store in a warm page cache, one thread. The bound is reading and decoding every
row in the same blocks, in the order of the disk; each round runs all in turn. Memory is anonymous
memory above what it was before, at the end of a round: the mapped store is not in it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from paired import interval, table

from pskd.inspection import label_errors
from pskd.inspection.scan import blocks, judge
from pskd.store import open_for_training, open_generation
from pskd.store.generation import Generation


def made(directory: Path, labels_N: np.ndarray, classes: int) -> Generation:
    """Rows in random order, most of them right about their label."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    n = len(labels_N)
    with open_for_training(directory, n=n, classes=classes) as store:
        store.begin_epoch(0)
        for ids in np.array_split(rng.permutation(n), max(1, n // 256)):
            logits_BC = 2 * torch.randn(len(ids), classes, generator=generator)
            logits_BC[torch.arange(len(ids)), torch.from_numpy(labels_N[ids])] += 6
            store.remember(ids, logits_BC.softmax(dim=1))
        store.end_epoch()
    return open_generation(directory / "gen-000000")


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of CPU and of the clock."""
    cpu, wall = time.process_time(), time.monotonic()
    work()
    return time.process_time() - cpu, time.monotonic() - wall


def anonymous_mb() -> float:
    """Of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024


def main() -> None:
    """Print a table, the ratio to the bound, and the memory."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    n = arguments.rows
    torch.set_num_threads(1)
    labels_N = np.random.default_rng(1).integers(0, arguments.classes, n)
    with TemporaryDirectory() as directory:
        generation = made(Path(directory), labels_N, arguments.classes)
        before = anonymous_mb()
        judged = judge(generation, labels_N)

        def read() -> None:
            for _ in blocks(generation, generation.in_file_order()):
                pass

        works: dict[str, Callable[[], object]] = {
            "read and decode (bound)": read,
            "judge": lambda: judge(generation, labels_N),
            "label errors, after that": lambda: label_errors.find(generation, judged, labels_N),
        }
        rounds = [[cost(work) for work in works.values()] for _ in range(arguments.rounds)]
        cost_RWK = np.array(rounds)
        print(f"{n:,} rows of {arguments.classes:,} classes, {arguments.rounds} rounds")
        lines = [["", "CPU us a row", "rows/s (clock)"]]
        for k, name in enumerate(works):
            cpu, wall = np.median(cost_RWK[:, k], axis=0)
            lines.append([name, f"{1e6 * cpu / n:.2f}", f"{n / wall:,.0f}"])
        print(table(lines))
        ratio = (cost_RWK[:, 1, 0] + cost_RWK[:, 2, 0]) / cost_RWK[:, 0, 0]
        print(f"CPU, all / bound: {interval(ratio)}")
        print(f"memory: {anonymous_mb() - before:.0f} MB")


if __name__ == "__main__":
    main()
