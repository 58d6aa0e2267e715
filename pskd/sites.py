"""Which ranks see which run directory. Where nodes share none, files travel between them.

A site is a set of ranks that see one directory: all of them on a shared file system, else those of
a node. Rank 0's site holds the truth; the others receive what they lack, so that every rank reads
from its own disk, and a lost disk is filled again from any other.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pskd.errors import AgreedError, PskdError
from pskd.files import pwrite_all, sync_directory, write_atomically
from pskd.world import World

_BLOCK_BYTES = 1 << 24


class Sites:
    """The sites of a job. All ranks call `gather`, `spread` and `copy` together."""

    def __init__(self, world: World, leader_of_rank: list[int]) -> None:
        """`leader_of_rank`: for each rank, the lowest rank that sees the same directory."""
        self.rank, self.size = world.rank, world.size
        self.local_rank, self.local_size = world.local_rank, world.local_size
        self._world = world
        self._leader_of_rank = leader_of_rank
        leader = leader_of_rank[world.rank]
        self.colleagues = tuple(r for r, other in enumerate(leader_of_rank) if other == leader)
        self.leaders = sorted(set(leader_of_rank))
        self._group: Any = None
        if self.separate:
            self._group = dist.new_group(self.leaders, backend="gloo", timeout=world.timeout)

    @property
    def separate(self) -> bool:
        """Whether there is more than one directory."""
        return len(self.leaders) > 1

    @property
    def leads(self) -> bool:
        """Whether this rank looks after its directory."""
        return self.rank in self.leaders

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        return self._world.gather(value)

    def together(self) -> AbstractContextManager[None]:
        """Run a block that may fail on some ranks: if it fails on one, it fails on all."""
        return self._world.together()

    def spread(self, directory: Path, mine: Mapping[str, int]) -> None:
        """Bring files to the sites that lack them, or lack their end.

        mine: relative name -> bytes that this rank vouches for. Does nothing on one site.

        Raises:
            AgreedError: a file cannot be read or written.
        """
        if not self.separate:
            return
        held: dict[int, dict[str, int]] = {leader: {} for leader in self.leaders}
        for leader, report in zip(self._leader_of_rank, self.gather(dict(mine)), strict=True):
            for name, size in report.items():
                held[leader][name] = max(size, held[leader].get(name, 0))
        failure: OSError | None = None
        if self.leads:
            for name in sorted({name for files in held.values() for name in files}):
                sizes = {leader: files.get(name, 0) for leader, files in held.items()}
                # A failure must not leave the others waiting: the transfer goes on without effect.
                failure = self._transfer(directory / name, sizes, failure)
        with self._world.together():
            if failure is not None:
                raise PskdError(
                    f"{failure.filename or directory} cannot be brought to the nodes that have a "
                    f"run directory of their own: {failure.strerror}. Free some space and start "
                    "again: the run resumes from its last checkpoint."
                )

    def copy(self, directory: Path, names: Iterable[str]) -> None:
        """Give every site rank 0's version of small files; one that rank 0 lacks stays."""
        if not self.separate:
            return
        files = _contents(directory, names) if self.rank == 0 else {}
        self._write(directory, self._world.broadcast(files))

    def recover(self, directory: Path, names: Iterable[str], key: str) -> None:
        """If rank 0's site has lost `key`, give it the files of the site where `key` is longest."""
        if not self.separate:
            return
        found = self.gather(_contents(directory, names) if self.leads else {})
        best = max(found, key=lambda files: len(files.get(key, b"")))
        lost = self.rank == 0 and key not in found[0]
        self._write(directory, best if lost else {})

    def _write(self, directory: Path, files: dict[str, bytes]) -> None:
        with self._world.together():
            if self.leads:
                for name, content in files.items():
                    write_atomically(directory / name, content)

    def _transfer(
        self, path: Path, sizes: dict[int, int], failure: OSError | None
    ) -> OSError | None:
        """Send the bytes that some site lacks, from the first that has them all."""
        end, start = max(sizes.values()), min(sizes.values())
        source = next(leader for leader, size in sizes.items() if size == end)
        if start == end:
            return failure
        have, sends = sizes[self.rank], self.rank == source
        file = -1
        try:
            if failure is None:
                file = _open(path, write=not sends)
        except OSError as error:
            failure = error
        for first, last in _blocks(start, end):
            block = torch.zeros(last - first, dtype=torch.uint8)
            content = memoryview(block.numpy())  # type: ignore[arg-type]
            try:
                if failure is None and sends:
                    _read_all(file, path, content, first)
            except OSError as error:
                failure = error
            dist.broadcast(block, src=source, group=self._group)
            try:
                if failure is None and last > have:
                    skip = max(have - first, 0)
                    pwrite_all(file, content[skip:], first + skip)
            except OSError as error:
                failure = error
        if file >= 0:
            failure = _finish(file, failure, sync=not sends)
        return failure


def discover(world: World, sees_rank_0: bool, sees_own: bool) -> Sites:
    """Find the sites: who sees rank 0's directory, and who that of its node's first rank.

    Raises:
        AgreedError: a rank sees neither.
    """
    reports = world.gather((world.rank - world.local_rank, sees_rank_0, sees_own))
    leaders = []
    for rank, (first_of_node, shared, own) in enumerate(reports):
        if not (shared or own):
            raise AgreedError(
                f"rank {rank} sees neither the run directory of rank 0 nor that of rank "
                f"{first_of_node}, the first of its node. Give all ranks of a node one run "
                "directory: --run.dir on a disk that they share."
            )
        leaders.append(0 if shared else first_of_node)
    return Sites(world, leaders)


def _contents(directory: Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names if (directory / name).exists()}


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    for first in range(start, end, _BLOCK_BYTES):
        yield first, min(first + _BLOCK_BYTES, end)


def _open(path: Path, write: bool) -> int:
    if not write:
        return os.open(path, os.O_RDONLY)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    sync_directory(path.parent)
    sync_directory(path.parent.parent)
    return file


def _read_all(file: int, path: Path, content: memoryview, offset: int) -> None:
    while content:
        count = os.preadv(file, [content], offset)
        if count == 0:
            raise OSError(errno.EIO, "it is shorter than it was", str(path))
        content, offset = content[count:], offset + count


def _finish(file: int, failure: OSError | None, sync: bool) -> OSError | None:
    try:
        if sync:
            os.fsync(file)
    except OSError as error:
        failure = failure or error
    finally:
        os.close(file)
    return failure
