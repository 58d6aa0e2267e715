"""The configuration of a run: sections of tagged fields, and their checks. Imports no torch.

Names are the paper's and DeepSpeed's. How they are given: `command_line.py`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from pskd.data.catalog import DATASETS, FOLDER
from pskd.effect import ignored
from pskd.fields import TAGS, content, known, numerics, output, require, speed
from pskd.methods.sections import MethodSection
from pskd.models import MODELS
from pskd.store.registry import check_encoding


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

    def check(self) -> None:
        """Counts and durations are positive."""
        require(self.dir != "", "run.dir", "''", "name a directory, or leave the flag out.")
        require(self.resume != "", "run.resume", "''", "name a run, or leave the flag out.")
        require(self.threads >= 0, "run.threads", self.threads, "use 0 (automatic) or more.")
        require(self.timeout_s >= 1, "run.timeout_s", self.timeout_s, "use 1 second or more.")
        require(
            0 <= self.lock_wait_s < self.timeout_s,
            "run.lock_wait_s",
            self.lock_wait_s,
            f"use 0 or more, below run.timeout_s {self.timeout_s}: the other ranks wait as well.",
        )


@dataclass(frozen=True)
class DataSection:
    """What is trained on, and its augmentation."""

    name: str = numerics("digits", f"the data set; {FOLDER}: a folder of encoded images")
    root: str | None = output(None, "the folder that holds it (default: data)")
    download: bool = output(False, "fetch it if it is not there")
    limit: int = numerics(0, "train so many samples, the first (of a folder: of smallest hash)")
    held_out: int = numerics(0, "validate on so many training samples instead of the test split")
    pad_to: int = numerics(0, "black borders up to so many pixels; 0: none")
    crop_padding: int = numerics(0, "random crop out of the image padded by so many pixels")
    flip: bool = numerics(False, "random horizontal flip")
    last_batch: Literal["train", "drop"] = numerics("train", "what becomes of the short last batch")

    index_path: str | None = output(
        None, "folder: index of the training images (default: beside them, else in the cache)"
    )
    val_index_path: str | None = output(None, "folder: the same of the validation images")
    augment: Literal["standard", "pskd-imagenet"] = numerics(
        "standard", "folder: random resized crop; or with the public code's colours as well"
    )
    image_size: int = numerics(224, "folder: pixels of a side of what the network sees")
    resize_schedule: list[list[int]] = numerics(
        [], "folder: [[first epoch, pixels], ...] of training images, instead of image_size"
    )
    crop_scale: list[float] = numerics([0.08, 1.0], "folder: share of the area that is cut out")
    crop_ratio: list[float] = numerics([3 / 4, 4 / 3], "folder: its width by its height")
    validation_resize: int = numerics(
        256, "folder: pixels of the shorter side before the centre is cut out"
    )
    interpolation: Literal["linear", "cubic", "lanczos"] = numerics(
        "linear", "folder: how images are resized, anti-aliased"
    )
    on_bad_image: Literal["stop", "substitute"] = output(  # a run that had none is not changed
        "stop",
        "folder: an image that cannot be decoded stops the run, or is a grey one of weight 0",
    )
    decoder: Literal["auto", "cpu", "mixed"] = numerics(
        "auto", "folder: where images are decoded; auto: on the GPU (mixed) if there is one"
    )
    hw_decoder_load: float = numerics(
        0.65, "folder: share of images for the GPU's decoding engine, if it has one"
    )
    threads: int = speed(0, "folder: decoding threads a rank; 0: its share of the cores")
    prefetch: int = speed(2, "folder: batches decoded ahead")

    def check(self) -> None:
        """The data set exists, and no key is set that it does not read."""
        known(self.name, [*DATASETS, FOLDER], "data.name")
        for name in ("limit", "held_out", "pad_to", "crop_padding", "threads"):
            value = getattr(self, name)
            require(value >= 0, f"data.{name}", value, "use 0 or more.")
        require(self.root != "", "data.root", "''", "name a folder, or leave the flag out.")
        self._refuse_unread()
        for name in ("image_size", "validation_resize", "prefetch"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name}", value, "use 1 or more.")
        require(
            self.validation_resize >= self.image_size,
            "data.validation_resize",
            self.validation_resize,
            f"use at least data.image_size {self.image_size}: the centre is cut out.",
        )
        _check_interval("data.crop_scale", self.crop_scale, 1.0)
        _check_interval("data.crop_ratio", self.crop_ratio, math.inf)
        epochs = [entry[0] for entry in self.resize_schedule if len(entry) == 2]
        require(
            len(epochs) == len(self.resize_schedule)
            and epochs == sorted(set(epochs))
            and all(e >= 0 and size >= 1 for e, size in self.resize_schedule),
            "data.resize_schedule",
            self.resize_schedule,
            "give [[epoch, pixels], ...] with rising epochs from 0 on.",
        )
        require(
            0 <= self.hw_decoder_load <= 1,
            "data.hw_decoder_load",
            self.hw_decoder_load,
            "use a share from 0 to 1.",
        )

    def _refuse_unread(self) -> None:
        """A key that this data set does not read would promise what is not done."""
        of_arrays = {"download", "pad_to", "crop_padding"}
        everywhere = {"name", "root", "limit", "held_out", "flip", "last_batch"}
        for field in dataclasses.fields(self):
            of_folder = field.name not in of_arrays
            if field.name in everywhere or of_folder == (self.name == FOLDER):
                continue
            default = default_of(field)
            whose = f"data.name {FOLDER}" if of_folder else "data sets held in memory"
            require(
                getattr(self, field.name) == default,
                f"data.{field.name}",
                getattr(self, field.name),
                f"only {whose} read it. Leave it out, or choose another data.name.",
            )


@dataclass(frozen=True)
class MixingSection:
    """Images mixed with each other, for any method and data set."""

    name: Literal["none", "mixup", "cutmix"] = numerics("none", "how, if at all")
    alpha: float = numerics(1.0, "of the Beta(alpha, alpha) that the shares come from")
    probability: float = numerics(1.0, "of an image to be mixed")

    def check(self) -> None:
        """Ranges."""
        require(self.alpha > 0, "mixing.alpha", self.alpha, "use a positive value.")
        _check_probability("mixing", self.probability)


@dataclass(frozen=True)
class ErasingSection:
    """Parts of images made grey, for any method and data set."""

    name: Literal["none", "cutout", "random-erasing"] = numerics("none", "how, if at all")
    size: int = numerics(16, "cutout: pixels of a side of the square")
    probability: float = numerics(1.0, "of an image to lose something")
    scale: list[float] = numerics([0.02, 1 / 3], "random-erasing: share of the area")
    ratio: list[float] = numerics([0.3, 3.3], "random-erasing: height by width of the box")

    def check(self) -> None:
        """Ranges."""
        require(self.size >= 1, "erasing.size", self.size, "use 1 pixel or more.")
        _check_probability("erasing", self.probability)
        _check_interval("erasing.scale", self.scale, 1.0)
        _check_interval("erasing.ratio", self.ratio, math.inf)


def _check_probability(section: str, value: float) -> None:
    require(0 <= value <= 1, f"{section}.probability", value, "use a value in [0, 1].")


def _check_interval(key: str, value: list[float], top: float) -> None:
    require(
        len(value) == 2 and 0 < value[0] <= value[1] <= top and math.isfinite(value[1]),
        key,
        value,
        "give [smallest, largest], above 0" + (" and at most 1." if top == 1 else ", finite."),
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
            self.init is not None or not self.new_head,
            "model.new_head",
            self.new_head,
            "there is no other head without model.init.",
        )
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
    compile: bool = numerics(False, "torch.compile (needs a C++ compiler; changes the last bits)")
    channels_last: bool = numerics(False, "memory layout NHWC; with ZeRO-0 only")
    tf32: bool = numerics(False, "TensorFloat-32 for fp32 products and convolutions on GPUs")

    def check(self) -> None:
        """Nothing without reading the file: see `deepspeed_config.py`."""


@dataclass(frozen=True)
class StoreSection:
    """The store of past predictions, for the methods that need it."""

    encoding: str = numerics(
        "float16", "how a row is kept on disk: float16, float32, uint8-log or top<k>"
    )
    read: Literal["mmap", "pread"] = speed(
        "mmap", "read rows through a mapping, or with one system call each"
    )
    readahead_bytes: int = speed(
        0, "read so much of a generation from front to back as its epoch begins; 0: nothing"
    )

    def check(self) -> None:
        """The encoding exists."""
        check_encoding(self.encoding)
        require(
            self.readahead_bytes >= 0,
            "store.readahead_bytes",
            self.readahead_bytes,
            "use 0 or more.",
        )


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

    def check(self) -> None:
        """All sections, then what depends on two of them."""
        for key, value in self.flat().items():
            finite = not isinstance(value, float) or math.isfinite(value)
            require(finite, key, value, "use a finite number.")
        for section, _ in section_types(type(self.method)):
            getattr(self, section).check()
        values, defaults = self.flat(), self.defaults()
        for key, by, reason in ignored(values):
            causes = ", ".join(f"{name} {values[name]}" for name in by if name in values)
            require(
                values[key] == defaults[key],
                key,
                values[key],
                f"nothing reads it with {causes}: {reason}. Leave it out.",
            )
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
        return {
            f"{section}.{f.name}": default_of(f)
            for section, kind in section_types(type(self.method))
            for f in dataclasses.fields(kind)
        }

    def flat(self) -> dict[str, Any]:
        """Flat `section.field` -> value of every field."""
        return {key: value for tag in TAGS for key, value in self.values(tag).items()}

    def values(self, tag: str) -> dict[str, Any]:
        """Flat `section.field` -> value of the fields with this tag."""
        return {
            f"{section}.{f.name}": getattr(getattr(self, section), f.name)
            for section, kind in section_types(type(self.method))
            for f in dataclasses.fields(kind)
            if f.metadata["tag"] == tag
        }


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field of a section."""
    return field.default_factory() if callable(field.default_factory) else field.default


def section_types(method: type[MethodSection]) -> Iterator[tuple[str, Any]]:
    """(name, dataclass) of each section of a configuration with this method."""
    for section in dataclasses.fields(Config):
        yield section.name, method if section.name == "method" else section.type
