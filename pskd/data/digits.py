"""The 1,797 handwritten digits (8x8, grey) that scikit-learn ships.

There is no official split; the last 360, a fifth, are for validation.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from pskd.data.catalog import Catalog, Split

_HELD_OUT = 360


def load(root: Path | None, download: bool) -> Catalog:
    """Root and download have no meaning: the data come with the package."""
    del root, download
    digits = load_digits()
    images_NHW = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images_NHWC = images_NHW[..., None]
    labels_N = digits.target.astype(np.int64)
    return Catalog(
        name="digits",
        class_names=tuple(str(c) for c in digits.target_names),
        mean=(0.3054,),
        std=(0.3753,),
        train=Split(images_NHWC[:-_HELD_OUT], labels_N[:-_HELD_OUT]),
        validation=Split(images_NHWC[-_HELD_OUT:], labels_N[-_HELD_OUT:]),
    )
