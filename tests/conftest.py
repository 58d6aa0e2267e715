"""Fixtures that several files share."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(W)`: W processes joined over gloo, started once and used by many tests."""
    pools: dict[int, Pool] = {}

    def of(size: int) -> Pool:
        if size not in pools:
            pools[size] = Pool(size)
        return pools[size]

    yield of
    for each in pools.values():
        each.close()


@pytest.fixture
def read_only_directory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system mounted read-only."""
    path = tmp_path / "read-only"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1M", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)
