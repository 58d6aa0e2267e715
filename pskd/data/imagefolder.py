"""A folder of encoded images: DIR/train/<class>/* and DIR/val/<class>/*, as ImageNet's.

Letters: N samples of a split.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import numpy.typing as npt

from pskd.data.catalog import check_limit, digests, hold_out, smallest_hashes
from pskd.data.headers import bar
from pskd.data.index import Index, load_or_build
from pskd.data.index_check import check_same_classes
from pskd.errors import PskdError
from pskd.order import Ids


@dataclass(frozen=True)
class EncodedSplit:
    """Some images of an index. A sample's id is its place in `rows_N`, rows of the index."""

    index: Index
    rows_N: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows_N)

    @cached_property
    def labels_N(self) -> npt.NDArray[np.int64]:
        """Label of each sample."""
        return self.index.labels_N[self.rows_N].astype(np.int64)

    def paths(self, ids_B: Ids) -> list[npt.NDArray[np.uint8]]:
        """Absolute paths of some samples, as bytes."""
        return self.index.path_bytes(self.rows_N[ids_B])

    def path(self, sample: int) -> str:
        """Absolute path of a sample."""
        return self.index.path(int(self.rows_N[sample]))

    def sizes(self, ids_B: Ids) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Widths and heights of some samples, in pixels."""
        rows_B = self.rows_N[ids_B]
        return self.index.widths_N[rows_B], self.index.heights_N[rows_B]

    def take(self, rows: Ids) -> "EncodedSplit":
        """Some of these samples, in the order given; their ids are new."""
        return EncodedSplit(self.index, self.rows_N[rows])

    def digests(self) -> npt.NDArray[np.uint64]:
        """A hash of path, from the last folder of the root on, size and label of each, (N,)."""
        rows, root = self.rows_N.tolist(), os.fsencode(self.index.root.name)
        sizes, labels = self.index.bytes_N[self.rows_N].tolist(), self.labels_N.tolist()
        return digests(
            (b"%s/%s/%d" % (root, self.index.relative(row), size), label)
            for row, size, label in zip(rows, sizes, labels, strict=True)
        )


@dataclass(frozen=True)
class FolderCatalog:
    """The two splits of a folder."""

    class_names: tuple[str, ...]
    train: EncodedSplit
    validation: EncodedSplit

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over classes, paths and labels of the indices, and which samples are used.

        Not over the content of files, nor their sizes: a bad image that is mended is the same.
        """
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            digest.update(split.index.samples.encode())
            digest.update(np.ascontiguousarray(split.rows_N).data)
        return digest.hexdigest()


def load(
    root: Path, *, index_path: str | None, val_index_path: str | None, held_out: int, limit: int
) -> FolderCatalog:
    """Open the indices of a folder, or build them; on one process of a machine at a time.

    held_out: so many training samples are the validation split. limit: so many of the rest are
    trained (0: all). Both take the samples of smallest hash, for every seed alike.

    Raises:
        PskdError: no such folder, bad files in it, classes that differ, or too few samples.
    """
    train_root = root / "train" if (root / "train").is_dir() else root
    if not train_root.is_dir() or (train_root == root and (root / "val").is_dir()):
        raise PskdError(
            f"data.root {root} holds no train/: name a folder of train/<class>/* and val/<class>/*."
        )
    train = _split(train_root, index_path)
    if held_out:
        train, validation = hold_out(train, held_out)
    elif (root / "val").is_dir():
        validation = _split(root / "val", val_index_path)
        check_same_classes(train.index, validation.index)
    else:
        raise PskdError(
            f"data.root {root} has no val/ beside train/: add it, or hold out training samples "
            "with data.held_out."
        )
    check_limit(train, limit)
    if limit:
        train = train.take(smallest_hashes("limit", len(train), limit))
    return FolderCatalog(train.index.class_names, train, validation)


def load_validation(root: Path, *, val_index_path: str | None) -> FolderCatalog:
    """Open the index of `val/`, or of a folder of classes, or build it; it stands for both splits.

    Raises:
        PskdError: no such folder, no classes in it, or bad files.
    """
    val_root = root / "val" if (root / "val").is_dir() else root
    if val_root == root and (root / "train").is_dir():
        raise PskdError(
            f"data.root {root} has no val/ beside train/: add it, or name a folder of "
            "<class>/*; training samples are evaluated by naming its train/."
        )
    validation = _split(val_root, val_index_path)
    return FolderCatalog(validation.index.class_names, validation, validation)


def _split(root: Path, index_path: str | None) -> EncodedSplit:
    with _one_at_a_time(root), bar(f"index {root.name}") as progress:
        place = None if index_path is None else Path(index_path)
        index = load_or_build(root, place, progress=progress)
    return EncodedSplit(index, np.arange(len(index)))


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """All ranks of a machine want the same index: the first builds it, the others wait for it.

    By a kernel lock and not by a collective: building may take longer than a peer may be silent.
    """
    key = hashlib.sha256(str(root.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
    with Path(gettempdir(), f"pskd-index-{os.getuid()}-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
