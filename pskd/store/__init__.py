"""The store of past predictions: a visit-order log on disk.

Each rank appends the rows it computes to a segment file of its own, with the ids beside them; the
next epoch reads by id through an index. One writer a file, sequential writes; any world size
reads what another wrote.
"""

from pskd.store.generation import open_generation

__all__ = ["open_generation"]
