"""An exponential moving average of the weights.

Our own and not torch's AveragedModel, which asks the device at every step whether it is the first.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every optimizer step.

    Begins with the initial weights. BatchNorm's statistics are not averaged: they are those of the
    network in training, as rank 0 has them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step further."""
        averages: list[Tensor] = list(self.module.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - self._decay)

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Take over the statistics of the network in training."""
        for mine, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The average."""
        self.module.load_state_dict(state)
