"""The bytes of a segment file. Version 2, little-endian.

    0      magic "PSKDSEG" + version byte
    8      u32 length of the JSON, u32 crc32 of the JSON
    16     JSON (utf-8): who wrote what, see `Header`; zeros up to 4096
    4096   chunks, one after the other; the rest of the file is preallocated zeros

The body is a matrix of units of `stride` bytes (a row, rounded up to 16), so that a row's place is
unit number x stride and reading rows by id is one gather. A chunk is what one step appended:

    u32 magic "CHNK", u32 crc32 of all that follows in the chunk, u32 rows n, u32 zero
    n x i64 sample ids, zeros up to a whole unit
    n units: the encoded rows

A segment is written once, front to back, by one process, and never reopened for writing. How many
of its rows count is not said by the file but by who names it: an `Entry` (segment, rows, crc), kept
in a generation's manifest and in checkpoints. Bytes beyond those rows are ignored. The crc of an
entry is the crc32 over the chunk crcs (u32 each) of those rows, so naming a prefix is free.

Of several rows with one id in a generation the last wins: in the order of the manifest's segments,
then of the rows.
"""

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import NamedTuple

from pskd.files import HEAD_BYTES, FormatError, pack_head, parse_head, parse_text

VERSION = 2
HEADER_BYTES = 4096
PREFIX = struct.Struct("<4sIII")  # magic, crc, rows, zero
CRC_FROM = 8  # the crc covers the chunk from here on

_MAGIC = b"PSKDSEG" + bytes([VERSION])
_CHUNK_MAGIC = b"CHNK"
_ID_BYTES = 8


class Entry(NamedTuple):
    """The first `rows` rows of a segment; `crc` chains the crcs of their chunks."""

    segment: str
    rows: int
    crc: int


@dataclass(frozen=True)
class Header:
    """What a segment's rows are.

    run: which run wrote it. identity: of the samples (fingerprint of the data set). encoding: name
    of the row encoding. start: which start of the run; rank, world: by which process of how many.
    """

    run: str
    identity: str
    epoch: int
    start: int
    rank: int
    world: int
    n: int
    classes: int
    encoding: str
    row_bytes: int

    @property
    def stride(self) -> int:
        """Bytes of a unit."""
        return stride_of(self.row_bytes)

    def pack(self) -> bytes:
        """The first 4096 bytes of the file."""
        text = json.dumps(asdict(self)).encode()
        head = pack_head(_MAGIC, text)
        if len(head) > HEADER_BYTES:
            raise FormatError(f"header of {len(head)} bytes exceeds {HEADER_BYTES}")
        return head.ljust(HEADER_BYTES, b"\0")


def parse_header(head: bytes) -> Header:
    """Read and check a header.

    Raises:
        VersionError: of another version.
        FormatError: too short, not a segment, or damaged.
    """
    if len(head) < HEADER_BYTES:
        raise FormatError(f"only {len(head)} of {HEADER_BYTES} header bytes")
    length, crc = parse_head(head, _MAGIC, "a PSKD segment")
    return Header(**parse_text(head[HEAD_BYTES : HEAD_BYTES + length], crc))


def stride_of(row_bytes: int) -> int:
    """Bytes of a unit that holds a row."""
    return -(-row_bytes // 16) * 16


def prefix_units(rows: int, stride: int) -> int:
    """Units that a chunk's prefix and ids take."""
    return -(-(PREFIX.size + _ID_BYTES * rows) // stride)


def chunk_units(rows: int, stride: int) -> int:
    """Units of a whole chunk."""
    return prefix_units(rows, stride) + rows


def room_bytes(rows: int, stride: int) -> int:
    """What to reserve for a segment of so many rows, in chunks of 32 or more."""
    return HEADER_BYTES + chunk_units(rows, stride) * stride + rows // 32 * stride


def seal_chunk(chunk: memoryview, rows: int) -> int:
    """Write the prefix of a chunk whose ids and rows are in place; returns its crc."""
    PREFIX.pack_into(chunk, 0, _CHUNK_MAGIC, 0, rows, 0)
    crc = zlib.crc32(chunk[CRC_FROM:])
    PREFIX.pack_into(chunk, 0, _CHUNK_MAGIC, crc, rows, 0)
    return crc


def parse_prefix(prefix: bytes) -> tuple[int, int]:
    """(rows, crc) of the chunk that starts here.

    Raises:
        FormatError: no chunk starts here.
    """
    if len(prefix) < PREFIX.size:
        raise FormatError("truncated")
    magic, crc, rows, zero = PREFIX.unpack_from(prefix)
    if magic != _CHUNK_MAGIC or zero != 0 or rows == 0:
        raise FormatError("no chunk where one is expected")
    return rows, crc


def chain(crc: int, chunk_crc: int) -> int:
    """The crc of an entry, extended by one chunk."""
    return zlib.crc32(chunk_crc.to_bytes(4, "little"), crc)
