"""A network without BatchNorm, whose result does not depend on how a batch is split over ranks.

`--model.name=plain` in forked jobs (`forked.py`).
"""

from torch import nn


def build(num_classes: int) -> nn.Module:
    """float32 (B, 3, 8, 8) -> logits (B, num_classes)."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, num_classes),
    )
