"""Durable files: what is written here is there after a kill or a power cut, whole or not at all."""

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from pskd.errors import PskdError

_WRITTEN_AGAIN = ("result.json", "preprocessing.json")  # by the next start, though nothing is left


HEAD_BYTES = 16
_LENGTHS = struct.Struct("<II")


class FormatError(ValueError):
    """The bytes are not what the format says; the message names what differs."""


class VersionError(FormatError):
    """Whole, but of another version of the program."""


def pack_head(magic: bytes, text: bytes) -> bytes:
    """Magic (7 bytes and a version), u32 length and u32 crc32 of a JSON text, and the text."""
    return magic + _LENGTHS.pack(len(text), zlib.crc32(text)) + text


def parse_head(head: bytes, magic: bytes, what: str) -> tuple[int, int]:
    """(length, crc) of the JSON text that follows the first 16 bytes. what: the kind of file.

    Raises:
        FormatError: of another kind.
        VersionError: of another version.
    """
    if not magic.startswith(head[:7]):
        raise FormatError(f"not {what} (magic differs)")
    if len(head) < HEAD_BYTES:
        raise FormatError(f"damaged: only {len(head)} bytes")
    if head[7] != magic[7]:
        raise VersionError(f"format version {head[7]}, this program reads version {magic[7]}")
    length, crc = _LENGTHS.unpack_from(head, len(magic))
    return length, crc


def parse_text(text: bytes, crc: int) -> Any:
    """The JSON of a head.

    Raises:
        FormatError: damaged.
    """
    if not text or zlib.crc32(text) != crc:
        raise FormatError("damaged header (crc differs)")
    return json.loads(text)


def pwrite_all(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it to a descriptor, however little a call takes."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace `path` by `content`: written aside, fsynced, renamed, directory fsynced.

    Raises:
        OSError: no space, no permission; `path` is then unchanged.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # a failed write names nothing
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """As `write_atomically`, of a JSON value."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """As `write_atomically`, of an .npz file, which `numpy.load` reads."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomically(path, content.getbuffer())


@contextmanager
def named_by(flag: str, path: Path) -> Iterator[None]:
    """What is written in here goes to a path that a flag can change.

    Raises:
        PskdError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise PskdError(
            f"{path} cannot be written: {error.strerror}. Name another place with {flag}."
        ) from error


def read_run_json(path: Path) -> Any:
    """The content of a JSON file of a run, or None if there is none.

    Raises:
        PskdError: it cannot be read, or is damaged: says what to do.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise PskdError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        remedy = "Restore it from a copy."
        if path.name in _WRITTEN_AGAIN:
            remedy = written_again(path.parent)
        raise PskdError(f"{path} cannot be read ({error}). {remedy}") from error


def written_again(run: Path) -> str:
    """The remedy for a damaged file of a run which the next start writes anew."""
    return f"Remove it: {rewritten(run)}"


def rewritten(run: Path) -> str:
    """The remedy if such a file is missing."""
    return f"`train.py --run.dir {run}` writes it again, without training again what is trained."


def yaml_defect(error: Exception) -> str:
    """What is wrong with a YAML file, and where, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def existing(path: Path) -> Path:
    """The path itself if it is there, else the nearest directory above it that is."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def make_directory(path: Path) -> None:
    """Make it, and what is missing above it; their names are durable."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_directory(made.parent)


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(path: Path, version: int, content: dict[str, Any]) -> None:
    """Replace a JSON file that carries its version and the sha256 of its content."""
    sealed = {"version": version, "content": content, "sha256": _seal(content)}
    write_atomically(path, json.dumps(sealed).encode())


def read_manifest(path: Path, version: int) -> dict[str, Any]:
    """The content of a file that `write_manifest` wrote.

    Raises:
        OSError: it cannot be read.
        VersionError: of another version.
        ValueError: damaged.
    """
    try:
        sealed = json.loads(path.read_text())
        if sealed["version"] != version:
            raise VersionError(
                f"{path} has version {sealed['version']}, this program reads version {version}"
            )
        content: dict[str, Any] = sealed["content"]
        whole = sealed["sha256"] == _seal(content)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged")
    return content


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
