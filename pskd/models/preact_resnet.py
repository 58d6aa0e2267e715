"""PreAct ResNet as the public PS-KD and CS-KD code has it, which is not the paper's (He 2016b).

Two differences, both needed to reproduce the published table: every block, also one with an
identity shortcut, sends the *shortcut* through ReLU(BN(x)); and there is no BN-ReLU before the
pooling, while the stem has one. Initialisation is torch's default, as published.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions with pre-activation; the shortcut starts after the activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        shortcut: Tensor = self.shortcut(active)
        return out + shortcut


class PreActResNet(nn.Module):
    """Stem conv-BN-ReLU, stages of blocks (each but the first halves the size), pool, linear."""

    def __init__(
        self, num_classes: int, widths: Sequence[int], blocks: Sequence[int], stem_stride: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                stages.append(Block(inputs, width, stride))
                inputs = width
        self.blocks = nn.Sequential(*stages)
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.blocks(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def build(
    num_classes: int, widths: Sequence[int], blocks: Sequence[int], stem_stride: int = 1
) -> PreActResNet:
    """The family's builder, for the registry."""
    return PreActResNet(num_classes, widths, blocks, stem_stride)
