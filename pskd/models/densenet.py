"""DenseNets for ImageNet of a size that torchvision does not name; its class and initialisation."""

from torch import nn
from torchvision.models import DenseNet


def build(num_classes: int, growth: int, blocks: tuple[int, int, int, int]) -> nn.Module:
    """The family's builder, for the registry."""
    model: nn.Module = DenseNet(growth, blocks, 2 * growth, num_classes=num_classes)
    return model
