"""Augmentation parameters as pure functions of (seed, epoch, id, stream, column). PURE.

Each kind of draw has a named stream ("crop", "flip", ...), so adding one never shifts another,
and a sample's augmentation is the same on any world, thread count or resume.

Letters: B samples, K columns.
"""

import numpy as np
import numpy.typing as npt

from pskd.hashing import hash64
from pskd.order import Ids


def uniforms(
    seed: int, epoch: int, ids_B: Ids, stream: str, columns: int
) -> npt.NDArray[np.float64]:
    """Uniform draws in [0, 1): float64 (B, columns), the upper 53 bits of the hash."""
    bits_BK = hash64(seed, stream, epoch, ids_B, columns) >> np.uint64(11)
    return bits_BK.astype(np.float64) * 2.0**-53


def integers(
    seed: int, epoch: int, ids_B: Ids, stream: str, columns: int, high: int
) -> npt.NDArray[np.int64]:
    """Uniform integers in [0, high): int64 (B, columns); `high` far below 2^53."""
    return (uniforms(seed, epoch, ids_B, stream, columns) * high).astype(np.int64)


def shifts(seed: int, epoch: int, ids_B: Ids, padding: int) -> npt.NDArray[np.int64]:
    """Top-left corners of a crop out of the image padded by `padding` on every side.

    int64 (B, 2), (y, x), each in [0, 2 * padding]; `padding` itself is the centre. Stream "crop".
    """
    return integers(seed, epoch, ids_B, "crop", 2, 2 * padding + 1)


def flips(seed: int, epoch: int, ids_B: Ids) -> npt.NDArray[np.bool_]:
    """Horizontal flip with probability one half: bool (B,). Stream "flip"."""
    return uniforms(seed, epoch, ids_B, "flip", 1)[:, 0] < 0.5


def crop_grid(
    seed: int, epoch: int, ids_B: Ids, *, height: int, width: int, padding: int, flip: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which source rows (B, height) and columns (B, width) make up each augmented image.

    int64; an index outside the image means the black border that `padding` adds.
    """
    y_BH = np.broadcast_to(np.arange(height), (len(ids_B), height))
    x_BW = np.broadcast_to(np.arange(width), (len(ids_B), width))
    if flip:
        x_BW = np.where(flips(seed, epoch, ids_B)[:, None], x_BW[:, ::-1], x_BW)
    if padding:
        corner_B2 = shifts(seed, epoch, ids_B, padding) - padding
        # Cropped first, then mirrored, as torchvision's RandomCrop and RandomHorizontalFlip.
        y_BH = y_BH + corner_B2[:, :1]
        x_BW = x_BW + corner_B2[:, 1:]
    return np.ascontiguousarray(y_BH), np.ascontiguousarray(x_BW)
