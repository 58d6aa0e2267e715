"""The ranks of torch.distributed, as the processes that write a store together."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pskd import launch
from pskd.errors import PskdError
from pskd.store.peers import Alone, Peers


class Ranks:
    """All ranks of the default process group; they see one directory."""

    def __init__(self) -> None:
        """Collective: makes a gloo group for host values, whatever the gradients travel by."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.colleagues = tuple(range(self.size))
        if "MASTER_ADDR" in os.environ:
            launch.choose_interface()
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        hosts = self.gather(platform.node())
        mine = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        self.local_rank, self.local_size = mine.index(self.rank), len(mine)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def spread(self, directory: Path, mine: Mapping[str, int]) -> None:
        """There is one directory."""


def find_peers() -> Peers:
    """The ranks that torch.distributed has joined; a single process if it was not initialised.

    Raises:
        PskdError: a launcher has started several processes, and nobody has joined them.
    """
    if dist.is_available() and dist.is_initialized():
        return Ranks()
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise PskdError(
            f"a launcher has started {started} processes (WORLD_SIZE), but torch.distributed is "
            "not initialised. Call torch.distributed.init_process_group() before this."
        )
    return Alone()
