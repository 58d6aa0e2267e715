"""Where a run directory lies, or will lie: file system, room, locks, and who else sees it."""

import fcntl
import os
from pathlib import Path
from typing import NamedTuple

import psutil

from pskd.disk import free_bytes
from pskd.doctor.page import OK, WARNING, WRONG, Line
from pskd.errors import PskdError
from pskd.files import existing
from pskd.run_dir import RunDir
from pskd.words import readable_bytes

# Not there any more after the container or the machine was started again.
_PASSING = {
    "overlay": "It is lost with the container: mount a volume there (docker run -v).",
    "tmpfs": "It lies in memory and is lost at a reboot: use a disk for a run of worth.",
    "ramfs": "It lies in memory and is lost at a reboot: use a disk for a run of worth.",
}
_ELSEWHERE = "Choose another with --run.dir, or change its permissions."


class Mount(NamedTuple):
    """What is mounted where. kind: ext4, nfs4, overlay, ..."""

    kind: str
    point: Path
    source: str


def mount_of(path: Path) -> Mount:
    """The mount that an existing path lies on: the innermost; of those on one point, the last."""
    path = path.resolve()
    mounts = [
        Mount(found.fstype, Path(found.mountpoint), found.device)
        for found in psutil.disk_partitions(all=True)
        if path.is_relative_to(found.mountpoint)
    ]
    depth = max(len(mount.point.parts) for mount in mounts)  # everything lies on /
    return [mount for mount in mounts if len(mount.point.parts) == depth][-1]


def file_system(path: Path) -> Line:
    """Its kind, and whether it outlives the container or the machine."""
    try:
        mount = mount_of(existing(path))
    except OSError as error:
        return Line("file system", WARNING, f"{path}: {error.strerror}")
    text = f"{mount.kind}, {mount.source} at {mount.point}"
    passing = _PASSING.get(mount.kind)
    if passing is not None:
        return Line("file system", WARNING, text, passing, alike=True)
    return Line("file system", OK, text, alike=True)


def leave_mark(path: Path, token: str) -> tuple[Line, Path | None]:
    """Whether one can write and lock there, and a file by which others see that they see it.

    Who called removes it.
    """
    directory: Path | None = None
    mark: Path | None = None
    try:
        directory = existing(path)
        if not directory.is_dir():
            return Line("run directory", WRONG, f"{path}: {directory} is a file", _ELSEWHERE), None
        mark = directory / _mark(token)
        with mark.open("w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                remedy = "A run needs it, to own its directory: mount with locks (Lustre: -o flock)"
                text = f"{path}: no file can be locked there: {error.strerror}"
                return Line("run directory", WRONG, text, f"{remedy}, or use another disk."), mark
        if path.exists():
            RunDir(path).check_free()
    except OSError as error:
        text = f"{path} cannot be written: {error.strerror}"
        return Line("run directory", WRONG, text, _ELSEWHERE), mark
    except PskdError as error:
        return Line("run directory", WRONG, str(error)), mark
    state = "can be written" if path.exists() else "is not there yet, and can be made"
    return Line("run directory", OK, f"{path} {state}"), mark


def sees(path: Path, token: str) -> bool:
    """Whether this process sees the mark that another one left for this run directory."""
    try:
        return (existing(path) / _mark(token)).exists()
    except OSError:
        return False


def room(path: Path) -> Line:
    """What is free, where no training is configured to compare it with."""
    try:
        free = readable_bytes(free_bytes(path))
    except OSError as error:
        return Line("disk", WARNING, f"{path}: {error.strerror}")
    return Line("disk", OK, f"{free} are free; with a recipe, what its run needs is said as well")


def _mark(token: str) -> str:
    return f".pskd-doctor-{token}.tmp"  # left by a kill, the next start takes it away
