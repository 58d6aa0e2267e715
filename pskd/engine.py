"""The DeepSpeed engine: build, step, buffers, state. ZeRO-0, fp32.

Letters: B samples, C classes.
"""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pskd.config import OptimizerSection
from pskd.errors import PskdError

# What this program decides itself: the order of samples, the optimizer and its schedule.
_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
)


def deepspeed_config(
    path: str | None, *, batch: int, world: int, accumulation: int, clip_norm: float
) -> dict[str, Any]:
    """The file's settings, what we own filled in. `batch`: samples of an optimizer step.

    Raises:
        PskdError: the file is no JSON object, sets what we own to anything but "auto", or asks
            for a ZeRO stage above 0.
    """
    settings: dict[str, Any] = {"zero_optimization": {"stage": 0}} if path is None else _read(path)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage != 0:
        raise PskdError(
            f"{path}: zero_optimization.stage is {stage}: only ZeRO-0 is supported so far. "
            "Use ds_configs/fp32.json."
        )
    # DeepSpeed only checks the arithmetic; parts may differ by two samples between ranks.
    owned = {
        "train_micro_batch_size_per_gpu": max(1, batch // (world * accumulation)),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
    }
    for key in _OWNED:
        given = settings.pop(key, "auto")
        if given != "auto" and given != owned.get(key):
            raise PskdError(
                f"{path}: '{key}' is {given}, but this program sets it "
                '(train.*, optimizer.*, schedule.*). Remove it, or write "auto".'
            )
    return {**settings, **owned, "steps_per_print": 10**9}


class Engine:
    """A network with its optimizer, trained in step with the other ranks."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerSection,
        settings: dict[str, Any],
        timeout: timedelta,
    ) -> None:
        sgd = torch.optim.SGD(
            _parameter_groups(model, optimizer),
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            nesterov=optimizer.nesterov,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=sgd, config=settings
        )
        # DeepSpeed reduces gradients in a group of its own, which has torch's 30 minutes.
        dist.set_timeout(timeout, self._engine.data_parallel_group)
        self.model: nn.Module = self._engine.module

    def train(self) -> None:
        """BatchNorm uses and updates the statistics of the batch."""
        self._engine.train()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C) with gradient."""
        logits_BC: Tensor = self._engine(images_BCHW)
        return logits_BC

    def backward_and_step(self, loss: Tensor, lr: float) -> None:
        """Backward of one micro-batch; updates the weights after the last of a step."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.backward(loss)
        self._engine.step()

    def sync_buffers(self) -> None:
        """Give every rank the buffers of rank 0 (BatchNorm statistics), which are canonical.

        DeepSpeed never sends buffers. Training does not read them, so this changes no weight.
        """
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers and momentum."""
        return {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved state."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


def _read(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise PskdError(f"{path} is no readable DeepSpeed JSON file: {error}.") from error
    if not isinstance(settings, dict):
        raise PskdError(f"{path} must hold a JSON object.")
    return settings


def _parameter_groups(model: nn.Module, optimizer: OptimizerSection) -> list[dict[str, Any]]:
    """Norm weights and biases (one dimension) may be spared the weight decay."""
    weights = [p for p in model.parameters() if p.ndim > 1 or optimizer.decay_norm_and_bias]
    spared = [p for p in model.parameters() if p.ndim <= 1 and not optimizer.decay_norm_and_bias]
    groups = [{"params": weights, "weight_decay": optimizer.weight_decay}]
    return groups + ([{"params": spared, "weight_decay": 0.0}] if spared else [])
