"""Reads the rows of the next step on a thread of its own, into reused buffers.

On a GPU the thread gathers encoded rows into pinned memory, and the training thread starts their
copy and their decoding on its stream; on the CPU the thread decodes as well.

Letters: B samples of a step, C classes, R bytes of an encoded row.
"""

import time

import numpy as np
import torch
from torch import Tensor

from pskd.order import Ids
from pskd.store.generation import Generation
from pskd.store.waits import Waits
from pskd.store.worker import Task, Worker

_BUFFERS = 2  # one in use by the step, one that is being filled


class _Buffer:
    """Host memory for the encoded rows of one step."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.copied = torch.Event("cuda") if self._gpu else None

    def room(self, rows: int, row_bytes: int) -> tuple[Tensor, Tensor]:
        """For the rows, uint8 (B, R), and their presence, bool (B,).

        Waits until a GPU has copied what was there.
        """
        if self.copied is not None:
            self.copied.synchronize()
        size = rows * row_bytes
        if len(self._bytes) < size + rows:
            self._bytes = torch.empty(size + rows, dtype=torch.uint8, pin_memory=self._gpu)
        present_B = self._bytes[size : size + rows].view(torch.bool)
        return self._bytes[:size].view(rows, row_bytes), present_B


class _Read:
    """Rows of one step on their way.

    rows: decoded float32 (B, C) on the CPU, encoded uint8 (B, R) for a GPU.
    """

    def __init__(self, generation: Generation, ids_B: Ids, buffer: _Buffer) -> None:
        self.generation, self.ids_B, self.buffer = generation, ids_B, buffer
        self.rows, self.present_B = torch.empty(0), torch.empty(0)
        self.complete = False

    def __call__(self) -> None:
        """On the worker's thread."""
        generation = self.generation
        rows, self.present_B = self.buffer.room(len(self.ids_B), generation.row_bytes)
        self.complete = generation.gather(self.ids_B, rows.numpy(), self.present_B.numpy())
        if self.buffer.copied is None:
            rows = generation.decode(rows, self.present_B, self.complete)
        self.rows = rows


class Lookahead:
    """Rows of a generation, one step ahead."""

    def __init__(self, device: torch.device) -> None:
        self.waits = Waits()
        self._device = device
        self._buffers = [_Buffer(device) for _ in range(_BUFFERS)]
        self._next = 0
        self._worker = Worker("store-read", device)
        self._ahead: tuple[_Read, Task] | None = None

    def start(self, generation: Generation, ids_B: Ids) -> None:
        """Begin to read the rows that the next call of `take` will ask for."""
        read = _Read(generation, ids_B, self._buffers[self._next])
        self._next = (self._next + 1) % _BUFFERS
        self._ahead = (read, self._worker.submit(read))

    def take(self, generation: Generation, ids_B: Ids) -> tuple[Tensor, Tensor]:
        """Rows float32 (B, C), zeros if absent, and present_B bool, both on the device."""
        if self._ahead is None or not self._is_of(self._ahead[0], generation, ids_B):
            self.start(generation, ids_B)
        assert self._ahead is not None
        (read, task), self._ahead = self._ahead, None
        started = None if task.done else time.monotonic()
        task.wait()
        if started is not None:
            self.waits.add(time.monotonic() - started)
        copied = read.buffer.copied
        if copied is None:
            return read.rows, read.present_B
        rows = read.rows.to(self._device, non_blocking=True)
        present_B = read.present_B.to(self._device, non_blocking=True)
        copied.record()
        return generation.decode(rows, present_B, read.complete), present_B

    def close(self) -> None:
        """End the thread."""
        self._worker.close()

    def _is_of(self, read: _Read, generation: Generation, ids_B: Ids) -> bool:
        return read.generation is generation and np.array_equal(read.ids_B, ids_B)
