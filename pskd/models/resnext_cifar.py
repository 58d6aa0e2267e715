"""ResNeXt for CIFAR (Xie 2017) as in the public code: post-activation blocks in three stages."""

from torch import Tensor, nn
from torch.nn import functional as F

from pskd.models.bottleneck import Bottleneck

_STEM = 64
_OUTPUTS = 256  # of the first stage


class ResNeXt(nn.Module):
    """Stem conv-BN-ReLU, three stages, each twice as wide and half as large, pool, linear.

    Convolutions start normal with variance 2 / (outputs * kernel area), whatever their groups; the
    linear normal with variance 2 / inputs, its bias zero.
    """

    def __init__(self, num_classes: int, depth: int, cardinality: int, group_width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        blocks: list[nn.Module] = []
        inputs = _STEM
        for stage in range(3):
            outputs, width = _OUTPUTS * 2**stage, cardinality * group_width * 2**stage
            for index in range((depth - 2) // 9):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(inputs, width, outputs, stride, cardinality))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def build(num_classes: int, depth: int, cardinality: int, group_width: int) -> ResNeXt:
    """The family's builder, for the registry."""
    return ResNeXt(num_classes, depth, cardinality, group_width)
