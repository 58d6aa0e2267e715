"""What travels from the data to a method."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """Each image of a batch is mixed with another one: Mixup or CutMix.

    partner_B: int64, its place in the batch (a sample's own place: not mixed). share_B: float32,
    how much of the image, and so of the label, is the sample's own. mostly_other: places where it
    is less than half; known on the host.
    """

    partner_B: Tensor
    share_B: Tensor
    mostly_other: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples on the training device.

    ids_B: int64 on the host, for the store. images_BCHW: float32, normalised. labels_B: int64.
    weight_B: float32, 1 for a real sample; 0 for one that stands in for an unreadable image.
    peer_BCHW: an image of another sample of each one's class, for methods that want one.
    absent: places of weight 0. bad: ids of the images that could not be decoded, peers among them.
    mix: how images (and peers) were mixed, if they were.
    """

    ids_B: Tensor
    images_BCHW: Tensor
    labels_B: Tensor
    weight_B: Tensor
    peer_BCHW: Tensor | None = None
    absent: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()
    mix: Mix | None = None

    def strangers(self) -> set[int]:
        """Places where a prediction for the image says nothing of the sample: not remembered."""
        return {*self.absent, *(self.mix.mostly_other if self.mix is not None else ())}
