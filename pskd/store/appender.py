"""Hands a step's predictions to a thread that writes them, through a ring of reused buffers.

On the training thread: encode, copy into a free buffer (pinned and asynchronous on a GPU). On the
writing thread: wait for the copy, check, seal, one `pwrite`. Training waits only if the disk is
so slow that every buffer is still on its way; that is counted.

Letters: B samples of a step, C classes, R bytes of an encoded row, S bytes of its unit.
"""

import time
from functools import partial

import torch
from torch import Tensor

from pskd.errors import PskdError
from pskd.order import Ids
from pskd.store.encoding import Encoding
from pskd.store.segment import Chunk, SegmentWriter
from pskd.store.waits import Waits
from pskd.store.worker import Task, Worker

_SLOTS = 4
_TOLERANCE = 1e-2  # of a row's sum; a softmax in bfloat16 is within 4e-3


class _Slot:
    """One buffer of the ring, and what is under way in it."""

    def __init__(self, row_bytes: int, rows: int, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.chunk = Chunk(row_bytes, rows, pinned=gpu)
        self._checks = torch.empty(2 * rows, pin_memory=gpu)
        self.copied = torch.Event("cuda") if gpu else None
        self.written: Task | None = None

    def checks_2B(self, rows: int) -> Tensor:
        """For the sum and the least number of each row: contiguous, as `Chunk.units_BS`."""
        return self._checks[: 2 * rows].view(2, rows)


class Appender:
    """Appends steps to segments, in order, on a thread of its own."""

    def __init__(self, encoding: Encoding, classes: int, device: torch.device) -> None:
        """`device`: where predictions are made."""
        self.waits = Waits()
        self._encoding = encoding
        self._row_bytes = encoding.row_bytes(classes)
        self._slots: list[_Slot | None] = [None] * _SLOTS
        self._next = 0
        self._worker = Worker("store-write", device)
        self._failure: BaseException | None = None

    def append(self, segment: SegmentWriter, epoch: int, ids_B: Ids, probs_BC: Tensor) -> None:
        """Append one step: float32 (B, C) on any device, which may be overwritten afterwards.

        Raises:
            PskdError: an earlier step could not be written: a full disk, or rows that are no
                probabilities (names the samples). Nothing was written after it.
        """
        slot = self._free_slot(len(ids_B), probs_BC.device)
        checks_2B = torch.stack((probs_BC.sum(dim=1), probs_BC.amin(dim=1)))
        slot.checks_2B(len(ids_B)).copy_(checks_2B, non_blocking=True)
        if slot.copied is None:
            self._encoding.encode(probs_BC, slot.chunk.rows_BR(len(ids_B)))
        else:
            units_BS = slot.chunk.units_BS(len(ids_B))
            encoded_BS = torch.empty_like(units_BS, device=probs_BC.device)
            self._encoding.encode(probs_BC, encoded_BS[:, : self._row_bytes])
            units_BS.copy_(encoded_BS, non_blocking=True)
            slot.copied.record()
        slot.written = self._worker.submit(partial(self._write, slot, segment, epoch, ids_B))

    def flush(self) -> None:
        """Wait until everything has been handed to the operating system.

        Raises:
            PskdError: as `append`.
        """
        for slot in self._slots:
            if slot is not None and slot.written is not None:
                slot.written.wait()
        self._raise_failure()

    def close(self) -> None:
        """End the thread after what is under way."""
        self._worker.close()

    def _free_slot(self, rows: int, device: torch.device) -> _Slot:
        slot = self._slots[self._next]
        if slot is not None and slot.written is not None and not slot.written.done:
            started = time.monotonic()
            slot.written.wait()
            self.waits.add(time.monotonic() - started)
        self._raise_failure()
        if slot is None or slot.chunk.capacity < rows:
            slot = self._slots[self._next] = _Slot(self._row_bytes, rows, device)
        self._next = (self._next + 1) % _SLOTS
        return slot

    def _write(self, slot: _Slot, segment: SegmentWriter, epoch: int, ids_B: Ids) -> None:
        if self._failure is not None:
            return  # a gap in the rows would go unnoticed
        try:
            if slot.copied is not None:
                slot.copied.synchronize()
            _refuse_nonsense(slot.checks_2B(len(ids_B)), epoch, ids_B)
            segment.append_chunk(ids_B, slot.chunk)
        except BaseException as error:
            self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _refuse_nonsense(checks_2B: Tensor, epoch: int, ids_B: Ids) -> None:
    """Probabilities sum to 1 and none is negative, so none is above 1; NaN makes the sum NaN."""
    sums_B, least_B = checks_2B
    wrong_B = ~(((sums_B - 1).abs() <= _TOLERANCE) & (least_B >= 0))
    if not bool(wrong_B.any()):
        return
    total, least = float(sums_B[wrong_B][0]), float(least_B[wrong_B][0])
    remedy = "Remember the softmax of the logits."
    if not bool(torch.isfinite(sums_B).all()):
        what, remedy = "that are not finite", "Lower optimizer.lr or set optimizer.clip_norm."
    elif abs(total - 1) > _TOLERANCE:
        what = f"that sum to {total:.4g}, not to 1,"
    else:
        what = f"with a negative number, {least:.4g},"
    raise PskdError(
        f"predictions {what} of samples {ids_B[wrong_B.numpy()].tolist()} in epoch {epoch}: "
        f"not stored. {remedy}"
    )
