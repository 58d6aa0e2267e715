"""Loops for processes of their own: little to import, so that one starts in no time."""

import json
import os
import signal

import torch

from pskd.errors import PskdError
from pskd.order import epoch_order
from pskd.store import open_for_training


def rows_of(epoch, ids_B, past_BC, present_B):
    """Made predictions that remember all that came before."""
    new_BC = torch.softmax(((ids_B[:, None] + epoch) * torch.arange(1, 5) % 7).float(), dim=1)
    return torch.where(present_B[:, None], (new_BC + past_BC) / 2, new_BC)


def made_loop(directory, weights, epochs, die=None, every_step=False):
    """One that keeps its place in a file, in an epoch too if `every_step`; killed at `die`."""
    saved = {"epoch": 0, "step": 0, "store": None}
    if weights.exists():
        saved = json.loads(weights.read_text())

    def save(epoch, step, state=None):
        weights.write_text(json.dumps({"epoch": epoch, "step": step, "store": state}))

    def maybe_die(*here):
        if here == die:
            os.kill(os.getpid(), signal.SIGKILL)

    with open_for_training(directory, n=12, classes=4, encoding="float32") as store:
        if saved["store"] is not None:
            store.load_state_dict(saved["store"])
        for epoch in range(saved["epoch"], epochs):
            store.begin_epoch(epoch)
            maybe_die(epoch, "begun")
            first = saved["step"] if epoch == saved["epoch"] else 0
            for step in range(first, 3):
                ids_B = torch.from_numpy(epoch_order(0, epoch, 12)[4 * step : 4 * step + 4])
                store.remember(ids_B, rows_of(epoch, ids_B, *store.past(ids_B)))
                maybe_die(epoch, step)
                if every_step:
                    store.commit()
                    save(epoch, step + 1, store.state_dict())
            store.end_epoch()
            maybe_die(epoch, "ended")
            save(epoch + 1, 0, store.state_dict() if every_step else None)
            maybe_die(epoch, "saved")


def open_and_tell(directory, pipe):
    try:
        open_for_training(directory, n=6, classes=4)
    except PskdError as error:
        pipe.send(str(error))
