"""The DeepSpeed engine: build, step, buffers, state.

ZeRO-0 state is written by us; under ZeRO-1 and 2 DeepSpeed writes the optimizer's shards.

Letters: B samples, C classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pskd import deepspeed_config
from pskd.average import WeightAverage
from pskd.config import EngineSection, OptimizerSection
from pskd.errors import PskdError
from pskd.inference import Inference, choose_kernels
from pskd.reduction import GradientReducer
from pskd.weights import difference


class Engine:
    """A network with its optimizer, trained in step with the other ranks."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerSection,
        section: EngineSection,
        settings: dict[str, Any],
        timeout: timedelta,
        ema_decay: float = 0.0,
        evaluate_average: bool = False,
    ) -> None:
        """`settings`: from `deepspeed_config.complete`. ema_decay: of an average of the weights, 0
        for none; evaluate_average: it is what `evaluated` is.

        Raises:
            PskdError: DeepSpeed refuses the settings, or options that exclude each other.
        """
        self.sharded = deepspeed_config.stage(settings) > 0
        if section.channels_last and self.sharded:
            raise PskdError(
                "engine.channels_last with ZeRO-1 or 2: its flat buffers need contiguous weights. "
                "Use stage 0, or leave channels_last out."
            )
        self._inference = Inference(deepspeed_config.precision(settings), section.channels_last)
        self.device = next(model.parameters()).device
        choose_kernels(self.device, tf32=section.tf32, deterministic=section.deterministic)
        self._average = WeightAverage(model, ema_decay) if ema_decay else None
        try:
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=_sgd(model, optimizer), config=settings
            )
        except ValueError as error:  # its sections are checked by pydantic
            raise PskdError(
                f"engine.deepspeed_config {section.deepspeed_config}: {error}"
            ) from error
        # DeepSpeed reduces gradients in a group of its own, which has torch's 30 minutes.
        dist.set_timeout(timeout, self._engine.data_parallel_group)
        self.model: nn.Module = self._engine.module
        self._layout = self._inference.layout
        if section.channels_last:
            self.model.to(memory_format=self._layout)  # before initialize, DeepSpeed cannot send it
            if self._average is not None:
                self._average.module.to(memory_format=self._layout)
        self.evaluated = self.model
        if evaluate_average and self._average is not None:
            self.evaluated = self._average.module
        self._reducer = self._overlapping(settings)
        if section.compile:
            self._engine.compile()
        self._scaler: torch.amp.GradScaler | None = self._engine.torch_autocast_z0_gradscaler

    def _overlapping(self, settings: dict[str, Any]) -> GradientReducer | None:
        """Instead of DeepSpeed's reduction, where that would only begin after the backward pass.

        ZeRO has its own (overlap_comm); and who sets how gradients travel gets DeepSpeed's.
        """
        if self.sharded or dist.get_world_size() == 1 or deepspeed_config.communicates(settings):
            return None
        self._engine.enable_backward_allreduce = False
        # The group that SyncBatchNorm uses in the same backward pass: with two communicators on a
        # GPU, all ranks would have to start the sums of both in one order.
        assert dist.group.WORLD is not None
        return GradientReducer(self.model, dist.group.WORLD)

    def train(self) -> None:
        """BatchNorm uses and updates the statistics of the batch."""
        self._engine.train()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, C) with gradient."""
        logits_BC: Tensor = self._engine(images_BCHW.contiguous(memory_format=self._layout))
        return logits_BC

    def backward_and_step(self, loss: Tensor, lr: float) -> None:
        """Backward of one micro-batch; updates the weights after the last of a step.

        With fp16 an update whose scaled gradients overflow is skipped and the scale lowered.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        whole = self._engine.is_gradient_accumulation_boundary()
        if self._reducer is None:
            self._engine.backward(loss)
        else:  # it sums, so each rank brings its share of the mean
            if whole:
                self._reducer.arm()
            self._engine.backward(loss / dist.get_world_size())
            if whole:
                self._reducer.finish()
        self._engine.step()
        if self._average is not None and whole:
            self._average.update(self.model)

    def predict(self, images_BCHW: Tensor, full_precision: bool) -> Tensor:
        """Logits (B, C) float32 for evaluation, in training's precision or in fp32."""
        self.evaluated.eval()
        return self.infer(self.evaluated, images_BCHW, full_precision)

    def infer(self, module: nn.Module, images_BCHW: Tensor, full_precision: bool = False) -> Tensor:
        """Logits (B, C) float32 of a network in evaluation mode, without gradient."""
        return self._inference(module, images_BCHW, full_precision)

    def sync_buffers(self) -> None:
        """Give every rank the buffers of rank 0 (BatchNorm statistics), which are canonical.

        DeepSpeed never sends buffers. Training does not read them, so this changes no weight.
        """
        for buffer in self.model.buffers():
            dist.broadcast(buffer, src=0)
        if self._average is not None:
            self._average.copy_buffers(self.model)

    def check_finite(self) -> None:
        """Waits for the device.

        Raises:
            PskdError: a weight is not finite, as after a gradient that was not; names it.
        """
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise PskdError(
                    f"weight {name} is not finite, though the losses were. Nothing of it was "
                    "saved. Lower optimizer.lr or set optimizer.clip_norm, in a new run."
                )

    def state_dict(self) -> dict[str, Any]:
        """Weights, their average, buffers, momentum, loss scale; if sharded, by how many ranks."""
        average = None if self._average is None else self._average.state_dict()
        if self.sharded:
            return {"ranks": dist.get_world_size(), "average": average}
        return {
            "average": average,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def check_fits(self, state: dict[str, Any], source: Path) -> None:
        """Refuse the state of another network.

        Raises:
            PskdError: names a weight that differs.
        """
        if self.sharded != ("ranks" in state):
            raise PskdError(
                f"{source} was written with{'out' if self.sharded else ''} ZeRO shards: resume it "
                "with the same ZeRO stage."
            )
        wrong = None if self.sharded else difference(self.model.state_dict(), state["model"])
        if wrong is not None:
            raise PskdError(f"{source} holds another network: {wrong}. Use its model.name.")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved state; if sharded, `load_shards` does it, on as many ranks.

        The optimizer's settings stay this run's own, as another run's may have been others.

        Raises:
            PskdError: the shards are of another number of ranks, or no average was kept.
        """
        if self._average is not None:
            # Another run, which this one began from, may have had none.
            average = state["average"] or state.get("model")
            if average is None:
                raise PskdError(
                    "model.ema_decay: the checkpoint has no average of the weights, and its ZeRO "
                    "shards cannot begin one. Resume without it, or from a ZeRO-0 run."
                )
            self._average.load_state_dict(average)
        if self.sharded:
            if state["ranks"] != dist.get_world_size():
                raise PskdError(
                    f"the checkpoint holds ZeRO shards of {state['ranks']} ranks, this job has "
                    f"{dist.get_world_size()}. Start {state['ranks']} ranks, or train with ZeRO-0."
                )
            return
        self.model.load_state_dict(state["model"])
        with self._own_settings():
            self._optimizer.load_state_dict(state["optimizer"])
        # Another run, of another precision, may have had no scale.
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])

    def save_shards(self, directory: Path) -> None:
        """Collective: DeepSpeed's files of all ranks, into an existing directory.

        Raises:
            PskdError: a file cannot be written.
        """
        try:
            self._engine.save_checkpoint(
                str(directory.parent), tag=directory.name, save_latest=False
            )
            for script in ("zero_to_fp32.py", "zero_to_torch.py"):
                # DeepSpeed leaves them beside; they need a package that it does not install.
                (directory.parent / script).unlink(missing_ok=True)
        except OSError as error:
            raise PskdError(f"shards of {directory} cannot be written: {error}.") from error
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise  # a lost peer, for one
            raise PskdError(
                f"shards of {directory} cannot be written: is the disk full? Free some space and "
                "start again: the run resumes from its last checkpoint."
            ) from error

    def load_shards(self, directory: Path) -> None:
        """Collective: what `save_shards` wrote. Executes pickles: only for files of one's own.

        Raises:
            PskdError: DeepSpeed finds no shards there.
        """
        with self._own_settings():
            found, _ = self._engine.load_checkpoint(str(directory.parent), tag=directory.name)
        if found is None:
            raise PskdError(f"checkpoint {directory} holds no shards. Resume from an older one.")

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        """With the momentum come the settings of the run that saved it: bring back the own ones."""
        own = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        clip_norm = self._optimizer.clip_grad if self.sharded else None
        yield
        for group, settings in zip(self._optimizer.param_groups, own, strict=True):
            group.update(settings)
        if self.sharded:
            self._optimizer.clip_grad = clip_norm


def _sgd(model: nn.Module, optimizer: OptimizerSection) -> torch.optim.SGD:
    return torch.optim.SGD(
        _parameter_groups(model, optimizer),
        lr=optimizer.lr,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        foreach=True if optimizer.implementation == "foreach" else None,
        fused=True if optimizer.implementation == "fused" else None,
    )


def _parameter_groups(model: nn.Module, optimizer: OptimizerSection) -> list[dict[str, Any]]:
    """Norm weights and biases (one dimension) may be spared the weight decay."""
    weights = [p for p in model.parameters() if p.ndim > 1 or optimizer.decay_norm_and_bias]
    spared = [p for p in model.parameters() if p.ndim <= 1 and not optimizer.decay_norm_and_bias]
    groups = [{"params": weights, "weight_decay": optimizer.weight_decay}]
    return groups + ([{"params": spared, "weight_decay": 0.0}] if spared else [])
