"""Reads a generation in blocks, in the order of the disk, and keeps a few numbers a sample.

Letters: N samples of the training split, B of a block, C classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pskd.order import Ids
from pskd.store.generation import Generation

_BLOCK_BYTES = 1 << 25  # of a block's float32 rows


@dataclass(frozen=True)
class Judged:
    """What the rows of a generation say of each sample.

    present_N: bool, whether it has a row; where not, the others are NaN and -1. own_N: float32,
    probability of its label. other_N: float32, the largest one of another class, which is
    other_class_N, int64. predicted_N: int64, the class of the largest of all, of equal ones the
    first. mean_CC: float64, mean row of the samples of each label; NaN of a class without any.
    """

    present_N: npt.NDArray[np.bool_]
    own_N: npt.NDArray[np.float32]
    other_N: npt.NDArray[np.float32]
    other_class_N: npt.NDArray[np.int64]
    predicted_N: npt.NDArray[np.int64]
    mean_CC: npt.NDArray[np.float64]

    @property
    def confidence_N(self) -> npt.NDArray[np.float32]:
        """Probability of the predicted class, float32; NaN where there is no row."""
        return np.maximum(self.own_N, self.other_N)


def judge(generation: Generation, labels_N: npt.NDArray[np.int64]) -> Judged:
    """One pass over all rows."""
    n, classes = generation.n, generation.classes
    own_N, other_N = np.full(n, np.nan, np.float32), np.full(n, np.nan, np.float32)
    other_class_N = np.full(n, -1, np.int64)
    sums_CC = torch.zeros(classes, classes, dtype=torch.float64)
    for ids_B, rows_BC in blocks(generation, generation.in_file_order()):
        labels_B = torch.from_numpy(labels_N[ids_B])
        _add_by_label(sums_CC, labels_B, rows_BC)
        own_B1 = rows_BC.gather(1, labels_B[:, None])
        own_N[ids_B] = own_B1[:, 0].numpy()
        other_B, class_B = rows_BC.scatter_(1, labels_B[:, None], -1.0).max(dim=1)
        other_N[ids_B], other_class_N[ids_B] = other_B.numpy(), class_B.numpy()
    present_N = generation.present_N
    right_N = (own_N > other_N) | ((own_N == other_N) & (labels_N < other_class_N))
    count_C = np.bincount(labels_N[present_N], minlength=classes)
    with np.errstate(invalid="ignore"):
        mean_CC = sums_CC.numpy() / count_C[:, None]
    return Judged(
        present_N,
        own_N,
        other_N,
        other_class_N,
        np.where(right_N, labels_N, other_class_N),
        mean_CC,
    )


def blocks(generation: Generation, ids: Ids) -> Iterator[tuple[Ids, Tensor]]:
    """(ids_B, rows float32 (B, C)) of samples that have a row, in blocks of 32 MiB."""
    size = max(1, _BLOCK_BYTES // (4 * generation.classes))
    for start in range(0, len(ids), size):
        ids_B = ids[start : start + size]
        yield ids_B, generation.rows(ids_B)[0]


def _add_by_label(sums_CC: Tensor, labels_B: Tensor, rows_BC: Tensor) -> None:
    """A block is added up in float32, blocks in float64."""
    block_CC = torch.zeros(sums_CC.shape, dtype=torch.float32)
    sums_CC += block_CC.index_add_(0, labels_B, rows_BC)
