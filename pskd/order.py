"""Which samples are trained when, and by whom: one order for all worlds. PURE.

`epoch_order` is a permutation of all sample ids that depends on (seed, epoch, N) alone. Step s
trains its slice [s*G, (s+1)*G), so what has been consumed is always a prefix, on any world.
The slice is cut into near-equal contiguous parts, one a rank, and a part into micro-batches.
Cuts fall between units of two samples: samples 2j and 2j+1 of a global batch share a
micro-batch and are each other's mixing partners (an odd last sample has none).

Letters: N samples, G global batch, B samples of one micro-batch, W ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from pskd.errors import PskdError
from pskd.hashing import hash64
from pskd.words import counted

MIN_MICRO_BATCH = 2  # BatchNorm has no variance over one sample

Ids = npt.NDArray[np.int64]


def validation_ranges(n: int, rank: int, world: int, batch_size: int) -> list[range]:
    """Batches of a rank's contiguous share of `n` samples; the shares in order are 0..n-1."""
    low, high = rank * n // world, (rank + 1) * n // world
    return [range(start, min(start + batch_size, high)) for start in range(low, high, batch_size)]


def epoch_order(seed: int, epoch: int, n: int) -> Ids:
    """The order of epoch `epoch` (0-based): int64 (n,), argsort of a hash, ties by id."""
    keys_N = hash64(seed, "order", epoch, np.arange(n, dtype=np.int64), columns=1)[:, 0]
    return np.argsort(keys_N, kind="stable").astype(np.int64)


def partition(count: int, parts: int) -> list[int]:
    """Boundaries (parts + 1 ints) of near-equal contiguous parts of `count` samples.

    Parts hold whole units of two samples. The later parts get the units that are left over, and
    the last part the odd sample: so the part that misses a sample is never a smaller one.
    """
    units = (count + 1) // 2
    small, larger = divmod(units, parts)
    bounds = [0]
    for part in range(parts):
        bounds.append(bounds[-1] + small + (part >= parts - larger))
    return [min(2 * unit, count) for unit in bounds]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank trains in one forward pass.

    ids_B: int64 (B,). scale: what the sum of the samples' losses is multiplied with, so that
    the engine's average over ranks and micro-batches is the mean over the global batch.
    """

    epoch: int
    step: int
    micro: int
    ids_B: Ids
    scale: float


@dataclass(frozen=True)
class Plan:
    """How N samples become steps of G samples for W ranks with `accumulation` micro-batches."""

    n: int
    global_batch: int
    world: int = 1
    accumulation: int = 1
    last_batch: Literal["train", "drop"] = "train"

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        full, rest = divmod(self.n, self.global_batch)
        return full + (1 if rest and self.last_batch == "train" else 0)

    def batch_size(self, step: int) -> int:
        """Samples of the global batch of step `step`."""
        return min(self.global_batch, self.n - step * self.global_batch)

    @property
    def trained(self) -> int:
        """Samples that an epoch trains; the rest is dropped in this epoch."""
        return min(self.n, self.steps * self.global_batch)

    def check(self) -> None:
        """Refuse what cannot be trained exactly.

        Raises:
            PskdError: batch larger than the data set, or a micro-batch of fewer than 2 samples;
                the message names the largest admissible world and accumulation.
        """
        if self.global_batch > self.n:
            raise PskdError(
                f"train.batch_size {self.global_batch} is larger than the data set "
                f"({self.n} samples). Use at most {self.n}."
            )
        sizes = {self.global_batch, self.batch_size(self.steps - 1)}
        smallest = min(sizes)
        if _admissible(sizes, self.world, self.accumulation):
            return
        worlds = [w for w in range(1, smallest + 1) if _admissible(sizes, w, self.accumulation)]
        depths = [a for a in range(1, smallest + 1) if _admissible(sizes, self.world, a)]
        remedies = []
        if worlds:
            with_depth = (
                f" with train.accumulation {self.accumulation}" if self.accumulation > 1 else ""
            )
            remedies.append(f"at most {counted(max(worlds), 'rank')}{with_depth}")
        if depths and max(depths) < self.accumulation:
            remedies.append(f"train.accumulation at most {max(depths)} on this world")
        if _admissible({self.global_batch}, self.world, self.accumulation):
            remedies.append("data.last_batch drop")
        remedies.append("another train.batch_size")
        raise PskdError(
            f"{counted(self.world, 'rank')} with train.accumulation {self.accumulation} would "
            f"leave a micro-batch of fewer than {MIN_MICRO_BATCH} samples in a step of "
            f"{counted(smallest, 'sample')}. Use {', or '.join(remedies)}."
        )

    @property
    def largest_micro_batch(self) -> int:
        """Samples of the largest micro-batch of any rank and step."""
        part = max(np.diff(partition(self.global_batch, self.world)).tolist())
        return int(max(np.diff(partition(part, self.accumulation)).tolist()))

    def part(self, step: int, rank: int) -> tuple[int, int]:
        """Bounds of the rank's part of a step, as positions in the epoch's order."""
        start = step * self.global_batch
        low, high = partition(self.batch_size(step), self.world)[rank : rank + 2]
        return start + low, start + high

    def micro_batches(self, order_N: Ids, epoch: int, step: int, rank: int) -> list[MicroBatch]:
        """The micro-batches of `rank` in a step, in order; `order_N` is the epoch's order."""
        low, high = self.part(step, rank)
        cuts = partition(high - low, self.accumulation)
        scale = self.world * self.accumulation / self.batch_size(step)
        return [
            MicroBatch(epoch, step, m, order_N[low + a : low + b], scale)
            for m, (a, b) in enumerate(pairwise(cuts))
        ]


@dataclass(frozen=True)
class Walk:
    """The micro-batches of one rank from any position on, up to the end of the last epoch."""

    plan: Plan
    seed: int
    epochs: int
    rank: int

    def start(self, epoch: int, step: int, micro: int = 0) -> Iterator[MicroBatch]:
        """From this micro-batch on, in the order of training."""
        for e in range(epoch, self.epochs):
            order_N = epoch_order(self.seed, e, self.plan.n)
            for s in range(step, self.plan.steps):
                yield from self.plan.micro_batches(order_N, e, s, self.rank)[micro:]
                micro = 0
            step = 0


def where(epoch: int, step: int) -> str:
    """A step in words, counted from 1, as what the console says is."""
    return f"epoch {epoch + 1}, step {step + 1}"


def _admissible(sizes: set[int], world: int, accumulation: int) -> bool:
    return all(_smallest_micro_batch(s, world, accumulation) >= MIN_MICRO_BATCH for s in sizes)


def _smallest_micro_batch(size: int, world: int, accumulation: int) -> int:
    rank_sizes = np.diff(partition(size, world)).tolist()
    return min(min(np.diff(partition(part, accumulation)).tolist()) for part in set(rank_sizes))
