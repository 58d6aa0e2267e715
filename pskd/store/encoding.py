"""How a row of probabilities is kept on disk. torch converts: numpy's float16 cast is slow.

Errors of the PS-KD gradient against exact rows: `scripts/bench/row_encodings.py` prints them.

Letters: B rows, C classes, R bytes of an encoded row, K largest classes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pskd.errors import PskdError


class Encoding(Protocol):
    """Rows of float32 probabilities to bytes and back."""

    @property
    def name(self) -> str:
        """Of the encoding, in configuration and headers."""
        ...

    def row_bytes(self, classes: int) -> int:
        """Bytes of one encoded row.

        Raises:
            PskdError: it makes no sense for so many classes.
        """
        ...

    def encode(self, probs_BC: Tensor, out_BR: Tensor) -> None:
        """float32 (B, C) into uint8 (B, R), rows contiguous, on the same device."""
        ...

    def decode(self, bytes_BR: Tensor, classes: int) -> Tensor:
        """uint8 (B, R) -> float32 (B, C), on the same device."""
        ...


@dataclass(frozen=True)
class Float32:
    """Exact: the reference for every other encoding."""

    name: str = "float32"

    def row_bytes(self, classes: int) -> int:
        """Four bytes a class."""
        return 4 * classes

    def encode(self, probs_BC: Tensor, out_BR: Tensor) -> None:
        """The bits as they are."""
        out_BR.view(torch.float32).copy_(probs_BC)

    def decode(self, bytes_BR: Tensor, classes: int) -> Tensor:
        """The bits as they were."""
        return bytes_BR.contiguous().view(torch.float32)


@dataclass(frozen=True)
class Float16:
    """Half the size; rounding errors below 2.5e-4. Decoded rows are renormalised to sum to 1."""

    name: str = "float16"

    def row_bytes(self, classes: int) -> int:
        """Two bytes a class."""
        return 2 * classes

    def encode(self, probs_BC: Tensor, out_BR: Tensor) -> None:
        """Round to nearest."""
        out_BR.view(torch.float16).copy_(probs_BC)

    def decode(self, bytes_BR: Tensor, classes: int) -> Tensor:
        """Widen and renormalise."""
        probs_BC = bytes_BR.contiguous().view(torch.float16).float()
        return probs_BC.div_(probs_BC.sum(dim=1, keepdim=True))


_NATS = 16.0  # part of the format: another number needs another name


@dataclass(frozen=True)
class Uint8Log:
    """A byte a class: the log-probability below the row's largest, in 255 steps over 16 nats.

    A class is off by at most a factor exp(8/255) = 1.032; below e^-15.97 of the largest it becomes
    0.
    The row's scale is not kept: decoded rows are renormalised to sum to 1.
    """

    name: str = "uint8-log"

    def row_bytes(self, classes: int) -> int:
        """One byte a class."""
        return classes

    def encode(self, probs_BC: Tensor, out_BR: Tensor) -> None:
        """255 for the largest, 0 for what is e^-16 of it or less."""
        steps_BC = probs_BC.log()
        steps_BC -= steps_BC.amax(dim=1, keepdim=True)
        out_BR.copy_(steps_BC.mul_(255 / _NATS).add_(255).clamp_(min=0).round_())

    def decode(self, bytes_BR: Tensor, classes: int) -> Tensor:
        """Exponentiate and renormalise."""
        steps_BC = bytes_BR.float()
        probs_BC = torch.where(steps_BC > 0, ((steps_BC - 255) * (_NATS / 255)).exp_(), 0.0)
        return probs_BC.div_(probs_BC.sum(dim=1, keepdim=True))


@dataclass(frozen=True)
class TopK:
    """An approximation: the k largest classes as float16, what is left spread evenly.

    The gradient of PS-KD is off by some percent where predictions have long tails (see above).
    """

    k: int

    @property
    def name(self) -> str:
        """top<k>."""
        return f"top{self.k}"

    def row_bytes(self, classes: int) -> int:
        """A float16 and a uint16 (above 65,536 classes an int32) for each of the k."""
        if self.k >= classes:
            raise PskdError(
                f"store.encoding {self.name} keeps {self.k} of {classes} classes, which saves "
                f"nothing. Use float16, or top1 to top{classes - 1}."
            )
        return self.k * (2 + self._index(classes).itemsize)

    def encode(self, probs_BC: Tensor, out_BR: Tensor) -> None:
        """The k values, largest first, then their classes."""
        values_BK, classes_BK = probs_BC.topk(self.k, dim=1)
        index_BK = classes_BK.to(self._index(probs_BC.shape[1]))
        out_BR[:, : 2 * self.k] = values_BK.half().view(torch.uint8)
        out_BR[:, 2 * self.k :] = index_BK.view(torch.uint8)

    def decode(self, bytes_BR: Tensor, classes: int) -> Tensor:
        """Spread 1 - sum of the k evenly over the other classes, then renormalise."""
        split = 2 * self.k
        # Copies: a view of a single row would keep its offset, which may be odd.
        values = bytes_BR[:, :split].clone(memory_format=torch.contiguous_format)
        index = bytes_BR[:, split:].clone(memory_format=torch.contiguous_format)
        values_BK = values.view(torch.float16).float()
        index_BK = index.view(self._index(classes)).long()
        rest_B1 = (1 - values_BK.sum(dim=1, keepdim=True)).clamp_(min=0) / (classes - self.k)
        probs_BC = rest_B1.repeat(1, classes).scatter_(1, index_BK, values_BK)
        return probs_BC.div_(probs_BC.sum(dim=1, keepdim=True))

    def _index(self, classes: int) -> torch.dtype:
        return torch.uint16 if classes <= 2**16 else torch.int32
