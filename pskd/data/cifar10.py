"""CIFAR-10: 50,000 + 10,000 images, 10 classes. Mean and deviation as in the public PS-KD code."""

from pathlib import Path

from torchvision.datasets import CIFAR10

from pskd.data.catalog import Catalog
from pskd.data.cifar import load_cifar


def load(root: Path | None, download: bool) -> Catalog:
    """See `load_cifar`."""
    mean, std = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)
    return load_cifar("cifar10", CIFAR10, root, download, mean, std)
