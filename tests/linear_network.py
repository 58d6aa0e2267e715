"""A linear network in training, and the batches that a method sees."""

import copy

import torch
from torch import nn

from pskd.data.batch import Batch


def batch_of(ids, labels, images=None, **extra):
    images = torch.zeros(len(ids), 3, 2, 2) if images is None else images
    return Batch(
        torch.as_tensor(ids), images, torch.as_tensor(labels), torch.ones(len(ids)), **extra
    )


class Moving:
    """A linear network in training, and what a method may ask of it; counts the snapshots."""

    def __init__(self, features, classes):
        torch.manual_seed(0)
        self.model = nn.Linear(features, classes)
        self.snapshots = 0

    def move(self):
        with torch.no_grad():
            self.model.weight += torch.randn_like(self.model.weight)

    def snapshot(self):
        self.snapshots += 1
        return self.copy()

    def copy(self):
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def trained(self, path):
        assert path == "teacher.pth"
        torch.manual_seed(9)
        return nn.Linear(*reversed(self.model.weight.shape)).eval().requires_grad_(False)

    def sha256(self, module):
        return str(module.weight.sum().item())

    def infer(self, module, images_BCHW):
        with torch.no_grad():
            return module(images_BCHW.flatten(1))

    def forward(self, images_BCHW):
        return self.model(images_BCHW.flatten(1))


def picture_batch(rng, b, c, **extra):
    images = torch.tensor(rng.normal(size=(b, 3, 2, 2)), dtype=torch.float32)
    return batch_of(range(b), rng.integers(0, c, b), images, **extra)
