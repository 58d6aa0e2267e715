"""Fashion-MNIST with labels that are wrong: a data set of the user's own.

`--data.name=flipped-fashion-mnist` where `DATASETS` names this module. The file checksums of the
original are checked as always; labels are changed after that.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pskd.data import fashion_mnist
from pskd.data.catalog import Catalog, Split

N = 10_000
SHARE = 0.02  # of the labels
SEED = 0


def load(root: Path | None, download: bool) -> Catalog:
    """The first 10,000 training images; 2 % of their labels are another class, drawn evenly."""
    whole = fashion_mnist.load(root, download)
    labels_N = whole.train.labels_N[:N].copy()
    wrong = flipped()
    shift = np.random.default_rng(SEED + 1).integers(1, whole.num_classes, len(wrong))
    labels_N[wrong] = (labels_N[wrong] + shift) % whole.num_classes
    train = Split(whole.train.images_NHWC[:N], labels_N)
    return replace(whole, name="flipped-fashion-mnist", train=train)


def flipped() -> npt.NDArray[np.int64]:
    """Which samples have a wrong label."""
    chosen = np.random.default_rng(SEED).permutation(N)[: int(SHARE * N)]
    return np.sort(chosen).astype(np.int64)
