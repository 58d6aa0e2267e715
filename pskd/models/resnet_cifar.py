"""Bottleneck ResNet with a CIFAR stem: the document's "PreAct ResNet-101".

Despite that name the public code activates after each convolution and after the sum, as He 2016a.
Initialisation is torch's default, as published.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pskd.models.bottleneck import Bottleneck

_STEM = 64
_EXPANSION = 4


class ResNet(nn.Module):
    """Stem conv-BN-ReLU, stages of blocks (each but the first halves the size), pool, linear."""

    def __init__(self, num_classes: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        stages: list[nn.Module] = []
        inputs = _STEM
        for stage, count in enumerate(blocks):
            width = _STEM * 2**stage
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                stages.append(Bottleneck(inputs, width, _EXPANSION * width, stride))
                inputs = _EXPANSION * width
        self.blocks = nn.Sequential(*stages)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def build(num_classes: int, blocks: Sequence[int]) -> ResNet:
    """The family's builder, for the registry."""
    return ResNet(num_classes, blocks)
