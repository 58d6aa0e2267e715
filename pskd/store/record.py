"""What a directory of past predictions says of itself, for loops that have no run directory.

store.json     what its rows are, how often it was opened, what checkpoints name of it
lock           held by rank 0 of the loop that writes it
gen-<epoch>/   as everywhere
"""

import fcntl
import os
import platform
import secrets
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

from pskd import files
from pskd.errors import PskdError

RECORD = "store.json"

_VERSION = 1
_LOCK_WAIT_S = 2.0  # a killed owner may still be on its way out
_OWNED = WeakValueDictionary[tuple[int, str], IO[str]]()  # (process, directory) -> its lock


@dataclass(frozen=True)
class Record:
    """Of a directory.

    dataset: what the user calls the samples. run: written into every segment. starts: how often it
    was opened. token: of the last time. retained: states of the user's checkpoints.
    """

    n: int
    classes: int
    encoding: str
    dataset: str
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    starts: int = 0
    token: str = ""
    retained: list[dict[str, Any]] = field(default_factory=list)

    def expect(self, wanted: "Record", directory: Path) -> None:
        """Refuse to use the directory for something else.

        Raises:
            PskdError: names each difference.
        """
        changes = [
            f"{name} {getattr(self, name)!r} and not {getattr(wanted, name)!r}"
            for name in ("n", "classes", "encoding", "dataset")
            if getattr(self, name) != getattr(wanted, name)
        ]
        if changes:
            raise PskdError(
                f"past predictions in {directory} are for {', '.join(changes)}. "
                "Open them as they are, or name another directory."
            )


def read(directory: Path) -> Record | None:
    """The record in a directory, if there is one.

    Raises:
        PskdError: it cannot be read.
    """
    try:
        return Record(**files.read_manifest(directory / RECORD, _VERSION))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PskdError(
            f"past predictions: {error}. Restore the file, or name another directory."
        ) from error


def write(directory: Path, record: Record) -> None:
    """Replace the record.

    Raises:
        PskdError: the disk is full, or cannot be written.
    """
    try:
        files.write_manifest(directory / RECORD, _VERSION, asdict(record))
    except OSError as error:
        raise _unwritable(directory, error) from error


def claim(directory: Path, wanted: Record) -> Record:
    """Count one more start in a directory that this process owns; makes the record at the first.

    Raises:
        PskdError: the directory holds other predictions, or cannot be written.
    """
    record = read(directory)
    if record is None:
        if next(directory.glob("gen-*"), None) is not None:
            raise PskdError(
                f"{directory} holds predictions of a run of the trainer ({RECORD} is missing). "
                "Name another directory."
            )
        record = wanted
    record.expect(wanted, directory)
    record = replace(record, starts=record.starts + 1, token=secrets.token_hex(8))
    write(directory, record)
    return record


def own(directory: Path) -> IO[str]:
    """Make the directory and own it until the file that this returns is closed.

    By a POSIX lock, which the workers of a loader do not inherit: it ends with this process.

    Raises:
        PskdError: another process owns it, or it cannot be written.
    """
    mine = _OWNED.get((os.getpid(), os.path.realpath(directory)))
    if mine is not None and not mine.closed:
        # Closing any descriptor of the file, a second one too, would give up the lock.
        raise PskdError(
            f"past predictions in {directory} are in use by this process: close() what was opened "
            "before, or name another directory."
        )
    try:
        files.make_directory(directory)
        lock = (directory / "lock").open("a+")
    except OSError as error:
        raise _unwritable(directory, error) from error
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                lock.seek(0)
                owner = lock.read().strip() or "another process"
                lock.close()
                raise PskdError(
                    f"past predictions in {directory} are in use by {owner}. "
                    "Stop it, or name another directory."
                ) from error
            time.sleep(0.1)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on host {platform.node()}\n")
    lock.flush()
    _OWNED[os.getpid(), os.path.realpath(directory)] = lock
    return lock


def _unwritable(directory: Path, error: OSError) -> PskdError:
    return PskdError(
        f"past predictions: {directory} cannot be written: {error.strerror}. "
        "Free some space or change its permissions, or name another directory."
    )
