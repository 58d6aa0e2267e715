"""What travels from the data to a method."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples on the training device.

    ids_B: int64 on the host, for the store. images_BCHW: float32, normalised. labels_B: int64.
    weight_B: float32, 1 for a real sample; 0 for one that stands in for an unreadable image.
    partner_BCHW: an image of each sample's partner, for methods that choose one. absent: rows of
    weight 0.
    """

    ids_B: Tensor
    images_BCHW: Tensor
    labels_B: Tensor
    weight_B: Tensor
    partner_BCHW: Tensor | None = None
    absent: tuple[int, ...] = ()
