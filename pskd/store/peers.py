"""The processes that write a store together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Peers(Protocol):
    """What the store asks of them. All ranks call `gather` and `spread` together.

    local_rank, local_size: place among the ranks of this node. colleagues: the ranks that see the
    same directory as this one, itself included, ascending; all ranks if the directory is shared.
    """

    @property
    def rank(self) -> int:
        """Of this process, 0-based."""
        ...

    @property
    def size(self) -> int:
        """How many processes write."""
        ...

    @property
    def local_rank(self) -> int:
        """On this node, 0-based."""
        ...

    @property
    def local_size(self) -> int:
        """How many processes on this node."""
        ...

    @property
    def colleagues(self) -> tuple[int, ...]:
        """Ranks that see this rank's directory."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank; returns when all have called it."""
        ...

    def spread(self, directory: Path, mine: Mapping[str, int]) -> None:
        """Bring files to the directories that lack them; nothing to do if all ranks see one.

        mine: relative name -> bytes that this rank vouches for, in its `directory`. Afterwards
        every directory holds the longest version of each.

        Raises:
            PskdError: a file cannot be read or written; on every rank.
        """
        ...


class Alone:
    """A single process."""

    rank, size = 0, 1
    local_rank, local_size = 0, 1
    colleagues: tuple[int, ...] = (0,)

    def gather(self, value: Any) -> list[Any]:
        """Its own value."""
        return [value]

    def spread(self, directory: Path, mine: Mapping[str, int]) -> None:
        """There is one directory."""
