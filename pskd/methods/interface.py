"""One interface for all methods: a Batch in; losses and what to remember out.

Letters: B samples, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pskd.data.batch import Batch

Forward = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, C), through the engine


@dataclass(frozen=True)
class Past:
    """What the store knows of a batch: rows_BC float32 (zeros if absent), present_B bool."""

    rows_BC: Tensor
    present_B: Tensor

    def part(self, samples: slice) -> "Past":
        """Of some samples of the batch."""
        return Past(self.rows_BC[samples], self.present_B[samples])


@dataclass(frozen=True)
class Output:
    """loss_B: one loss a sample, unweighted, with gradient. remember_BC: float32, or nothing."""

    loss_B: Tensor
    remember_BC: Tensor | None = None


class Method(Protocol):
    """A way to train. `needs_store`: it reads `past`, and returns what to remember."""

    needs_store: bool

    def begin_epoch(self, epoch: int, epochs: int) -> dict[str, float]:
        """Set the epoch's constants (alpha, ...); returns those worth a log line."""
        ...

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """The losses of one micro-batch."""
        ...
