"""Reads the rows of the next step on a thread of its own, into reused buffers.

On a GPU the thread gathers encoded rows into pinned memory, and the training thread starts their
copy and their decoding on its stream; on the CPU the thread decodes as well.

Letters: B samples of a step, C classes, R bytes of an encoded row.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pskd.order import Ids
from pskd.store.generation import Generation
from pskd.store.waits import Waits

_BUFFERS = 2  # one in use by the step, one that is being filled


class _Read(NamedTuple):
    """rows: decoded float32 (B, C) on the CPU, encoded uint8 (B, R) for a GPU."""

    rows: Tensor
    present_B: Tensor
    complete: bool
    buffer: "_Buffer"


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


class Lookahead:
    """Rows of a generation, one step ahead."""

    def __init__(self, device: torch.device) -> None:
        self.waits = Waits()
        self._device = device
        self._buffers = [_Buffer(device) for _ in range(_BUFFERS)]
        self._next = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-read")
        self._ahead: tuple[Generation, Ids, Future[_Read]] | None = None

    def start(self, generation: Generation, ids_B: Ids) -> None:
        """Begin to read the rows that the next call of `take` will ask for."""
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % _BUFFERS
        self._ahead = (
            generation,
            ids_B,
            self._thread.submit(self._read, generation, ids_B, buffer),
        )

    def take(self, generation: Generation, ids_B: Ids) -> tuple[Tensor, Tensor]:
        """Rows float32 (B, C), zeros if absent, and present_B bool, both on the device."""
        ahead = self._ahead
        if ahead is None or ahead[0] is not generation or not np.array_equal(ahead[1], ids_B):
            self.start(generation, ids_B)
            ahead = self._ahead
        assert ahead is not None
        self._ahead = None
        if not ahead[2].done():
            started = time.monotonic()
            ahead[2].result()
            self.waits.add(time.monotonic() - started)
        rows, present_B, complete, buffer = ahead[2].result()
        if buffer.copied is None:
            return rows, present_B
        rows = rows.to(self._device, non_blocking=True)
        present_B = present_B.to(self._device, non_blocking=True)
        buffer.copied.record()
        return generation.decode(rows, present_B, complete), present_B

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, generation: Generation, ids_B: Ids, buffer: _Buffer) -> _Read:
        rows, present_B = buffer.room(len(ids_B), generation.row_bytes)
        complete = generation.gather(ids_B, rows.numpy(), present_B.numpy())
        if buffer.copied is None:
            rows = generation.decode(rows, present_B, complete)
        return _Read(rows, present_B, complete, buffer)
