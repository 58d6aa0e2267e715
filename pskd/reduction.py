"""Gradients are summed over the ranks while the backward pass still runs.

DeepSpeed's ZeRO-0 reduces all gradients after the backward pass: the network idles during the one,
the processor during the other. Here a bucket of gradients is sent as soon as it is complete.

Buckets are fixed runs of parameters, the last of the network first, and are sent in their order: on
every rank the same, and so are the sums, to the bit. A gradient of its own bucket is reduced in
place; smaller ones travel together through a buffer.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 4 << 20


@dataclass
class _Bucket:
    """missing: gradients that this backward pass has not brought yet."""

    parameters: list[nn.Parameter]
    missing: int = 0
    buffer: Tensor | None = None
    work: dist.Work | None = field(default=None, repr=False)

    def flats(self) -> list[Tensor]:
        """The gradients as one-dimensional views, in the order of their memory."""
        return [_flat(parameter) for parameter in self.parameters]


class GradientReducer:
    """Sums a network's gradients over the ranks of a group, in each backward pass that is armed."""

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self._group = group
        self._armed = False
        self._next = 0  # bucket to send
        self._buckets: list[_Bucket] = []
        parameters = [p for p in model.parameters() if p.requires_grad and p.numel()]
        for parameter in reversed(parameters):
            self._place(parameter)
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                hook = partial(self._ready, bucket)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def arm(self) -> None:
        """The next backward pass is the last of its step: send what it completes."""
        self._armed, self._next = True, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """After the backward pass: every gradient is the sum over the ranks.

        Parameters that it did not reach count as zero. On a GPU its stream waits, not the host.
        """
        self._armed = False
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.work = None
            if bucket.buffer is not None:
                flats = bucket.flats()
                parts = torch.split(bucket.buffer, [flat.numel() for flat in flats])
                torch._foreach_copy_(flats, list(parts))

    def _place(self, parameter: nn.Parameter) -> None:
        """Into the last bucket, or a new one if that would become too large."""
        last = self._buckets[-1] if self._buckets else None
        alike = last is not None and last.parameters[0].dtype == parameter.dtype
        if last is not None and alike and _bytes([*last.parameters, parameter]) <= BUCKET_BYTES:
            last.parameters.append(parameter)
        else:
            self._buckets.append(_Bucket([parameter]))

    def _ready(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        del parameter
        if not self._armed:
            return
        bucket.missing -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._send(self._buckets[self._next])
            self._next += 1

    def _send(self, bucket: _Bucket) -> None:
        flats = bucket.flats()
        sent = flats[0]
        if len(flats) > 1:
            if bucket.buffer is None:
                bucket.buffer = torch.empty(
                    sum(f.numel() for f in flats), dtype=sent.dtype, device=sent.device
                )
            sent = torch.cat(flats, out=bucket.buffer)
        bucket.work = dist.all_reduce(sent, group=self._group, async_op=True)


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _flat(parameter: nn.Parameter) -> Tensor:
    """The gradient's memory; autograd lays it out as the parameter, so on all ranks alike."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif parameter.grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    return parameter.grad.as_strided((parameter.numel(),), (1,))
