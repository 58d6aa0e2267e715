"""What has been done to an image before the network sees it, for whoever uses the network later.

A JSON object, `preprocessing.json` in a run directory and beside every export:

    class_names     in the order of the logits
    channels        3; grey: whether images have one channel, which is repeated
    height, width   of the network's input, pixels
    resize          of the shorter side before the centre is cut out, or null
    pad_to          black borders up to this size, or null
    interpolation   how `resize` does it, anti-aliased, or null
    mean, std       of each channel of pixels in [0, 1]: the input is (pixel / 255 - mean) / std
"""

from collections.abc import Sequence
from typing import Any


def described(
    class_names: Sequence[str],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    height: int,
    width: int,
    pad_to: int | None = None,
    resize: int | None = None,
    interpolation: str | None = None,
) -> dict[str, Any]:
    """The object above."""
    grey = len(mean) == 1
    return {
        "class_names": list(class_names),
        "channels": 3,
        "grey": grey,
        "height": height,
        "width": width,
        "resize": resize,
        "pad_to": pad_to,
        "interpolation": interpolation,
        "mean": list(mean) * (3 if grey else 1),
        "std": list(std) * (3 if grey else 1),
    }
