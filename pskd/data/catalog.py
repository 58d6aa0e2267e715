"""What the samples of each data set are. Reads files only when asked; imports no torch.

Letters: N samples, H height, W width, C channels (1 or 3).
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from pskd.errors import PskdError
from pskd.hashing import hash64

# name -> module with `load(root, download) -> Catalog`; one's own can be added from outside.
DATASETS = {
    "digits": "pskd.data.digits",
    "fashion-mnist": "pskd.data.fashion_mnist",
    "cifar10": "pskd.data.cifar10",
    "cifar100": "pskd.data.cifar100",
}

FOLDER = "imagefolder"  # encoded images, see `imagefolder.py`; the others are held in memory

DEFAULT_ROOT = Path("data")  # where data sets are looked for, and fetched to


class Takes(Protocol):
    """Samples, of which some can be taken."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def take(self, rows: npt.NDArray[np.int64]) -> Self:
        """Some samples, in the order given; their ids are new."""
        ...


AnySplit = TypeVar("AnySplit", bound=Takes)


@dataclass(frozen=True)
class Split:
    """images_NHWC: uint8; labels_N: int64 in [0, number of classes). A sample's id is its row."""

    images_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.labels_N)

    def take(self, rows: npt.NDArray[np.int64]) -> "Split":
        """Some samples, in the order given; their ids are new."""
        return Split(self.images_NHWC[rows], self.labels_N[rows])

    def digests(self) -> npt.NDArray[np.uint64]:
        """A hash of pixels and label of each sample, (N,), by which the sample is known again."""
        images, labels = self.images_NHWC, self.labels_N.tolist()
        return digests(
            (np.ascontiguousarray(image_HWC).data, label)
            for image_HWC, label in zip(images, labels, strict=True)
        )


@dataclass(frozen=True)
class Catalog:
    """A data set held in memory. mean, std: of the pixels scaled to [0, 1], one a channel."""

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    validation: Split

    def __post_init__(self) -> None:
        for title, split in (("training", self.train), ("validation", self.validation)):
            if len(split.images_NHWC) != len(split.labels_N):
                raise PskdError(
                    f"data.name {self.name}: the {title} split has {len(split.images_NHWC)} images "
                    f"but {len(split.labels_N)} labels. Fetch the data again."
                )
            bad = np.flatnonzero((split.labels_N < 0) | (split.labels_N >= self.num_classes))
            if len(bad):
                raise PskdError(
                    f"data.name {self.name}: label {split.labels_N[bad[0]]} of {title} sample "
                    f"{bad[0]} is outside 0..{self.num_classes - 1}. Fetch the data again."
                )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over classes, labels and pixels: two data sets with one name are told apart."""
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for split in (self.train, self.validation):
            digest.update(repr(split.images_NHWC.shape).encode())
            digest.update(np.ascontiguousarray(split.labels_N).data)
            digest.update(np.ascontiguousarray(split.images_NHWC).data)
        return digest.hexdigest()


def load(
    name: str, *, root: str | None, download: bool, held_out: int, limit: int, pad_to: int
) -> Catalog:
    """Read a data set, and make of it what the configuration asks for.

    held_out: so many training samples become the validation split. limit: the first so many of
    the rest are trained (0: all). pad_to: black borders up to this size (0: none).

    Raises:
        PskdError: missing, damaged or other data; more samples asked for than there are; images
            larger than pad_to.
    """
    read: Callable[[Path | None, bool], Catalog] = import_module(DATASETS[name]).load
    catalog = read(None if root is None else Path(root), download)
    if held_out:
        train, validation = hold_out(catalog.train, held_out)
        catalog = replace(catalog, train=train, validation=validation)
    check_limit(catalog.train, limit)
    if limit:
        catalog = replace(catalog, train=catalog.train.take(np.arange(limit)))
    if pad_to:
        catalog = replace(
            catalog, train=_pad(catalog.train, pad_to), validation=_pad(catalog.validation, pad_to)
        )
    return catalog


def hold_out(train: AnySplit, count: int) -> tuple[AnySplit, AnySplit]:
    """(train, validation): the samples of smallest hash are held out, for every seed alike.

    Raises:
        PskdError: too few are left.
    """
    n = len(train)
    if count > n - 2:
        raise PskdError(f"data.held_out {count} leaves fewer than 2 of {n} samples to train.")
    chosen = smallest_hashes("held-out", n, count)
    return train.take(np.setdiff1d(np.arange(n), chosen)), train.take(chosen)


def check_limit(train: AnySplit, limit: int) -> None:
    """Refuse to train more samples than there are.

    Raises:
        PskdError: as it says.
    """
    if limit > len(train):
        raise PskdError(f"data.limit {limit} exceeds the {len(train)} samples.")


def smallest_hashes(stream: str, n: int, count: int) -> npt.NDArray[np.int64]:
    """`count` of n samples, ascending: the same ones for every seed."""
    keys_N = hash64(0, stream, 0, np.arange(n, dtype=np.int64), columns=1)[:, 0]
    return np.sort(np.argsort(keys_N, kind="stable")[:count])


def digests(samples: Iterable[tuple[bytes | memoryview, int]]) -> npt.NDArray[np.uint64]:
    """64 bits of a hash of each (content, label)."""
    hashes = (
        hashlib.blake2b(content, digest_size=8, salt=label.to_bytes(8, "little")).digest()
        for content, label in samples
    )
    return np.frombuffer(b"".join(hashes), np.uint64)


def _pad(split: Split, size: int) -> Split:
    height, width = split.images_NHWC.shape[1:3]
    if max(height, width) > size:
        raise PskdError(f"data.pad_to {size} is smaller than the images ({height}x{width}).")
    y, x = size - height, size - width
    border = ((0, 0), (y // 2, y - y // 2), (x // 2, x - x // 2), (0, 0))
    return Split(np.pad(split.images_NHWC, border), split.labels_N)
