"""The configuration of a run: sections of tagged fields, and their checks. Imports no torch.

Names are the paper's and DeepSpeed's. How they are given: `command_line.py`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import yaml

from pskd.data.sections import DataSection, ErasingSection, MixingSection
from pskd.fields import TAGS, content, default_of, known, numerics, output, require, speed
from pskd.ignored_options import ignored
from pskd.methods.sections import MethodSection
from pskd.models import MODELS
from pskd.store.sections import StoreSection


@dataclass(frozen=True)
class RunSection:
    """Where a run lives and how its processes work."""

    dir: str | None = output(
        None, "run directory; what is in it is resumed (default: a new one under run.root)"
    )
    root: str = output("runs", "where new numbered run directories are made")
    recipe: str | None = output(None, "the recipe that its settings began with (--recipe)")
    resume: str | None = output(
        None, "begin a new run from another: its directory, or one of its checkpoints (--resume)"
    )
    threads: int = speed(
        0, "CPU threads a rank; 0: one with several ranks on a node, else all cores"
    )
    timeout_s: int = speed(600, "seconds after which a silent peer counts as lost")
    lock_wait_s: int = output(20, "seconds to wait for a dying owner of the run directory")
    profile: int = output(
        0, "trace so many steps, after 10 that warm up, into DIR/profile/ (--profile)"
    )

    def check(self) -> None:
        """Counts and durations are positive."""
        require(self.dir != "", "run.dir", "''", "name a directory, or leave the flag out.")
        require(self.resume != "", "run.resume", "''", "name a run, or leave the flag out.")
        require(self.threads >= 0, "run.threads", self.threads, "use 0 (automatic) or more.")
        require(self.profile >= 0, "run.profile", self.profile, "use 0 (none) or more steps.")
        require(self.timeout_s >= 1, "run.timeout_s", self.timeout_s, "use 1 second or more.")
        require(
            0 <= self.lock_wait_s < self.timeout_s,
            "run.lock_wait_s",
            self.lock_wait_s,
            f"use 0 or more, below run.timeout_s {self.timeout_s}: the other ranks wait as well.",
        )


@dataclass(frozen=True)
class ModelSection:
    """The network."""

    name: str = numerics("preact_resnet18", "the architecture, ours or torchvision's")
    init: str | None = numerics(
        None, "begin with the weights of a file: our export or run, public code's, torchvision's"
    )
    new_head: bool = numerics(False, "init: but with a fresh last layer, for other classes")
    sync_batchnorm: bool = numerics(False, "statistics over all ranks' parts (GPUs only)")
    ema_decay: float = numerics(0.0, "keep an average of the weights with this decay; 0: none")

    def check(self) -> None:
        """The model exists."""
        known(self.name, MODELS, "model.name")
        require(self.init != "", "model.init", "''", "name a file, or leave the flag out.")
        require(
            0 <= self.ema_decay < 1, "model.ema_decay", self.ema_decay, "use a value in [0, 1)."
        )


@dataclass(frozen=True)
class OptimizerSection:
    """SGD with momentum; the learning rate is that of the global batch."""

    lr: float = numerics(0.1, "peak learning rate")
    lr_for_batch: int = numerics(
        0, "the batch that lr is meant for: it grows with train.batch_size; 0: it does not"
    )
    momentum: float = numerics(0.9, "momentum")
    nesterov: bool = numerics(True, "Nesterov momentum")
    weight_decay: float = numerics(5e-4, "L2 penalty")
    decay_norm_and_bias: bool = numerics(True, "apply weight_decay to norms and biases as well")
    clip_norm: float = numerics(0.0, "largest norm of the gradient; 0: no clipping")
    implementation: Literal["default", "foreach", "fused"] = numerics(
        "default", "torch's kernel for SGD (changes the last bits)"
    )

    def check(self) -> None:
        """Ranges, and what torch's SGD accepts."""
        require(self.lr > 0, "optimizer.lr", self.lr, "use a positive value.")
        require(
            self.lr_for_batch >= 0, "optimizer.lr_for_batch", self.lr_for_batch, "use 0 or more."
        )
        require(
            0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "use a value in [0, 1)."
        )
        require(
            self.momentum > 0 or not self.nesterov,
            "optimizer.momentum",
            self.momentum,
            "Nesterov needs momentum above 0; or set optimizer.nesterov false.",
        )
        require(
            self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "use 0 or more."
        )
        require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "use 0 or more.")


@dataclass(frozen=True)
class ScheduleSection:
    """Learning rate over epochs."""

    name: Literal["step", "cosine"] = numerics("step", "step drops or half a cosine to 0")
    milestones: list[int] = numerics([150, 225], "step: epochs at which the rate drops")
    gamma: float = numerics(0.1, "step: factor of each drop")
    warmup_epochs: float = numerics(0.0, "linear warm-up from one step's share to the full rate")

    def check(self) -> None:
        """Milestones rise."""
        require(
            all(a < b for a, b in zip([0, *self.milestones], self.milestones, strict=False)),
            "schedule.milestones",
            self.milestones,
            "give rising epochs above 0.",
        )
        require(self.gamma > 0, "schedule.gamma", self.gamma, "use a positive value.")
        require(
            self.warmup_epochs >= 0, "schedule.warmup_epochs", self.warmup_epochs, "use 0 or more."
        )


@dataclass(frozen=True)
class TrainSection:
    """How long, in which batches, from which seed."""

    epochs: int = numerics(300, "epochs of the whole run")
    batch_size: int = numerics(128, "global batch: samples of one optimizer step, over all ranks")
    accumulation: int = numerics(1, "micro-batches into which each rank splits its part")
    seed: int = numerics(0, "seed of initialisation, order and every draw")

    def check(self) -> None:
        """Counts are positive."""
        require(self.epochs >= 1, "train.epochs", self.epochs, "use 1 or more.")
        require(self.batch_size >= 2, "train.batch_size", self.batch_size, "use 2 or more.")
        require(self.accumulation >= 1, "train.accumulation", self.accumulation, "use 1 or more.")


@dataclass(frozen=True)
class EngineSection:
    """The DeepSpeed engine."""

    deepspeed_config: str = content(
        "fp32", "precision and ZeRO stage: the name of a file in ds_configs/, or a JSON file"
    )
    compile: bool = numerics(
        False, "torch.compile (needs a C++ compiler; changes the last bits, and ShakeDrop's draws)"
    )
    channels_last: bool = numerics(False, "memory layout NHWC; with ZeRO-0 only")
    tf32: bool = numerics(False, "TensorFloat-32 for fp32 products and convolutions on GPUs")
    deterministic: bool = numerics(
        True, "cuDNN's kernels that give the same bits again; else the fastest of those it tries"
    )

    def check(self) -> None:
        """Nothing without reading the file: see `deepspeed_config.py`."""


@dataclass(frozen=True)
class EvaluationSection:
    """The measures on the validation split."""

    every: int = output(1, "after every so many epochs, and after the last")
    batch_size: int = speed(256, "samples a rank evaluates at a time")
    precision: Literal["training", "fp32"] = output("training", "precision of the forward pass")
    weights: Literal["training", "ema"] = numerics(
        "training", "which weights are evaluated and exported"
    )
    ece_bins: int = numerics(10, "bins of the expected calibration error")

    def check(self) -> None:
        """Counts are positive."""
        require(self.every >= 1, "evaluation.every", self.every, "use 1 or more.")
        require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "use 1 or more.")
        require(self.ece_bins >= 1, "evaluation.ece_bins", self.ece_bins, "use 1 or more.")


@dataclass(frozen=True)
class CheckpointSection:
    """When the state of the run is saved: at every epoch's end, and as said here."""

    every_steps: int = output(0, "also every so many optimizer steps of an epoch; 0: never")
    every_minutes: float = output(0.0, "also so many minutes after the last one; 0: never")
    keep: int = output(2, "how many checkpoints are kept")
    export_every: int = output(0, "also export plain weights every so many epochs; 0: never")

    def check(self) -> None:
        """Counts are possible."""
        require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "use 0 or more.")
        require(
            self.every_minutes >= 0,
            "checkpoint.every_minutes",
            self.every_minutes,
            "use 0 or more.",
        )
        require(self.keep >= 1, "checkpoint.keep", self.keep, "use 1 or more.")
        require(
            self.export_every >= 0, "checkpoint.export_every", self.export_every, "use 0 or more."
        )


@dataclass(frozen=True)
class TrackingSection:
    """Where else the lines of metrics.jsonl go, as the run goes on."""

    csv: bool = output(False, "to metrics.csv in the run directory")
    tensorboard: bool = output(False, "to TensorBoard's files, in tensorboard/ there")
    wandb: Literal["off", "offline", "online"] = output(
        "off", "to Weights & Biases; offline: into wandb/ there, for `wandb sync`"
    )
    wandb_project: str = output("pskd", "Weights & Biases: the project's name")

    def check(self) -> None:
        """A project has a name."""
        require(self.wandb_project != "", "tracking.wandb_project", "''", "give it a name.")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    run: RunSection
    data: DataSection
    mixing: MixingSection
    erasing: ErasingSection
    model: ModelSection
    method: MethodSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    train: TrainSection
    engine: EngineSection
    store: StoreSection
    evaluation: EvaluationSection
    checkpoint: CheckpointSection
    tracking: TrackingSection

    def check(self) -> None:
        """What nothing reads, then all sections, then what depends on two of them."""
        for key, value in self.flat().items():
            finite = not isinstance(value, float) or math.isfinite(value)
            require(finite, key, value, "use a finite number.")
        values, defaults = self.flat(), self.defaults()
        for key, by, reason in ignored(values, self.method.keeps_predictions):
            causes = ", ".join(f"{name} {values[name]}" for name in by if name in values)
            require(
                values[key] == defaults[key],
                key,
                values[key],
                f"nothing reads it with {causes}: {reason}. Leave it out.",
            )
        for section, _ in section_types(type(self.method)):
            getattr(self, section).check()
        require(
            self.schedule.warmup_epochs < self.train.epochs,
            "schedule.warmup_epochs",
            self.schedule.warmup_epochs,
            f"must be below train.epochs {self.train.epochs}.",
        )
        require(
            self.evaluation.weights == "training" or self.model.ema_decay > 0,
            "evaluation.weights",
            self.evaluation.weights,
            "there is no average without model.ema_decay.",
        )

    @property
    def peak_lr(self) -> float:
        """Learning rate of the global batch (Goyal et al., 2017: in proportion to it)."""
        if not self.optimizer.lr_for_batch:
            return self.optimizer.lr
        return self.optimizer.lr * self.train.batch_size / self.optimizer.lr_for_batch

    def to_yaml(self) -> str:
        """The resolved configuration; `--config` takes it back. The directory is not part of it."""
        sections = dataclasses.asdict(self)
        del sections["run"]["dir"]
        return yaml.safe_dump(sections, sort_keys=False)

    def defaults(self) -> dict[str, Any]:
        """Flat `section.field` -> default of every field."""
        return {key: default_of(f) for key, f in fields_of(type(self.method)).items()}

    def flat(self) -> dict[str, Any]:
        """Flat `section.field` -> value of every field."""
        return {key: value for tag in TAGS for key, value in self.values(tag).items()}

    def values(self, tag: str) -> dict[str, Any]:
        """Flat `section.field` -> value of the fields with this tag."""
        return {
            key: getattr(getattr(self, key.partition(".")[0]), f.name)
            for key, f in fields_of(type(self.method)).items()
            if f.metadata["tag"] == tag
        }


def section_types(method: type[MethodSection]) -> Iterator[tuple[str, Any]]:
    """(name, dataclass) of each section of a configuration with this method."""
    for section in dataclasses.fields(Config):
        yield section.name, method if section.name == "method" else section.type


@cache
def fields_of(method: type[MethodSection]) -> Mapping[str, dataclasses.Field[Any]]:
    """`section.field` -> each field of a configuration with this method."""
    return {
        f"{section}.{f.name}": f
        for section, kind in section_types(method)
        for f in dataclasses.fields(kind)
    }
