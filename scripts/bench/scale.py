"""How a run's parts grow with ranks and classes: computed from pieces that are measured here.

    python scripts/bench/scale.py                    # a minute or two

Measured on this machine: rows gathered out of S segments, a generation of S segments opened and
its manifest's chunks compared, a checkpoint's bytes hashed and written. Computed from these and
from sizes: what 1 to 1,024 ranks would read, write and send. No such run has been made.
"""

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from paired import table
from store import BATCH, CLASSES, make_store, predictions

from pskd.store.format import Entry
from pskd.store.generation import Generation
from pskd.store.registry import create_encoding
from pskd.words import readable_bytes

GPUS = 8  # of a node
NODE_IMAGES_PER_S = 16_000
RESNET152 = 60_192_808  # weights, with 1,000 classes; 2,048 more for each further class
SEGMENTS = (1, 8, 64, 256, 1024)


class Data(NamedTuple):
    """Of a training set."""

    name: str
    samples: int
    classes: int


IMAGENET = Data("ImageNet", 1_281_167, 1_000)
IMAGENET_21K = Data("ImageNet-21k", 14_197_122, 21_841)


class Writer:
    """A rank that writes its segment; it speaks to nobody."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = self.local_rank = rank
        self.size = self.local_size = size
        self.colleagues = (rank,)

    def gather(self, value: object) -> list[object]:
        return [value]

    def spread(self, directory: Path, mine: dict[str, int]) -> None:
        """There is one disk."""


def segments(place: Path, size: int, n: int) -> list[Entry]:
    """A generation of n rows, written by so many ranks."""
    order_N, probs_BC = np.random.default_rng(0).permutation(n), predictions()
    entries = []
    for rank in range(size):
        store = make_store(place, n, "float16", Writer(rank, size))
        part_N = order_N[rank::size]
        for start in range(0, len(part_N), BATCH):
            ids_B = part_N[start : start + BATCH]
            store.remember(ids_B, probs_BC[: len(ids_B)])
        store._appender.flush()
        entries.append(store._segment().entry)
        store.close()
    return entries


def by_segments(place: Path, n: int = 20_000) -> tuple[str, dict[int, float]]:
    """Gathering and opening; and the milliseconds of gathering by number of segments."""
    rows = [["segments", f"ms to gather {BATCH} rows, CPU", "s to open a generation"]]
    gathered = {}
    for size in SEGMENTS:
        entries = segments(place / f"of-{size}", size, n)
        started = time.perf_counter()
        generation = Generation(place / f"of-{size}", n, CLASSES, entries)
        opened_s = time.perf_counter() - started
        wanted = np.random.default_rng(1).permutation(n)[: n // BATCH * BATCH].reshape(-1, BATCH)
        out_BR = np.empty((BATCH, generation.row_bytes), np.uint8)
        present_B = np.empty(BATCH, np.bool_)
        taken = []
        for _ in range(4):
            started = time.thread_time()
            for ids_B in wanted:
                generation.gather(ids_B, out_BR, present_B)
            taken.append(1e3 * (time.thread_time() - started) / len(wanted))
        gathered[size] = float(np.median(taken[1:]))
        rows.append([f"{size:,}", f"{gathered[size]:.2f}", f"{opened_s:.3f}"])
    return table(rows), gathered


def checkpoint_s(place: Path, size: int) -> float:
    """Seconds to hash so many bytes, write them, and have them on the disk."""
    content = os.urandom(1 << 24)
    started = time.perf_counter()
    digest = hashlib.sha256()
    with (place / "state").open("wb") as file:
        for _ in range(size >> 24):
            digest.update(content)
            file.write(content)
        os.fsync(file.fileno())
    return time.perf_counter() - started


def of_ranks(data: Data, encoding: str) -> str:
    """What a run would move."""
    row = create_encoding(encoding).row_bytes(data.classes)
    weights = 4 * (RESNET152 + 2_049 * (data.classes - 1_000))
    lines = [
        [
            "ranks",
            "store, bytes a step and rank, read + written",
            "store of a node, GB/s read + written",
            "gradients sent, MB a step and rank",
            "node-local disks: rows received by a node, GB an epoch",
            "rows on each disk at the peak, GB",
            "epoch, s",
        ]
    ]
    generation = data.samples * row
    for ranks in (1, 8, 64, 256, 1024):
        nodes = -(-ranks // GPUS)
        per_s = NODE_IMAGES_PER_S * min(ranks, GPUS) / GPUS
        lines.append(
            [
                f"{ranks:,}",
                readable_bytes(2 * BATCH * row),
                f"{2 * per_s * row / 1e9:.2f}",
                f"{2 * (ranks - 1) / ranks * weights / 1e6:.0f}",
                f"{generation * (nodes - 1) / nodes / 1e9:.1f}",
                f"{3 * generation / 1e9:.1f}",
                f"{data.samples / (per_s * nodes):.0f}",
            ]
        )
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dir", type=Path, help="where to write (default: /tmp)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as temporary:
        place = Path(temporary)
        measured, gathered = by_segments(place)
        print(f"Measured, {CLASSES:,} classes in float16:\n\n{measured}\n")
        for data in (IMAGENET, IMAGENET_21K):
            state = 8 * (RESNET152 + 2_049 * (data.classes - 1_000))  # weights and momentum
            seconds = checkpoint_s(place, state)
            print(
                f"A checkpoint of ResNet-152 with {data.classes:,} classes, "
                f"{readable_bytes(state)}: hashed and written here in {seconds:.1f} s."
            )
    step_ms = 1e3 * BATCH * GPUS / NODE_IMAGES_PER_S
    shares = ", ".join(f"{s:,}: {ms / step_ms:.1%}" for s, ms in gathered.items())
    print(f"\nGathering as a share of a step of {step_ms:.0f} ms, on the reading thread: {shares}.")
    for data, encoding in (
        (IMAGENET, "float16"),
        (IMAGENET_21K, "float16"),
        (IMAGENET_21K, "top50"),
    ):
        print(
            f"\nComputed: {data.name}, {data.samples:,} samples of {data.classes:,} classes, "
            f"{encoding}; {BATCH} samples a rank, {GPUS} GPUs and {NODE_IMAGES_PER_S:,} images/s a "
            f"node, ResNet-152.\n\n{of_ranks(data, encoding)}"
        )


if __name__ == "__main__":
    main()
