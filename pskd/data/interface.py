"""What the trainer asks of training data.

Letters: B samples.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from pskd.data.batch import Batch
from pskd.order import MicroBatch, Walk, validation_ranges


class Data(Protocol):
    """Images on the training device, in the order that the trainer asks for."""

    def begin(self, walk: Walk, epoch: int, step: int) -> None:
        """`train_batch` will be asked for what `walk` yields from this step on: read ahead."""
        ...

    def train_batch(self, micro: MicroBatch) -> Batch:
        """The samples of the next micro-batch, augmented. Valid until the next call.

        Raises:
            PskdError: an image cannot be read or decoded; names path, id, epoch and step.
        """
        ...

    def expect_bad(self, samples: list[int]) -> None:
        """A hint: images of these were found bad before, on some rank. Changes no result."""
        ...

    def name(self, sample: int) -> str:
        """What a message calls a training sample."""
        ...

    @property
    def validation_size(self) -> int:
        """Number of validation samples."""
        ...

    def validation_of(self, ranges: Sequence[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of some batches of validation samples, named by their numbers."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


def validation_batches(
    data: Data, rank: int, world: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of the rank's contiguous share; every sample is in one share."""
    return data.validation_of(validation_ranges(data.validation_size, rank, world, batch_size))
