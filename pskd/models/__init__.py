"""Networks by name. `build` imports the family's module only when asked, so `--help` is fast."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# name -> (module of the family, its arguments); every network takes three channels.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "preact_resnet18": (
        "pskd.models.preact_resnet",
        {"widths": (64, 128, 256, 512), "blocks": (2, 2, 2, 2)},
    ),
    "preact_resnet14_w24": (
        "pskd.models.preact_resnet",
        {"widths": (24, 48, 96), "blocks": (2, 2, 2), "stem_stride": 2},
    ),
    "preact_resnet8_w16": (
        "pskd.models.preact_resnet",
        {"widths": (16, 32, 64), "blocks": (1, 1, 1)},
    ),
}


def build(name: str, num_classes: int) -> "nn.Module":
    """A freshly initialised network: float32 (B, 3, H, W) -> logits (B, num_classes).

    Raises:
        KeyError: unknown name.
    """
    module, arguments = MODELS[name]
    family: Callable[..., nn.Module] = import_module(module).build
    return family(num_classes=num_classes, **arguments)
