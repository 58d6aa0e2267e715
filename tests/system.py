"""Real processes, and a real disk that is soon full."""

import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Makes real processes, forked from a clean one that has imported pskd once.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["pskd.checkpoint", "pskd.run_dir", "pskd.store.training", "pytest"]
)

needs_ip = pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")


class SmallDisk:
    """A small file system, of which a filler file takes as much as a test wants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def leave(self, free_bytes: int) -> None:
        """Leave so many bytes free, in whole pages."""
        self._filler.unlink(missing_ok=True)
        stat = os.statvfs(self.path)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - free_bytes)

    def fill(self) -> None:
        """Leave nothing, while others write as well."""
        with self._filler.open("wb", buffering=0) as file:
            for block_bytes in (1 << 16, 1 << 12):
                try:
                    while True:
                        file.write(bytes(block_bytes))
                except OSError:
                    continue

    def free_all(self) -> None:
        """Take the filler away."""
        self._filler.unlink()

    def make_read_only(self) -> None:
        """From now on every write fails, for root as well."""
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)


@contextmanager
def mounted(path: Path, size: str = "1M") -> Iterator[SmallDisk]:
    """A small disk at `path`, for tests that are marked `needs_root`."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)  # a failed test may hold a map
