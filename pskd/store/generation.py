"""A generation: one prediction per sample, as a list of entries; read by sample id.

Letters: N samples of the data set, B of a batch, C classes, S segments.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pskd import files
from pskd.errors import DamagedError, PskdError
from pskd.order import Ids
from pskd.store.encoding import Encoding
from pskd.store.format import VERSION, Entry, room_bytes, stride_of
from pskd.store.registry import create_encoding
from pskd.store.segment import REMEDY, Bytes, SegmentReader, explain

MANIFEST = "manifest.json"
_PREADS = 8  # at a time, where rows are not read through the mapping


class Generation:
    """The rows that a list of entries names. Segment names are relative to `directory`."""

    def __init__(
        self,
        directory: Path,
        n: int,
        classes: int,
        entries: Sequence[Entry],
        read: Literal["mmap", "pread"] = "mmap",
    ) -> None:
        """Open every segment and index its ids: 8 bytes a sample.

        Raises:
            PskdError: a segment is missing, damaged, or of another sample or class count.
        """
        self.n = n
        self.classes = classes
        self.entries = list(entries)
        pread = read == "pread"
        self.segments = [SegmentReader(directory / e.segment, e, for_read=pread) for e in entries]
        self._segment_N = np.full(n, -1, np.int32)
        self._unit_N = np.zeros(n, np.int32)
        for index, segment in enumerate(self.segments):
            expect(segment, "number of samples", n, segment.header.n)
            expect(segment, "number of classes", classes, segment.header.classes)
            expect(segment, "encoding", self.segments[0].header.encoding, segment.header.encoding)
            for ids_B, units_B in segment.ids_and_units():
                if ids_B.min() < 0 or ids_B.max() >= n:
                    raise DamagedError(
                        f"prediction store: {segment.path}: ids outside 0..{n - 1}.", REMEDY
                    )
                self._segment_N[ids_B] = index  # the last of several rows with one id wins
                self._unit_N[ids_B] = units_B
        self._encoding: Encoding | None = None
        self.row_bytes = 0
        if self.segments:
            self._encoding = create_encoding(self.segments[0].header.encoding)
            self.row_bytes = self.segments[0].header.row_bytes
        self._readers = ThreadPoolExecutor(_PREADS) if pread else None

    @property
    def present_N(self) -> npt.NDArray[np.bool_]:
        """Whether each sample has a row: bool (N,)."""
        return self._segment_N >= 0

    def in_file_order(self) -> Ids:
        """Ids of the samples that have a row, as the rows lie on disk: int64."""
        ids = np.flatnonzero(self._segment_N >= 0)
        return ids[np.lexsort((self._unit_N[ids], self._segment_N[ids]))]

    def gather(self, ids_B: Ids, out_BR: Bytes, present_B: npt.NDArray[np.bool_]) -> bool:
        """Encoded rows into uint8 (B, R), zeros where absent, and whether each is present.

        Returns whether all are.
        """
        segment_B, unit_B = self._segment_N[ids_B], self._unit_N[ids_B]
        np.greater_equal(segment_B, 0, out=present_B)
        complete = bool(present_B.all())
        if not complete:
            out_BR[~present_B] = 0
        # Grouped by segment: with one segment a rank, a batch has a few rows in each of many.
        order_B = np.argsort(segment_B, kind="stable")
        segment_B, unit_B = segment_B[order_B], unit_B[order_B]
        starts = np.flatnonzero(np.diff(segment_B, prepend=-1))  # absent ones, -1, come first
        if len(starts) == 1 and complete:
            self._fetch(self.segments[segment_B[0]], unit_B, out_BR)  # stable: in their order
            return True
        rows_BR = np.empty_like(out_BR)
        bounds = [*starts.tolist(), len(order_B)]
        for start, end in pairwise(bounds):
            self._fetch(self.segments[segment_B[start]], unit_B[start:end], rows_BR[start:end])
        present = bounds[0]
        out_BR[order_B[present:]] = rows_BR[present:]
        return complete

    def decode(self, rows_BR: Tensor, present_B: Tensor, complete: bool) -> Tensor:
        """Float32 (B, C) from encoded rows, on their device; zeros where absent."""
        if self._encoding is None:
            return torch.zeros(len(rows_BR), self.classes, device=rows_BR.device)
        rows_BC = self._encoding.decode(rows_BR, self.classes)
        return rows_BC if complete else torch.where(present_B[:, None], rows_BC, 0.0)

    def rows(self, ids_B: Ids) -> tuple[Tensor, Tensor]:
        """Decoded rows float32 (B, C), zeros where absent, and present_B bool."""
        rows_BR = torch.empty(len(ids_B), self.row_bytes, dtype=torch.uint8)
        present_B = torch.empty(len(ids_B), dtype=torch.bool)
        complete = self.gather(ids_B, rows_BR.numpy(), present_B.numpy())
        return self.decode(rows_BR, present_B, complete), present_B

    def __getitem__(self, ids: Ids | Sequence[int]) -> Tensor:
        """Rows of `ids`: float32 (len(ids), C).

        Raises:
            KeyError: names the ids that were never seen, or lie outside the data set.
        """
        ids_B = np.atleast_1d(np.asarray(ids, np.int64))
        outside = (ids_B < 0) | (ids_B >= self.n)
        if outside.any():
            raise KeyError(f"ids outside 0..{self.n - 1}: {ids_B[outside].tolist()}")
        rows_BC, present_B = self.rows(ids_B)
        missing = ids_B[~present_B.numpy()]
        if len(missing):
            raise KeyError(f"ids never seen: {missing.tolist()}")
        return rows_BC

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Check the crc of every row in each `parts`-th segment, starting with segment `part`."""
        for segment in self.segments[part::parts]:
            segment.verify()

    def close(self) -> None:
        """End the reading threads."""
        if self._readers is not None:
            self._readers.shutdown(wait=True)

    def warm_up(self, limit_bytes: int, part: int, parts: int, stop: Callable[[], bool]) -> None:
        """Read up to `limit_bytes` into the page cache, segments front to back.

        Of `parts` processes on a node, each reads its share; `stop` is asked now and then.
        """
        budget = limit_bytes // parts
        for segment in self.segments[part::parts]:
            budget -= segment.warm_up(budget, stop)

    def _fetch(self, segment: SegmentReader, units_B: npt.NDArray[np.int32], out_BR: Bytes) -> None:
        if self._readers is None:
            segment.gather(units_B, out_BR)
            return
        parts = zip(np.array_split(units_B, _PREADS), np.array_split(out_BR, _PREADS), strict=True)
        for done in [self._readers.submit(segment.read, u, o) for u, o in parts]:
            done.result()


def generation_bytes(n: int, row_bytes: int, ranks: int) -> int:
    """What a generation of n rows takes on the disk, written by so many ranks."""
    return ranks * room_bytes(-(-n // ranks), stride_of(row_bytes))


def expect(segment: SegmentReader, name: str, want: object, have: object) -> None:
    """Raise a PskdError that names the segment and both values unless they are equal."""
    if want != have:
        raise PskdError(
            f"prediction store: {segment.path} was written for {name} {have}, not {want}. "
            "Use the run directory that it belongs to, or start a new run."
        )


def write_manifest(
    directory: Path, epoch: int, n: int, classes: int, entries: Sequence[Entry]
) -> None:
    """Commit a finished generation: `gen-<epoch>/manifest.json` names its entries."""
    content = {"epoch": epoch, "n": n, "classes": classes, "entries": entries}
    path = directory / generation_name(epoch) / MANIFEST
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_manifest(path, VERSION, content)
    except OSError as error:
        raise explain(error, path) from error


def generation_name(epoch: int) -> str:
    """Directory of the predictions made in 0-based `epoch`."""
    return f"gen-{epoch:06d}"


def finished_epochs(directory: Path) -> list[int]:
    """Epochs of the finished generations in a store's directory, ascending."""
    return sorted(
        int(path.parent.name.removeprefix("gen-"))
        for path in directory.glob(f"gen-[0-9]*/{MANIFEST}")
    )


def unfinish(directory: Path, segments: set[str]) -> None:
    """Delete the manifests that name one of these segments, before they are deleted themselves.

    A checkpoint may name a part of what was a whole generation later.
    """
    for epoch in finished_epochs(directory):
        path = directory / generation_name(epoch)
        with suppress(PskdError):  # a damaged one stays, for `pskd store verify`
            if any(entry.segment in segments for entry in read_manifest(path).entries):
                (path / MANIFEST).unlink()


def open_generation(path: str | Path) -> Generation:
    """A finished generation `DIR/store/gen-<epoch>`: `open_generation(path)[ids]`.

    Raises:
        PskdError: no finished generation there, or damaged.
    """
    manifest = read_manifest(Path(path))
    return Generation(Path(path).parent, manifest.n, manifest.classes, manifest.entries)


class Manifest(NamedTuple):
    """What a finished generation consists of."""

    epoch: int
    n: int
    classes: int
    entries: list[Entry]


def read_manifest(directory: Path) -> Manifest:
    """Of the finished generation in `DIR/store/gen-<epoch>`.

    Raises:
        PskdError: there is none, or it is damaged.
    """
    try:
        content = files.read_manifest(directory / MANIFEST, VERSION)
    except files.VersionError as error:
        raise PskdError(f"prediction store: {error}. Use that version.") from error
    except ValueError as error:
        raise PskdError(
            f"prediction store: {error}. Restore it from a copy, or remove it: training does not "
            "read it, and `pskd inspect` takes the generations that are left."
        ) from error
    except OSError as error:
        raise PskdError(
            f"{directory} holds no finished generation of predictions ({error.strerror})."
        ) from error
    return Manifest(**{**content, "entries": [Entry(*e) for e in content["entries"]]})
