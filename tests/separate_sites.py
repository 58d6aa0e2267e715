"""A small training, checked as it goes, of ranks that may see no directory in common."""

import numpy as np
import pytest
import torch

from pskd import mirror
from pskd.checkpoint import Checkpoints, Position
from pskd.errors import AgreedError
from pskd.order import partition
from pskd.sites import Sites
from pskd.store.sections import StoreSection
from pskd.store.store import Store

N, BATCH, STEPS, EPOCHS = 60, 12, 4, 3  # an epoch skips 12 samples
LEADERS = [[0, 1], [0, 0, 2, 2], [0, 1, 2, 3]]
apart = pytest.mark.parametrize("leaders", LEADERS, ids=str)


def order_of(epoch):
    return np.random.default_rng(epoch).permutation(N)[: BATCH * STEPS]


def rows_of(epoch, classes):
    generator = torch.Generator().manual_seed(epoch)
    return torch.softmax(4 * torch.randn(N, classes, generator=generator), dim=1)


def assert_past(store, epoch, classes):
    """This rank reads every row of the epoch before, or of an earlier one."""
    want, seen = torch.zeros(N, classes), torch.zeros(N, dtype=torch.bool)
    for earlier in range(epoch):
        ids = order_of(earlier)
        want[ids], seen[ids] = rows_of(earlier, classes)[ids], True
    rows, present = store.past(np.arange(N))
    assert torch.equal(present, seen)
    assert torch.equal(rows, want)


def site_of(root, leader):
    return root / f"site-{leader}"


def go_on(world, root, leaders, start, stop=None, classes=5):
    """Train like the trainer, from the newest checkpoint to the end or to position `stop`.

    A message of what all ranks failed with, or None.
    """
    here = Sites(world, leaders)
    directory = site_of(root, leaders[world.rank])
    checkpoints = Checkpoints(directory / "checkpoints", keep=2)
    store = Store(
        directory / "store",
        n=N,
        classes=classes,
        identity="data",
        run="run",
        start=start,
        peers=here,
        options=StoreSection("float32"),
        device=torch.device("cpu"),
    )
    checkpoints.register("store", store)

    def save(position):
        store.commit()
        with world.together():
            if world.rank == 0:
                checkpoints.save(position)
        mirror.send(checkpoints, position, 0, here)
        if here.leads:
            store.retain(m["store"] for m in checkpoints.retain())
        return position == stop

    def run():
        with world.together():
            if here.leads:
                directory.mkdir(exist_ok=True)
                checkpoints.prepare()
        mirror.catch_up(checkpoints, here)
        position = Position(0, 0)
        if (name := world.broadcast(checkpoints.latest())) is not None:
            position, state = checkpoints.read(name)
            store.receive(state["store"])
            with world.together():
                checkpoints.restore(state)
        if position == stop:
            return
        first = position.step
        for epoch in range(position.epoch, EPOCHS):
            store.begin_epoch(epoch)
            assert_past(store, epoch, classes)
            order, rows = order_of(epoch), rows_of(epoch, classes)
            for step in range(first, STEPS):
                low, high = partition(BATCH, world.size)[world.rank :][:2]
                ids = order[BATCH * step + low : BATCH * step + high]
                store.remember(ids, rows[ids])
                if step % 2 and save(Position(epoch, step + 1)):
                    return
            first = 0
            store.begin_epoch(epoch + 1)
            if save(Position(epoch + 1, 0)):
                return

    try:
        run()
    except AgreedError as error:
        return str(error)
    finally:
        store.close()
    return None
