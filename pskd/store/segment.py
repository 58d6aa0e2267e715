"""One segment file: append as its only writer, read as one of many. Format: `format.py`.

Letters: B rows of a step, R bytes of an encoded row, U units of a segment, S bytes of a unit.
"""

import errno
import io
import mmap
import os
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pskd.errors import DamagedError, PskdError
from pskd.files import FormatError, VersionError, make_directory, pwrite_all, sync_directory
from pskd.order import Ids
from pskd.store import format as fmt
from pskd.store.format import Entry, Header

Bytes = npt.NDArray[np.uint8]
REMEDY = "Resume from an older checkpoint (see DIR/checkpoints), or start a new run."

_WARM_S = 3e-5  # for a call, be it of a single row
_WARM_S_PER_ROW = 4e-6  # a row of 2 kB comes from memory in 0.4 us, from a disk in 50 us or more
_BLOCK_BYTES = 1 << 23
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_T = TypeVar("_T")


class Chunk:
    """A reusable buffer in which chunks of up to `capacity` rows are put together."""

    def __init__(self, row_bytes: int, capacity: int, *, pinned: bool = False) -> None:
        self.capacity = capacity
        self._row_bytes = row_bytes
        self._stride = fmt.stride_of(row_bytes)
        size = fmt.chunk_units(capacity, self._stride) * self._stride
        self._bytes = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        self._view = self._rows(0)

    def rows_BR(self, rows: int) -> Tensor:
        """Where the encoded rows of the next chunk go: uint8 (B, R)."""
        if len(self._view) != rows:  # batches are mostly of one size
            self._view = self._rows(rows)
        return self._view

    def units_BS(self, rows: int) -> Tensor:
        """The same with what fills up each unit, which may hold anything: contiguous (B, S).

        Only into contiguous memory does a GPU copy without making the host wait.
        """
        return self._units(rows)[fmt.prefix_units(rows, self._stride) :]

    def seal(self, ids_B: Ids) -> tuple[memoryview, int]:
        """The bytes of a chunk whose rows are in place, and its crc."""
        rows = len(ids_B)
        units = self._units(rows).numpy()
        units[:, self._row_bytes :] = 0  # a larger chunk may have been here before
        flat = units.reshape(-1)
        ids_end = fmt.PREFIX.size + 8 * rows
        flat[fmt.PREFIX.size : ids_end] = ids_B.astype("<i8").view(np.uint8)
        flat[ids_end : fmt.prefix_units(rows, self._stride) * self._stride] = 0
        return flat.data, fmt.seal_chunk(flat.data, rows)

    def _rows(self, rows: int) -> Tensor:
        return self.units_BS(rows)[:, : self._row_bytes]

    def _units(self, rows: int) -> Tensor:
        size = fmt.chunk_units(rows, self._stride) * self._stride
        return self._bytes[:size].view(-1, self._stride)


class SegmentWriter:
    """Appends chunks with one `pwrite` each. A full disk is an error here, never a SIGBUS."""

    def __init__(self, path: Path, header: Header, expected_rows: int, name: str) -> None:
        """Create the file, which must not exist, and reserve room for `expected_rows` rows.

        Raises:
            PskdError: the disk has no room, or the directory cannot be written.
        """
        self._path = path
        self._row_bytes = header.row_bytes
        self._name = name
        self._end = fmt.HEADER_BYTES
        self._rows = 0
        self._crc = 0
        try:
            make_directory(path.parent)
            self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            try:
                os.posix_fallocate(self._file, 0, fmt.room_bytes(expected_rows, header.stride))
                pwrite_all(self._file, header.pack(), 0)
                sync_directory(path.parent)
                sync_directory(path.parent.parent)  # which another rank may just have made
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

    @property
    def end(self) -> int:
        """Bytes of the file that count."""
        return self._end

    def append(self, ids_B: Ids, bytes_BR: Bytes) -> None:
        """Append encoded rows, uint8 (B, R), as one chunk.

        Raises:
            PskdError: as `append_chunk`.
        """
        chunk = Chunk(self._row_bytes, len(ids_B))
        chunk.rows_BR(len(ids_B)).copy_(torch.from_numpy(bytes_BR))
        self.append_chunk(ids_B, chunk)

    def append_chunk(self, ids_B: Ids, chunk: Chunk) -> None:
        """Append a chunk whose rows are in place.

        Raises:
            PskdError: the disk is full or failed; what was appended before stays readable.
        """
        if not len(ids_B):
            return
        content, crc = chunk.seal(ids_B)
        try:
            pwrite_all(self._file, content, self._end)
        except OSError as error:
            raise explain(error, self._path) from error
        self._end += len(content)
        self._rows += len(ids_B)
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


class SegmentReader:
    """The first rows of a segment, as named by an entry: header and chunk chain are checked."""

    def __init__(self, path: Path, entry: Entry, *, for_read: bool = False) -> None:
        """Open and index. It takes one file descriptor, which the mapping owns; `read` another.

        Raises:
            DamagedError: missing, truncated or damaged; the message names file and defect.
            PskdError: it may not be read, is of another version, or too many files are open.
        """
        self.path = path
        self._file: io.FileIO | None = None
        try:
            with _open(path) as file:
                # Chunks' prefixes are far apart: what is between them is not to be read with them.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                self.header = fmt.parse_header(file.read(fmt.HEADER_BYTES))
                # Its owner may trim the room that it did not use at any time, but no named row.
                mapping = partial(mmap.mmap, file.fileno(), 0, prot=mmap.PROT_READ)
                self._map = _with_descriptors(mapping)
                # Checked before any access: touching a page beyond the end is a SIGBUS.
                self._chunks = self._scan(file, entry, len(self._map))
            if for_read:
                self._file = _open(path)
        except (PermissionError, VersionError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise PskdError(f"prediction store: {path}: {why}. {REMEDY}") from error
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
                raise PskdError(
                    f"prediction store: {path}: {error.strerror}; at most {limit} are allowed, and "
                    "two generations have a segment of each rank. Allow more: ulimit -Hn, or "
                    "docker run --ulimit nofile=65536."
                ) from error
            raise DamagedError(f"prediction store: {path}: {error.strerror}.", REMEDY) from error
        except FormatError as error:
            raise DamagedError(f"prediction store: {path}: {error}.", REMEDY) from error
        # Small reads in random order: without it each would read megabytes around its place.
        self._map.madvise(mmap.MADV_RANDOM)
        self._stride = self.header.stride
        units = (len(self._map) - fmt.HEADER_BYTES) // self._stride
        body = np.frombuffer(self._map, np.uint8, units * self._stride, fmt.HEADER_BYTES)
        self._units_US: Bytes = body.reshape(units, self._stride)
        self._cold = True

    @property
    def end(self) -> int:
        """Bytes of the file that the entry names."""
        if not self._chunks:
            return fmt.HEADER_BYTES
        unit, rows, _ = self._chunks[-1]
        return fmt.HEADER_BYTES + (unit + fmt.chunk_units(rows, self._stride)) * self._stride

    def ids_and_units(self) -> Iterator[tuple[Ids, npt.NDArray[np.int32]]]:
        """Chunk by chunk: sample ids int64 (B,), and the unit in which each row lies, int32."""
        flat = self._units_US.reshape(-1)
        for first_unit, rows, _ in self._chunks:
            start = first_unit * self._stride + fmt.PREFIX.size
            ids_B = flat[start : start + 8 * rows].view("<i8").astype(np.int64, copy=False)
            row_unit = first_unit + fmt.prefix_units(rows, self._stride)
            yield ids_B, np.arange(row_unit, row_unit + rows, dtype=np.int32)

    def gather(self, units_B: npt.NDArray[np.int32], out_BR: Bytes) -> None:
        """Rows of some units, through the mapping."""
        started = time.monotonic()
        if self._cold:
            # The kernel fetches all rows at once, instead of one after the other at each fault.
            self._announce(units_B)
        if out_BR.shape[1] == self._stride:
            self._units_US.take(units_B, axis=0, out=out_BR, mode="clip")  # "raise" would buffer
        else:
            out_BR[:] = self._units_US.take(units_B, axis=0, mode="clip")[:, : out_BR.shape[1]]
        self._cold = time.monotonic() - started > _WARM_S + _WARM_S_PER_ROW * len(units_B)

    def read(self, units_B: npt.NDArray[np.int32], out_BR: Bytes) -> None:
        """Rows of some units, one system call each: for file systems that map badly.

        Raises:
            DamagedError: the file has become shorter.
            PskdError: the file cannot be read.
        """
        assert self._file is not None, "it was not opened for this"
        try:
            for unit, row_R in zip(units_B.tolist(), out_BR, strict=True):
                start = fmt.HEADER_BYTES + unit * self._stride
                if os.preadv(self._file.fileno(), [row_R], start) != len(row_R):
                    raise DamagedError(
                        f"prediction store: {self.path}: cut short within the row at byte {start}.",
                        REMEDY,
                    )
        except OSError as error:
            raise PskdError(f"prediction store: {self.path}: {error.strerror}. {REMEDY}") from error

    def warm_up(self, limit_bytes: int, stop: Callable[[], bool]) -> int:
        """Read from front to back, into the page cache, until told to stop; returns the bytes."""
        block = memoryview(bytearray(_BLOCK_BYTES))
        end = min(self.end, limit_bytes)
        with _open(self.path) as file:
            for start in range(0, end, _BLOCK_BYTES):
                if stop():
                    break
                os.preadv(file.fileno(), [block], start)
        return end

    def verify(self) -> None:
        """Compare every chunk with its crc.

        Raises:
            DamagedError: names the file and the rows of the damaged chunk.
        """
        row = 0
        for first_unit, rows, crc in self._chunks:
            last = first_unit + fmt.chunk_units(rows, self._stride)
            chunk = self._units_US[first_unit:last].reshape(-1).data
            if zlib.crc32(chunk[fmt.CRC_FROM :]) != crc:
                raise DamagedError(
                    f"prediction store: {self.path}: rows {row} to {row + rows - 1} are damaged "
                    "(crc differs).",
                    REMEDY,
                )
            row += rows

    def _scan(self, file: io.FileIO, entry: Entry, size: int) -> list[tuple[int, int, int]]:
        """(first unit, rows, crc) of each chunk that the entry names."""
        stride = self.header.stride
        chunks: list[tuple[int, int, int]] = []
        unit = rows = crc = 0
        while rows < entry.rows:
            start = fmt.HEADER_BYTES + unit * stride
            prefix = os.pread(file.fileno(), fmt.PREFIX.size, start)
            n, chunk_crc = fmt.parse_prefix(prefix)
            chunks.append((unit, n, chunk_crc))
            unit += fmt.chunk_units(n, stride)
            if fmt.HEADER_BYTES + unit * stride > size:
                raise FormatError(f"truncated after {rows} of {entry.rows} rows")
            rows += n
            crc = fmt.chain(crc, chunk_crc)
        if rows != entry.rows or crc != entry.crc:
            raise FormatError("the chunks are not those that the checkpoint names")
        return chunks

    def _announce(self, units_B: npt.NDArray[np.int32]) -> None:
        for start in (fmt.HEADER_BYTES + units_B.astype(np.int64) * self._stride).tolist():
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + self._stride - page)


def _open(path: Path) -> io.FileIO:
    """To read."""
    return _with_descriptors(partial(io.FileIO, path))


def _with_descriptors(take: Callable[[], _T]) -> _T:
    """If too many files are open for the soft limit, it is raised up to the hard one."""
    try:
        return take()
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return take()


def give_back_room(path: Path) -> None:
    """Cut off what a killed writer had reserved beyond its last chunk; no chunk is touched.

    Nothing is cut off what another run has as well: it may be writing there.

    Raises:
        PskdError: the file cannot be written.
    """
    try:
        with path.open("r+b", buffering=0) as file:
            stride = fmt.parse_header(file.read(fmt.HEADER_BYTES)).stride
            found = path.stat()
            size, end = found.st_size, fmt.HEADER_BYTES
            if found.st_nlink > 1:
                return
            while end < size:
                try:
                    rows, _ = fmt.parse_prefix(os.pread(file.fileno(), fmt.PREFIX.size, end))
                except FormatError:
                    break
                end += fmt.chunk_units(rows, stride) * stride
            if end < size:
                os.ftruncate(file.fileno(), end)
    except OSError as error:
        raise explain(error, path) from error


def explain(error: OSError, path: Path) -> PskdError:
    """What a user can do about a failed write."""
    remedy = "Free some space and start again: the run resumes from its last checkpoint."
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Check the run directory's file system."
    return PskdError(f"prediction store: cannot write {path}: {error.strerror}. {remedy}")
