"""The store of past predictions: a visit-order log on disk.

Each rank appends the rows it computes to a segment file of its own, with the ids beside them; the
next epoch reads by id through an index. One writer a file, sequential writes; any world size
reads what another wrote.
"""

from typing import Any

__all__ = ["open_generation"]


def __getattr__(name: str) -> Any:
    """Import torch only when a generation is opened: the configuration reads the registry."""
    if name in __all__:
        from pskd.store.generation import open_generation  # noqa: PLC0415

        return open_generation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
