"""Frozen networks beside the one in training: teachers, snapshots."""

from pathlib import Path

import torch
from torch import Tensor, nn

from pskd import models
from pskd.engine import Engine
from pskd.errors import PskdError
from pskd.weights import difference, weights_for, weights_sha256


class TrainedNetwork:
    """The network in training, as methods may need it; see `methods.interface.Network`."""

    def __init__(self, engine: Engine, name: str, num_classes: int) -> None:
        self._engine = engine
        self._name, self._num_classes = name, num_classes

    def snapshot(self) -> nn.Module:
        """Collective: a frozen copy in evaluation mode, with the buffers of rank 0."""
        self._engine.sync_buffers()
        return self.copy()

    def copy(self) -> nn.Module:
        """A frozen copy in evaluation mode."""
        return self._frozen(self._engine.model.state_dict())

    def trained(self, path: str) -> nn.Module:
        """A frozen network of the same architecture in evaluation mode, with weights of a file.

        Raises:
            PskdError: no weights there, or of another architecture or number of classes.
        """
        weights = weights_for(self._name, Path(path))
        wrong = difference(self._engine.model.state_dict(), weights)
        if wrong is not None:
            raise PskdError(
                f"method.teacher {path}: {wrong}. The teacher must be a {self._name} of "
                f"{self._num_classes} classes."
            )
        return self._frozen(weights)

    def sha256(self, module: nn.Module) -> str:
        """Of its weights and buffers."""
        return weights_sha256(module)

    def infer(self, module: nn.Module, images_BCHW: Tensor) -> Tensor:
        """Logits float32 (B, C) of a frozen network, in the precision of training."""
        return self._engine.infer(module, images_BCHW)

    def _frozen(self, weights: dict[str, Tensor]) -> nn.Module:
        # Built anew: the network in training carries DeepSpeed's hooks.
        with torch.random.fork_rng(devices=[]):  # its initial weights do not matter
            network = models.build(self._name, self._num_classes)
        network.load_state_dict(weights)
        return network.to(self._engine.device).eval().requires_grad_(False)
