"""A data set of random images for benchmarks: `DATASETS["random"] = "array_folder"`.

`--data.root DIR` names a folder with shape.json: {"n": .., "classes": .., "side": ..,
"validation": .. (64)}.
"""

import json
from pathlib import Path

import numpy as np

from pskd.data.catalog import Catalog, Split


def load(root: Path | None, download: bool) -> Catalog:
    """Images (n, side, side, 3) of noise; the labels go round the classes."""
    del download
    assert root is not None
    shape = json.loads((root / "shape.json").read_text())
    n, classes, side = shape["n"], shape["classes"], shape["side"]
    random = np.random.default_rng(0)

    def split(count: int) -> Split:
        images_NHWC = random.integers(0, 256, (count, side, side, 3), np.uint8)
        return Split(images_NHWC, np.arange(count, dtype=np.int64) % classes)

    return Catalog(
        name="random",
        class_names=tuple(map(str, range(classes))),
        mean=(0.5, 0.5, 0.5),
        std=(0.3, 0.3, 0.3),
        train=split(n),
        validation=split(shape.get("validation", 64)),
    )
