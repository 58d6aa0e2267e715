"""The bytes of an index file. Version 1, little-endian.

    0      magic "PSKDIDX" + version byte
    8      u32 length of the JSON, u32 crc32 of the JSON
    16     JSON (ASCII), zeros up to a multiple of 64
    then   arrays, each at a multiple of 64, zeros between them; the file ends with the last one

The JSON is an object; its `arrays` lists [name, dtype, offset, count], offsets counted from the
first array on. What else it holds, and what the arrays mean, is said in `index`.

A file is read by mapping it: opening costs the JSON, however many entries there are. A file of
another size than its JSON says is refused before it is mapped, for a page beyond the end would
kill the process (SIGBUS).
"""

import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pskd.files import HEAD_BYTES, FormatError, pack_head, parse_head, parse_text

VERSION = 1
_MAGIC = b"PSKDIDX" + bytes([VERSION])
_ALIGNMENT = 64

Arrays = dict[str, npt.NDArray[Any]]


def pack(facts: dict[str, Any], arrays: Arrays) -> bytes:
    """The content of a file. facts: JSON without the key `arrays`; arrays: little-endian."""
    table: list[tuple[str, str, int, int]] = []
    body: list[bytes] = []
    end = 0
    for name, array in arrays.items():
        gap = _padding(end)
        table.append((name, array.dtype.str, end + gap, len(array)))
        body += [bytes(gap), array.tobytes()]
        end += gap + array.nbytes
    text = json.dumps({**facts, "arrays": table}).encode("ascii")
    head = pack_head(_MAGIC, text)
    return b"".join([head, bytes(_padding(len(head))), *body])


def read(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Facts and arrays of a file. The arrays are read-only views of one shared mapping.

    Raises:
        OSError: it cannot be opened.
        FormatError: not an index, another version, or damaged.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        facts, start = _parse_head(file.read(HEAD_BYTES), size, file.read)
        ends = [offset + np.dtype(kind).itemsize * n for _, kind, offset, n in facts["arrays"]]
        if size != start + max(ends):
            raise FormatError(f"damaged: {size} bytes instead of {start + max(ends)}")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {
        name: np.frombuffer(mapped, kind, count, start + offset)
        for name, kind, offset, count in facts.pop("arrays")
    }
    return facts, arrays


def is_foreign(path: Path) -> bool:
    """Whether a file is there that never was an index."""
    try:
        with path.open("rb") as file:
            return not _MAGIC.startswith(file.read(len(_MAGIC) - 1))
    except FileNotFoundError:
        return False


def _parse_head(head: bytes, size: int, more: Callable[[int], bytes]) -> tuple[dict[str, Any], int]:
    """The JSON, which `more` reads, and where the arrays begin."""
    length, crc = parse_head(head, _MAGIC, "an index")
    facts = parse_text(more(min(length, size)), crc)
    end = HEAD_BYTES + length
    return facts, end + _padding(end)


def _padding(position: int) -> int:
    return -position % _ALIGNMENT
