"""CIFAR-100: 50,000 + 10,000 images, 100 classes. Mean and deviation as in the public PS-KD code,
which are CIFAR-10's and not those of this data set: kept to reproduce its table.
"""

from pathlib import Path

from torchvision.datasets import CIFAR100

from pskd.data.catalog import Catalog
from pskd.data.cifar import load_cifar


def load(root: Path | None, download: bool) -> Catalog:
    """See `load_cifar`."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    return load_cifar("cifar100", CIFAR100, root, download, mean, std)
