"""Augmentation parameters as pure functions of (seed, epoch, id, stream, column). PURE.

Each kind of draw has a named stream ("crop", "flip", ...), so adding one never shifts another,
and a sample's augmentation is the same on any world, thread count or resume.

A second view of a sample in the same epoch (of a partner, for example) has streams of its own:
`view` is a prefix of their names.

Letters: B samples, K columns, T tries.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pskd.hashing import hash64
from pskd.order import Ids

Floats = npt.NDArray[np.float64]

TRIES = 10  # for a box that fits


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


def shifts(
    seed: int, epoch: int, ids_B: Ids, padding: int, view: str = ""
) -> npt.NDArray[np.int64]:
    """Top-left corners of a crop out of the image padded by `padding` on every side.

    int64 (B, 2), (y, x), each in [0, 2 * padding]; `padding` itself is the centre. Stream "crop".
    """
    return integers(seed, epoch, ids_B, f"{view}crop", 2, 2 * padding + 1)


def flips(seed: int, epoch: int, ids_B: Ids, view: str = "") -> npt.NDArray[np.bool_]:
    """Horizontal flip with probability one half: bool (B,). Stream "flip"."""
    return uniforms(seed, epoch, ids_B, f"{view}flip", 1)[:, 0] < 0.5


def windows(
    seed: int,
    epoch: int,
    ids_B: Ids,
    widths_B: npt.NDArray[np.int32],
    heights_B: npt.NDArray[np.int32],
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
    view: str = "",
) -> npt.NDArray[np.int32]:
    """Random windows of an image, as torchvision's RandomResizedCrop distributes them: where no try
    fits, the largest central one of an allowed ratio.

    int32 (B, 4): y, x, height, width, in pixels. scale: share of the area, uniform. ratio: width
    by height, uniform in its logarithm. Stream "crop".
    """
    u_BT4 = uniforms(seed, epoch, ids_B, f"{view}crop", 4 * TRIES).reshape(-1, TRIES, 4)
    width_B, height_B = widths_B.astype(np.float64), heights_B.astype(np.float64)
    width_B1, height_B1 = width_B[:, None], height_B[:, None]
    w_BT, h_BT = drawn_sides(u_BT4, width_B1, height_B1, scale=scale, ratio=ratio)
    fits_BT = (w_BT > 0) & (w_BT <= width_B1) & (h_BT > 0) & (h_BT <= height_B1)
    drawn_B4 = first_fit(u_BT4, h_BT, w_BT, fits_BT, height_B, width_B)
    found_B1 = fits_BT.any(axis=1, keepdims=True)
    windows_B4 = np.where(found_B1, drawn_B4, _central_windows(width_B, height_B, ratio))
    return windows_B4.astype(np.int32)


def drawn_sides(
    u_BT4: Floats,
    width: Floats | float,
    height: Floats | float,
    *,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> tuple[Floats, Floats]:
    """Widths and heights (B, T), whole numbers, from the first two of four uniform draws.

    scale: share of the area of width by height, uniform. ratio: width by height, uniform in its
    logarithm.
    """
    area_BT = (scale[0] + (scale[1] - scale[0]) * u_BT4[..., 0]) * width * height
    low, high = np.log(ratio)
    shape_BT = np.exp(low + (high - low) * u_BT4[..., 1])
    return np.rint(np.sqrt(area_BT * shape_BT)), np.rint(np.sqrt(area_BT / shape_BT))


def first_fit(
    u_BT4: Floats,
    h_BT: Floats,
    w_BT: Floats,
    fits_BT: npt.NDArray[np.bool_],
    height: Floats | float,
    width: Floats | float,
) -> Floats:
    """(B, 4): y, x, height, width of each one's first box that fits, anywhere in the image.

    The place is uniform, from the last two of four draws. Where none fits, it means nothing.
    """
    rows, first_B = np.arange(len(u_BT4)), fits_BT.argmax(axis=1)
    h_B, w_B = h_BT[rows, first_B], w_BT[rows, first_B]
    y_B = np.floor(u_BT4[rows, first_B, 2] * (height - h_B + 1))
    x_B = np.floor(u_BT4[rows, first_B, 3] * (width - w_B + 1))
    return np.stack([y_B, x_B, h_B, w_B], axis=1)


def _central_windows(width_B: Floats, height_B: Floats, ratio: Sequence[float]) -> Floats:
    """The largest windows of an allowed ratio, in the middle; (B, 4)."""
    shape_B = width_B / height_B
    w_B = np.where(shape_B > ratio[1], np.rint(height_B * ratio[1]), width_B)
    h_B = np.where(shape_B < ratio[0], np.rint(width_B / ratio[0]), height_B)
    w_B, h_B = np.maximum(w_B, 1), np.maximum(h_B, 1)
    return np.stack([(height_B - h_B) // 2, (width_B - w_B) // 2, h_B, w_B], axis=1)


def normals(
    seed: int, epoch: int, ids_B: Ids, stream: str, columns: int
) -> npt.NDArray[np.float64]:
    """Standard normal draws: float64 (B, columns), by Box and Muller."""
    u_BK2 = uniforms(seed, epoch, ids_B, stream, 2 * columns).reshape(-1, columns, 2)
    radius_BK = np.sqrt(-2 * np.log1p(-u_BK2[..., 0]))  # 1 - u is never 0
    normal_BK: npt.NDArray[np.float64] = radius_BK * np.cos(2 * np.pi * u_BK2[..., 1])
    return normal_BK


def crop_grid(
    seed: int,
    epoch: int,
    ids_B: Ids,
    *,
    height: int,
    width: int,
    padding: int,
    flip: bool,
    view: str = "",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which source rows (B, height) and columns (B, width) make up each augmented image.

    int64; an index outside the image means the black border that `padding` adds.
    """
    y_BH = np.broadcast_to(np.arange(height), (len(ids_B), height))
    x_BW = np.broadcast_to(np.arange(width), (len(ids_B), width))
    if flip:
        x_BW = np.where(flips(seed, epoch, ids_B, view)[:, None], x_BW[:, ::-1], x_BW)
    if padding:
        corner_B2 = shifts(seed, epoch, ids_B, padding, view) - padding
        # Cropped first, then mirrored, as torchvision's RandomCrop and RandomHorizontalFlip.
        y_BH = y_BH + corner_B2[:, :1]
        x_BW = x_BW + corner_B2[:, 1:]
    return np.ascontiguousarray(y_BH), np.ascontiguousarray(x_BW)
