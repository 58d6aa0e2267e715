"""Networks by name. `build` imports the family's module only when asked, so `--help` is fast."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pskd.models.torchvision_names import NAMES

if TYPE_CHECKING:
    from torch import nn

# name -> (module of the family, its arguments); every network takes three channels. One's own can
# be added from outside.
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
    "resnet101_cifar": ("pskd.models.resnet_cifar", {"blocks": (3, 4, 23, 3)}),
    "densenet121_cifar": (
        "pskd.models.densenet_cifar",
        {"growth": 32, "blocks": (6, 12, 24, 16)},
    ),
    "resnext29_8x64d": (
        "pskd.models.resnext_cifar",
        {"depth": 29, "cardinality": 8, "group_width": 64},
    ),
    "pyramidnet200_a240": ("pskd.models.pyramidnet", {"depth": 200, "alpha": 240}),
    "pyramidnet200_a240_shakedrop": (
        "pskd.models.pyramidnet",
        {"depth": 200, "alpha": 240, "last_survival": 0.5},
    ),
    "densenet264": ("pskd.models.densenet", {"growth": 32, "blocks": (6, 12, 64, 48)}),
    **{name: ("pskd.models.torchvision_models", {"name": name}) for name in NAMES},
}


def build(name: str, num_classes: int) -> "nn.Module":
    """A freshly initialised network: float32 (B, 3, H, W) -> logits (B, num_classes).

    Raises:
        KeyError: unknown name.
    """
    module, arguments = MODELS[name]
    family: Callable[..., nn.Module] = import_module(module).build
    return family(num_classes=num_classes, **arguments)
