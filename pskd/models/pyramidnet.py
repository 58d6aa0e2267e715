"""Bottleneck PyramidNet for CIFAR (Han 2017), with or without ShakeDrop, as in the public code.

The width of a block grows by the same amount from each to the next, alpha in all, and is rounded.
Shortcuts have no weights: zeros fill the channels that are new, and where the stride is 2 the
average of 2x2 is taken. The survival of ShakeDrop falls linearly with depth.
"""

from itertools import accumulate, repeat

from torch import Tensor, nn
from torch.nn import functional as F

from pskd.models.shakedrop import ShakeDrop

_STEM = 16
_EXPANSION = 4


class Block(nn.Module):
    """BN-1x1, BN-ReLU-3x3, BN-ReLU-1x1, BN; no activation before the first or after the sum."""

    def __init__(self, inputs: int, width: int, stride: int, survival: float) -> None:
        super().__init__()
        outputs = _EXPANSION * width
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(outputs)
        self.shakedrop = ShakeDrop(survival) if survival < 1 else nn.Identity()
        # ceil_mode: an odd size becomes what the convolution with stride 2 makes of it.
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        out = self.conv1(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        out = self.shakedrop(self.bn4(out))
        shortcut = F.pad(self.pool(x), (0, 0, 0, 0, 0, self.new_channels))
        total: Tensor = out + shortcut
        return total


class PyramidNet(nn.Module):
    """Stem conv-BN, three stages of blocks, BN-ReLU, pool, linear.

    Convolutions start normal with variance 2 / (outputs * kernel area), the linear as in torch.
    """

    def __init__(self, num_classes: int, depth: int, alpha: float, last_survival: float) -> None:
        super().__init__()
        per_stage = (depth - 2) // 9
        count = 3 * per_stage
        # Summed up block by block, as published: that decides how a half is rounded.
        widths = [round(width) for width in accumulate(repeat(alpha / count, count), initial=_STEM)]
        self.conv1 = nn.Conv2d(3, _STEM, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        blocks: list[nn.Module] = []
        inputs = _STEM
        for index, width in enumerate(widths[1:]):
            stride = 2 if index in (per_stage, 2 * per_stage) else 1
            survival = 1 - (index + 1) / count * (1 - last_survival)
            blocks.append(Block(inputs, width, stride, survival))
            inputs = _EXPANSION * width
        self.blocks = nn.Sequential(*blocks)
        self.bn2 = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        x = self.blocks(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(x))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def build(num_classes: int, depth: int, alpha: float, last_survival: float = 1.0) -> PyramidNet:
    """The family's builder, for the registry."""
    return PyramidNet(num_classes, depth, alpha, last_survival)
