"""torchvision's image classifiers by their own names, never with downloaded weights.

Its resnet152 is the public code's ResNet-152: the stride is on the 3x3 convolution (v1.5), and a
seed gives both the same initial weights, bit for bit.
"""

from typing import Any

from torch import nn
from torchvision.models import get_model

# A loss here sees one tensor: without their auxiliary heads these two return one in training too.
# init_weights is their default, said aloud because they warn when it is not.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build(num_classes: int, name: str) -> nn.Module:
    """The family's builder, for the registry."""
    options = _OPTIONS.get(name, {})
    model: nn.Module = get_model(name, weights=None, num_classes=num_classes, **options)
    return model
