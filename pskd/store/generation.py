"""A generation: one prediction per sample, as a list of entries; read by sample id.

Letters: N samples of the data set, B of a batch, C classes, S segments.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pskd import files
from pskd.errors import PskdError
from pskd.order import Ids
from pskd.store.encoding import ENCODINGS
from pskd.store.format import VERSION, Entry
from pskd.store.segment import SegmentReader, explain

MANIFEST = "manifest.json"


class Generation:
    """The rows that a list of entries names. Segment names are relative to `directory`."""

    def __init__(self, directory: Path, n: int, classes: int, entries: Sequence[Entry]) -> None:
        """Open every segment and index its ids.

        Raises:
            PskdError: a segment is missing, damaged, or of another sample or class count.
        """
        self.n = n
        self.classes = classes
        self._readers = [SegmentReader(directory / e.segment, e) for e in entries]
        self._segment_N = np.full(n, -1, np.int32)
        self._unit_N = np.zeros(n, np.int64)
        for index, reader in enumerate(self._readers):
            _expect(reader, "number of samples", n, reader.header.n)
            _expect(reader, "number of classes", classes, reader.header.classes)
            ids, units = reader.ids_and_units()
            if len(ids) and not (ids.min() >= 0 and ids.max() < n):
                raise PskdError(f"prediction store: {reader.path}: ids outside 0..{n - 1}.")
            self._segment_N[ids] = index  # the last of several rows with one id wins
            self._unit_N[ids] = units

    def present(self) -> Ids:
        """Ids that have a row, ascending."""
        return np.flatnonzero(self._segment_N >= 0)

    def encoded_rows(self, ids_B: Ids) -> tuple[Tensor, Tensor]:
        """Encoded rows uint8 (B, R), zeros where absent, and whether each is present, bool (B,)."""
        row_bytes = self._readers[0].header.row_bytes if self._readers else 0
        rows_BR = np.zeros((len(ids_B), row_bytes), np.uint8)
        segment_B = self._segment_N[ids_B]
        for index in np.unique(segment_B[segment_B >= 0]):
            where = np.flatnonzero(segment_B == index)
            units_BS = self._readers[index].units_US.take(self._unit_N[ids_B[where]], axis=0)
            rows_BR[where] = units_BS[:, :row_bytes]
        return torch.from_numpy(rows_BR), torch.from_numpy(segment_B >= 0)

    def rows(self, ids_B: Ids) -> tuple[Tensor, Tensor]:
        """Decoded rows float32 (B, C), zeros where absent, and present_B bool."""
        if not self._readers or not len(ids_B):
            return torch.zeros(len(ids_B), self.classes), torch.zeros(len(ids_B), dtype=torch.bool)
        bytes_BR, present_B = self.encoded_rows(ids_B)
        rows_BC = ENCODINGS[self._readers[0].header.encoding].decode(bytes_BR, self.classes)
        return torch.where(present_B[:, None], rows_BC, torch.zeros(())), present_B

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
        for reader in self._readers[part::parts]:
            reader.verify()

    def check_written_for(self, identity: str, encoding: str) -> None:
        """Raise a PskdError if a segment is of another data set or encoding."""
        for reader in self._readers:
            _expect(reader, "data set", identity, reader.header.identity)
            _expect(reader, "encoding", encoding, reader.header.encoding)


def _expect(reader: SegmentReader, name: str, want: object, have: object) -> None:
    if want != have:
        raise PskdError(
            f"prediction store: {reader.path} was written for {name} {have}, not {want}. "
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


def open_generation(path: str | Path) -> Generation:
    """A finished generation `DIR/store/gen-<epoch>`: `open_generation(path)[ids]`.

    Raises:
        PskdError: no finished generation there, or damaged.
    """
    directory = Path(path)
    try:
        manifest = files.read_manifest(directory / MANIFEST, VERSION)
    except ValueError as error:
        raise PskdError(f"prediction store: {error}. Open another generation.") from error
    except OSError as error:
        raise PskdError(
            f"{directory} holds no finished generation of predictions ({error.strerror})."
        ) from error
    entries = [Entry(*e) for e in manifest["entries"]]
    return Generation(directory.parent, manifest["n"], manifest["classes"], entries)
