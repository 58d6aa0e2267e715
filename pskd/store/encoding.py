"""How a row of probabilities is kept on disk. torch converts: numpy's float16 cast is slow.

Letters: B rows, C classes, R bytes of an encoded row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Encoding(Protocol):
    """Rows of float32 probabilities to bytes and back."""

    @property
    def name(self) -> str:
        """Of the encoding, in configuration and headers."""
        ...

    def row_bytes(self, classes: int) -> int:
        """Bytes of one encoded row."""
        ...

    def encode(self, probs_BC: Tensor) -> Tensor:
        """float32 (B, C) -> uint8 (B, R), on the same device."""
        ...

    def decode(self, bytes_BR: Tensor, classes: int) -> Tensor:
        """uint8 (B, R) -> float32 (B, C)."""
        ...


@dataclass(frozen=True)
class Float32:
    """Exact: the reference for every other encoding."""

    name: str = "float32"

    def row_bytes(self, classes: int) -> int:
        """Four bytes a class."""
        return 4 * classes

    def encode(self, probs_BC: Tensor) -> Tensor:
        """The bits as they are."""
        return probs_BC.float().contiguous().view(torch.uint8)

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

    def encode(self, probs_BC: Tensor) -> Tensor:
        """Round to nearest."""
        return probs_BC.half().contiguous().view(torch.uint8)

    def decode(self, bytes_BR: Tensor, classes: int) -> Tensor:
        """Widen and renormalise."""
        probs_BC = bytes_BR.contiguous().view(torch.float16).float()
        return probs_BC / probs_BC.sum(dim=1, keepdim=True)


ENCODINGS: dict[str, Encoding] = {e.name: e for e in (Float32(), Float16())}
