"""The store of past predictions: a visit-order log on disk.

Each rank appends the rows it computes to a segment file of its own, with the ids beside them; the
next epoch reads by id through an index. One writer a file, sequential writes; any world size
reads what another wrote.

`open_for_training` is for a training loop of one's own, `open_generation` for reading what any
loop or run has left.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pskd.store.generation import open_generation
    from pskd.store.training import open_for_training

__all__ = ["open_for_training", "open_generation"]

_MODULES = {
    "open_for_training": "pskd.store.training",
    "open_generation": "pskd.store.generation",
}


def __getattr__(name: str) -> Any:
    """Import torch only when a store is opened: the configuration reads the registry."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
