"""The 1,797 handwritten digits (8x8, grey) that scikit-learn ships.

There is no official split; the last 360, a fifth, are for validation.

The file is read where scikit-learn has it: to import `sklearn.datasets`, which reads it too, brings
SciPy, and took a quarter of the CPU time of a short run's start.
"""

import zlib
from importlib.metadata import distribution
from pathlib import Path

import numpy as np

from pskd.data.catalog import Catalog, Split
from pskd.errors import PskdError

_FILE = "sklearn/datasets/data/digits.csv.gz"
_HELD_OUT = 360


def load(root: Path | None, download: bool) -> Catalog:
    """Root and download have no meaning: the data come with the package.

    Raises:
        PskdError: this scikit-learn has no such file, or a damaged one.
    """
    del root, download
    path = Path(str(distribution("scikit-learn").locate_file(_FILE)))
    try:
        table_NF = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # 64 pixels of 0 to 16, label
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise PskdError(
            f"data.name digits: cannot read {path}: {error}. It comes with scikit-learn: install "
            "it again, in the version of requirements.lock."
        ) from error
    images_NHWC = np.rint(table_NF[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels_N = table_NF[:, -1].astype(np.int64)
    return Catalog(
        name="digits",
        class_names=tuple(str(c) for c in range(10)),
        mean=(0.3054,),
        std=(0.3753,),
        train=Split(images_NHWC[:-_HELD_OUT], labels_N[:-_HELD_OUT]),
        validation=Split(images_NHWC[-_HELD_OUT:], labels_N[-_HELD_OUT:]),
    )
