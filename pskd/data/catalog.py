"""What the samples of each data set are. Reads files only when asked; imports no torch.

Letters: N samples, H height, W width, C channels (1 or 3).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Split:
    """images_NHWC: uint8; labels_N: int64 in [0, number of classes). A sample's id is its row."""

    images_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.labels_N)


@dataclass(frozen=True)
class Catalog:
    """A data set held in memory. mean, std: of the pixels scaled to [0, 1], one a channel."""

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    validation: Split

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over classes, labels and pixels: two data sets with one name are told apart."""
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        for split in (self.train, self.validation):
            digest.update(repr(split.images_NHWC.shape).encode())
            digest.update(np.ascontiguousarray(split.labels_N).data)
            digest.update(np.ascontiguousarray(split.images_NHWC).data)
        return digest.hexdigest()


def _digits() -> Catalog:
    """The 1,797 handwritten digits (8x8, grey) that scikit-learn ships.

    There is no official split; the last 360, a fifth, are for validation.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  (1 s; only who trains on it pays)

    digits = load_digits()
    images_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images_NHWC = images_NHW[..., None]
    labels_N = digits.target.astype(np.int64)
    held_out = 360
    return Catalog(
        name="digits",
        class_names=tuple(str(c) for c in digits.target_names),
        mean=(0.3054,),
        std=(0.3753,),
        train=Split(images_NHWC[:-held_out], labels_N[:-held_out]),
        validation=Split(images_NHWC[-held_out:], labels_N[-held_out:]),
    )


DATASETS: dict[str, Callable[[], Catalog]] = {"digits": _digits}
