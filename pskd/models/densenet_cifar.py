"""DenseNet with a CIFAR stem, as in the public code: bottleneck layers, compression one half.

Unlike torchvision's it starts with a 3x3 convolution alone, and a layer puts its new channels
before the old ones. Initialisation is torch's default, as published.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3: `growth` new channels, which go before the old ones."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, growth + inputs, H, W)."""
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([out, x], dim=1)


class Transition(nn.Module):
    """BN-ReLU-1x1 to half the channels, then the average of 2x2."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, inputs / 2, H / 2, W / 2)."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """Stem conv, dense blocks with a transition between, BN-ReLU, pool, linear."""

    def __init__(self, num_classes: int, growth: int, blocks: Sequence[int]) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for block, count in enumerate(blocks):
            if block > 0:
                layers.append(Transition(channels))
                channels //= 2
            for _ in range(count):
                layers.append(Layer(channels, growth))
                channels += growth
        self.layers = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        x = F.relu(self.bn(self.layers(self.conv1(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def build(num_classes: int, growth: int, blocks: Sequence[int]) -> DenseNet:
    """The family's builder, for the registry."""
    return DenseNet(num_classes, growth, blocks)
