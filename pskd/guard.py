"""What all ranks must know after each step, without waiting: stop requests, bad losses, a
checkpoint that is due by rank 0's clock.

The flags of step s are reduced asynchronously and read while step s + 1 runs, before the rows of
step s reach the disk.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pskd.world import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Verdict(NamedTuple):
    """Of one step, equal on all ranks.

    stop: some rank was asked to. bad: some loss is not finite. loss: mean of the global batch.
    save: some rank (rank 0) found that it is time for a checkpoint. absent: samples of the global
    batch that a grey image stood in for.
    """

    stop: bool
    bad: bool
    loss: float
    save: bool
    absent: int


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the stop signals into a request while the block runs.

        Only around the training loop: torchrun sends the same SIGTERM when a peer has failed,
        and a process that does not train yet should simply end. If the block fails, signals stay
        mere requests: the process is about to end and must get to say why.
        """

        def note(number: int, frame: FrameType | None) -> None:
            del frame
            self.signal = signal.Signals(number).name

        before = {s: signal.signal(s, note) for s in SIGNALS}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)


class Guard:
    """Reduces the flags of each step over all ranks, one step behind."""

    def __init__(self, world: World) -> None:
        self._size = world.size
        # On a GPU the loss is on the device, so it is reduced there, by NCCL.
        self._on_gpu = world.device.type == "cuda"
        self._group = None if self._on_gpu else world.control
        self._flags = torch.zeros(5, dtype=torch.float64, device=world.device)
        self._host = torch.zeros(5, dtype=torch.float64, pin_memory=self._on_gpu)
        self._copied: torch.Event | None = torch.Event("cuda") if self._on_gpu else None
        self._work: dist.Work | None = None

    def submit(self, stop: bool, save: bool, loss: Tensor, absent: int) -> None:
        """Send this rank's share of a step; `loss`: scalar on the device, mean over ranks."""
        loss = loss.detach().double()
        bad = (~torch.isfinite(loss)).double()
        told = (torch.full_like(loss, float(value)) for value in (stop, save, absent))
        self._flags = torch.stack((*told, bad, loss))
        self._work = dist.all_reduce(self._flags, group=self._group, async_op=True)
        if self._copied is not None and self._work is not None:
            self._work.wait()  # the stream waits, the host does not
            self._host.copy_(self._flags, non_blocking=True)
            self._copied.record()

    def read(self) -> Verdict:
        """The verdict on the step that was submitted last."""
        assert self._work is not None, "submit comes first"
        if self._copied is not None:
            self._copied.synchronize()
        else:
            self._work.wait()
            self._host = self._flags
        self._work = None
        stop, save, absent, bad, loss = self._host.tolist()
        return Verdict(stop > 0, bad > 0, loss / self._size, save > 0, int(absent))
