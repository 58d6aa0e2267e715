"""One segment file: append as its only writer, read as one of many. Format: `format.py`.

Letters: B rows of a step, R bytes of an encoded row.
"""

import errno
import mmap
import os
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pskd.errors import PskdError
from pskd.files import sync_directory
from pskd.order import Ids
from pskd.store import format as fmt
from pskd.store.format import Entry, Header

Bytes = npt.NDArray[np.uint8]


class SegmentWriter:
    """Appends chunks with one `pwrite` each. A full disk is an error here, never a SIGBUS."""

    def __init__(self, path: Path, header: Header, expected_rows: int, name: str) -> None:
        """Create the file, which must not exist, and reserve room for `expected_rows` rows.

        Raises:
            PskdError: the disk has no room, or the directory cannot be written.
        """
        self._path = path
        self._stride = header.stride
        self._row_bytes = header.row_bytes
        self._end = fmt.HEADER_BYTES
        self._name = name
        self._rows = 0
        self._crc = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            try:
                room = (
                    fmt.HEADER_BYTES + fmt.chunk_units(expected_rows, self._stride) * self._stride
                )
                os.posix_fallocate(self._file, 0, room)
                self._write(header.pack(), 0)
                sync_directory(path.parent)
                sync_directory(path.parent.parent)
            except OSError:
                # A failed reservation leaves a partial file behind on some file systems.
                os.close(self._file)
                path.unlink()
                raise
        except OSError as error:
            raise explain(error, path) from error

    @property
    def entry(self) -> Entry:
        """What has been appended so far."""
        return Entry(self._name, self._rows, self._crc)

    def append(self, ids_B: Ids, bytes_BR: Bytes) -> None:
        """Append one chunk.

        Raises:
            PskdError: the disk is full or failed; what was appended before stays readable.
        """
        rows = len(ids_B)
        if rows == 0:
            return
        head = fmt.prefix_units(rows, self._stride)
        chunk = np.zeros((head + rows, self._stride), np.uint8)
        flat = chunk.reshape(-1)
        flat[fmt.PREFIX.size : fmt.PREFIX.size + 8 * rows] = ids_B.astype("<i8").view(np.uint8)
        chunk[head:, : self._row_bytes] = bytes_BR
        crc = fmt.seal_chunk(flat.data, rows)
        try:
            self._write(flat.data, self._end)
        except OSError as error:
            raise explain(error, self._path) from error
        self._end += chunk.nbytes
        self._rows += rows
        self._crc = fmt.chain(self._crc, crc)

    def sync(self) -> None:
        """Make what was appended durable."""
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise explain(error, self._path) from error

    def close(self) -> None:
        """Give back the room that was not used, and close. The file is history from here on."""
        try:
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
        except OSError as error:
            raise explain(error, self._path) from error
        finally:
            os.close(self._file)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._file, rest, offset)
            rest = rest[written:]
            offset += written


class SegmentReader:
    """The first rows of a segment, as named by an entry: header and chunk chain are checked."""

    def __init__(self, path: Path, entry: Entry) -> None:
        """Open and index.

        Raises:
            PskdError: missing, truncated or damaged; the message names file and defect.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self.header = fmt.parse_header(file.read(fmt.HEADER_BYTES))
                # Its owner may trim the room that it did not use at any time, but no named row.
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                # Checked before any access: touching a page beyond the end is a SIGBUS.
                self._chunks = self._scan(file.fileno(), entry, len(self._map))
        except OSError as error:
            raise PskdError(f"prediction store: {path}: {error.strerror}. {_REMEDY}") from error
        except fmt.FormatError as error:
            raise PskdError(f"prediction store: {path}: {error}. {_REMEDY}") from error
        self._map.madvise(mmap.MADV_RANDOM)
        stride = self.header.stride
        units = (len(self._map) - fmt.HEADER_BYTES) // stride
        body = np.frombuffer(self._map, np.uint8, units * stride, fmt.HEADER_BYTES)
        self.units_US: Bytes = body.reshape(units, stride)

    def ids_and_units(self) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Sample ids in the order of rows, and the unit in which each row lies: int64 (rows,)."""
        ids, units = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        flat = self.units_US.reshape(-1)
        for first_unit, rows, _ in self._chunks:
            start = first_unit * self.header.stride + fmt.PREFIX.size
            ids.append(flat[start : start + 8 * rows].view("<i8").astype(np.int64))
            row_unit = first_unit + fmt.prefix_units(rows, self.header.stride)
            units.append(np.arange(row_unit, row_unit + rows))
        return np.concatenate(ids), np.concatenate(units)

    def verify(self) -> None:
        """Compare every chunk with its crc.

        Raises:
            PskdError: names the file and the first row of the damaged chunk.
        """
        row = 0
        for first_unit, rows, crc in self._chunks:
            last = first_unit + fmt.chunk_units(rows, self.header.stride)
            chunk = self.units_US[first_unit:last].reshape(-1).data
            if zlib.crc32(chunk[fmt.CRC_FROM :]) != crc:
                raise PskdError(
                    f"prediction store: {self.path}: rows {row} to {row + rows - 1} are damaged "
                    f"(crc differs). {_REMEDY}"
                )
            row += rows

    def _scan(self, file: int, entry: Entry, size: int) -> list[tuple[int, int, int]]:
        """(first unit, rows, crc) of each chunk that the entry names."""
        stride = self.header.stride
        chunks: list[tuple[int, int, int]] = []
        unit = rows = crc = 0
        while rows < entry.rows:
            prefix = os.pread(file, fmt.PREFIX.size, fmt.HEADER_BYTES + unit * stride)
            n, chunk_crc = fmt.parse_prefix(prefix)
            chunks.append((unit, n, chunk_crc))
            unit += fmt.chunk_units(n, stride)
            if fmt.HEADER_BYTES + unit * stride > size:
                raise fmt.FormatError(f"truncated after {rows} of {entry.rows} rows")
            rows += n
            crc = fmt.chain(crc, chunk_crc)
        if rows != entry.rows or crc != entry.crc:
            raise fmt.FormatError("the chunks are not those that the checkpoint names")
        return chunks


_REMEDY = "Resume from an older checkpoint (see DIR/checkpoints), or start a new run."


def explain(error: OSError, path: Path) -> PskdError:
    """What a user can do about a failed write."""
    remedy = "Free some space and start again: the run resumes from its last checkpoint."
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Check the run directory's file system."
    return PskdError(f"prediction store: cannot write {path}: {error.strerror}. {remedy}")
