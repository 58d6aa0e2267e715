"""A run's configuration: recipe + --config files + flags -> `Config`, checked before any work.

Later wins: recipe, then --config files in order, then flags. Names are the paper's and
DeepSpeed's. Imports no torch, so that `--help` and a refusal take a fraction of a second.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonargparse
import yaml

from pskd.data.catalog import DATASETS
from pskd.errors import PskdError
from pskd.fields import numerics, output, require, speed
from pskd.methods.sections import SECTIONS, MethodSection
from pskd.models import MODELS


@dataclass(frozen=True)
class RunSection:
    """Where a run lives and how its processes work."""

    dir: str | None = output(
        None, "run directory; what is in it is resumed (default: a new one under run.root)"
    )
    root: str = output("runs", "where new numbered run directories are made")
    threads: int = speed(
        0, "CPU threads a rank; 0: one with several ranks on a node, else all cores"
    )
    timeout_s: int = speed(600, "seconds after which a silent peer counts as lost")
    lock_wait_s: int = output(20, "seconds to wait for a dying owner of the run directory")

    def check(self) -> None:
        """Counts and durations are positive."""
        require(self.threads >= 0, "run.threads", self.threads, "use 0 (automatic) or more.")
        require(self.timeout_s >= 1, "run.timeout_s", self.timeout_s, "use 1 second or more.")
        require(self.lock_wait_s >= 0, "run.lock_wait_s", self.lock_wait_s, "use 0 or more.")


@dataclass(frozen=True)
class DataSection:
    """What is trained on, and its augmentation."""

    name: str = numerics("digits", "the data set")
    crop_padding: int = numerics(0, "random crop out of the image padded by so many pixels")
    flip: bool = numerics(False, "random horizontal flip")
    last_batch: Literal["train", "drop"] = numerics("train", "what becomes of the short last batch")

    def check(self) -> None:
        """The data set exists."""
        _known(self.name, DATASETS, "data.name")
        require(self.crop_padding >= 0, "data.crop_padding", self.crop_padding, "use 0 or more.")


@dataclass(frozen=True)
class ModelSection:
    """The network."""

    name: str = numerics("preact_resnet18", "the architecture")

    def check(self) -> None:
        """The model exists."""
        _known(self.name, MODELS, "model.name")


@dataclass(frozen=True)
class OptimizerSection:
    """SGD with momentum; the learning rate is that of the global batch."""

    lr: float = numerics(0.1, "peak learning rate")
    momentum: float = numerics(0.9, "momentum")
    nesterov: bool = numerics(True, "Nesterov momentum")
    weight_decay: float = numerics(5e-4, "L2 penalty")
    decay_norm_and_bias: bool = numerics(True, "apply weight_decay to norms and biases as well")
    clip_norm: float = numerics(0.0, "largest norm of the gradient; 0: no clipping")

    def check(self) -> None:
        """Ranges, and what torch's SGD accepts."""
        require(self.lr > 0, "optimizer.lr", self.lr, "use a positive value.")
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

    deepspeed_config: str | None = numerics(
        None, "a DeepSpeed JSON file, such as ds_configs/fp32.json (the default)"
    )

    def check(self) -> None:
        """The file can be read."""
        path = self.deepspeed_config
        require(
            path is None or Path(path).is_file(),
            "engine.deepspeed_config",
            path,
            "no such file; ds_configs/ holds the tested ones.",
        )


@dataclass(frozen=True)
class StoreSection:
    """The store of past predictions, for the methods that need it."""

    encoding: Literal["float16", "float32"] = numerics("float16", "how a row is kept on disk")

    def check(self) -> None:
        """Nothing to check: the choices are closed."""


@dataclass(frozen=True)
class EvaluationSection:
    """The measures on the validation split, after each epoch."""

    batch_size: int = speed(256, "samples a rank evaluates at a time")
    ece_bins: int = output(10, "bins of the expected calibration error")

    def check(self) -> None:
        """Counts are positive."""
        require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "use 1 or more.")
        require(self.ece_bins >= 1, "evaluation.ece_bins", self.ece_bins, "use 1 or more.")


@dataclass(frozen=True)
class CheckpointSection:
    """When the state of the run is saved: at every epoch's end, and as said here."""

    every_steps: int = output(0, "also every so many optimizer steps of an epoch; 0: never")
    keep: int = output(2, "how many checkpoints are kept")
    export_every: int = output(0, "also export plain weights every so many epochs; 0: never")

    def check(self) -> None:
        """Counts are possible."""
        require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "use 0 or more.")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "use 1 or more.")
        require(
            self.export_every >= 0, "checkpoint.export_every", self.export_every, "use 0 or more."
        )


@dataclass(frozen=True)
class Config:
    """Everything that defines a run."""

    run: RunSection
    data: DataSection
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
        for section, _ in _section_types(type(self.method)):
            getattr(self, section).check()
        require(
            self.schedule.warmup_epochs < self.train.epochs,
            "schedule.warmup_epochs",
            self.schedule.warmup_epochs,
            f"must be below train.epochs {self.train.epochs}.",
        )

    def to_yaml(self) -> str:
        """The resolved configuration; `--config` takes it back. The directory is not part of it."""
        sections = dataclasses.asdict(self)
        del sections["run"]["dir"]
        return yaml.safe_dump(sections, sort_keys=False)

    def values(self, tag: str) -> dict[str, Any]:
        """Flat `section.field` -> value of the fields with this tag."""
        return {
            f"{section}.{f.name}": getattr(getattr(self, section), f.name)
            for section, kind in _section_types(type(self.method))
            for f in dataclasses.fields(kind)
            if f.metadata["tag"] == tag
        }


class Invocation(NamedTuple):
    """A parsed command line: the configuration, and the recipe's name if one was given."""

    config: Config
    recipe: str | None


# Flags of the public PS-KD code, and what they are called here.
_PUBLIC_FLAGS = {
    "PSKD": "--method.name pskd",
    "lr": "--optimizer.lr",
    "lr_decay_schedule": "--schedule.milestones '[150, 225]'",
    "lr_decay_rate": "--schedule.gamma",
    "weight_decay": "--optimizer.weight_decay",
    "start_epoch": "--run.dir DIR (resumes by itself)",
    "end_epoch": "--train.epochs",
    "batch_size": "--train.batch_size",
    "experiments_dir": "--run.dir",
    "classifier_type": "--model.name",
    "data_type": "--data.name",
    "alpha_T": "--method.alpha_T",
    "saveckp_freq": "--checkpoint.export_every",
    "resume": "--run.dir DIR (resumes by itself)",
    "rank": "torchrun --node-rank",
    "world_size": "torchrun --nnodes and --nproc-per-node",
    "dist_url": "torchrun --master-addr and --master-port",
    "dist_backend": "nothing: nccl on GPUs, gloo on CPUs",
    "multiprocessing_distributed": "torchrun --nproc-per-node",
}
_LAUNCHER_FLAGS = ("--local_rank", "--local-rank")  # set by `deepspeed`; we read the environment


def load(argv: list[str]) -> Invocation:
    """Parse and check a command line.

    Raises:
        PskdError: unknown key (with a suggestion), wrong type, or a value out of range.
        SystemExit: after --help.
    """
    recipe, config_files, flags = _split(argv)
    if _wants_help(flags):
        _parser(_method_name(flags)).print_help()
        raise SystemExit(0)
    tokens: list[str] = []
    if recipe is None and not config_files:
        config_files = _config_of_run(flags)
    if recipe is not None:
        tokens += _tokens(read_recipe(recipe), f"recipe {recipe}")
    for path in config_files:
        tokens += _tokens(_read_yaml(Path(path)), path)
    method = _method_name(tokens + flags)
    _check_keys(tokens, flags, method)
    config = _build(_parse(tokens + flags, method), method)
    config.check()
    return Invocation(config, recipe)


def recipe_names() -> list[str]:
    """The names of the recipes that the package holds, sorted."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in files("pskd.recipes").iterdir()
        if p.name.endswith(".yaml")
    )


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's nested settings, on top of those of the one `base:` that it may name."""
    _known(name, recipe_names(), "--recipe")
    settings = yaml.safe_load((files("pskd.recipes") / f"{name}.yaml").read_text())
    base = settings.pop("base", None)
    if base is None:
        return dict(settings)
    merged = read_recipe(base)
    for section, values in settings.items():
        # Another method or data set does not inherit what belonged to the base's.
        inherits = values.get("name", merged.get(section, {}).get("name"))
        keep = merged.get(section, {})
        merged[section] = {**(keep if inherits == keep.get("name") else {}), **values}
    return merged


def _split(argv: list[str]) -> tuple[str | None, list[str], list[str]]:
    """Take --recipe, --config and the launchers' flags out; the rest are `section.field` flags."""
    recipe: str | None = None
    config_files: list[str] = []
    flags: list[str] = []
    queue = list(argv)
    while queue:
        flag, separator, value = queue.pop(0).partition("=")
        if flag == "--deepspeed_config":
            flag = "--engine.deepspeed_config"
        if not flag.startswith("--") or flag in ("--help", "--deepspeed"):
            if flag in ("-h", "--help"):
                flags.append("--help")
            elif flag != "--deepspeed":
                flags.append(flag + separator + value)
            continue
        if not separator and queue and not queue[0].startswith("--"):
            separator, value = "=", queue.pop(0)
        if flag in _LAUNCHER_FLAGS:
            continue
        if flag in ("--recipe", "--config"):
            if not value:
                raise PskdError(f"{flag} needs a value.")
            if flag == "--recipe":
                recipe = value
            else:
                config_files.append(value)
        else:
            flags.append(flag + separator + value)
    return recipe, config_files, flags


def _wants_help(flags: list[str]) -> bool:
    return "--help" in flags


def _config_of_run(flags: list[str]) -> list[str]:
    """A run that is resumed without recipe or file brings its own configuration."""
    for flag in reversed(flags):
        if flag.startswith("--run.dir="):
            path = Path(flag.partition("=")[2]) / "config.yaml"
            return [str(path)] if path.is_file() else []
    return []


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise PskdError(f"--config {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise PskdError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise PskdError(f"--config {path} must hold sections such as 'train: {{epochs: 10}}'.")
    return settings


def _tokens(settings: Mapping[str, Any], source: str) -> list[str]:
    """Nested settings as the flags that say the same."""
    tokens = []
    for section, values in settings.items():
        if not isinstance(values, dict):
            raise PskdError(
                f"{source}: '{section}' must be a section, such as '{section}: {{name: ...}}'."
            )
        for name, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value)
            tokens.append(f"--{section}.{name}={text}")
    return tokens


def _method_name(tokens: list[str]) -> str:
    """The method decides which flags its section has, so it is read before the rest."""
    name = "pskd"
    for token in tokens:
        if token.startswith("--method.name="):
            name = token.partition("=")[2]
    _known(name, SECTIONS, "method.name")
    return name


def _section_types(method: type[MethodSection]) -> Iterator[tuple[str, Any]]:
    for section in dataclasses.fields(Config):
        yield section.name, method if section.name == "method" else section.type


@cache
def _keys(method: str) -> dict[str, dataclasses.Field[Any]]:
    return {
        f"{section}.{f.name}": f
        for section, kind in _section_types(SECTIONS[method])
        for f in dataclasses.fields(kind)
    }


def _check_keys(tokens: list[str], flags: list[str], method: str) -> None:
    keys = _keys(method)
    for token in tokens + flags:
        name = token.partition("=")[0].removeprefix("--")
        if not token.startswith("--"):
            raise PskdError(f"'{token}' is not a flag. Use --section.field VALUE; see --help.")
        if name not in keys:
            raise PskdError(_unknown_key(name, method))
        if "=" not in token:
            raise PskdError(f"--{name} needs a value: --{name} VALUE.")


def _unknown_key(name: str, method: str) -> str:
    if name in _PUBLIC_FLAGS:
        return (
            f"unknown key '{name}' (a flag of the public code). Here it is {_PUBLIC_FLAGS[name]}."
        )
    owners = [m for m in SECTIONS if name in _keys(m)]
    if owners:
        return (
            f"unknown key '{name}': it belongs to method {' and '.join(owners)}, "
            f"but method.name is {method}."
        )
    keys = list(_keys(method))
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    near += [k for k in keys if k.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f" Did you mean '{near[0]}'?" if near else " See --help for the keys."
    return f"unknown key '{name}'.{hint}"


def _parser(method: str) -> Any:
    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s [--recipe NAME] [--config FILE.yaml] [--section.field VALUE ...]",
        description="Train an image classifier. Later wins: recipe, --config files, flags. "
        f"Recipes: {', '.join(recipe_names())}.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    for section, kind in _section_types(SECTIONS[method]):
        group = parser.add_argument_group(section, (kind.__doc__ or "").strip())
        for f in dataclasses.fields(kind):
            default = f.default_factory() if callable(f.default_factory) else f.default
            text = f"{f.metadata['help']} [{f.metadata['tag']}]"
            group.add_argument(f"--{section}.{f.name}", type=f.type, default=default, help=text)
    return parser


def _parse(tokens: list[str], method: str) -> dict[str, Any]:
    try:
        return dict(_parser(method).parse_args(tokens).as_dict())
    except jsonargparse.ArgumentError as error:
        message = " ".join(str(error).replace("Parser key ", "").split())
        message = re.sub(r"a <class '(\w+)'>|a typing\.Literal", r"\1", message)
        raise PskdError(f"{message}.") from error


def _build(values: dict[str, Any], method: str) -> Config:
    sections = {s: kind(**values[s]) for s, kind in _section_types(SECTIONS[method])}
    return Config(**sections)


def _known(name: str, choices: Mapping[str, Any] | list[str], key: str) -> None:
    if name not in choices:
        near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise PskdError(f"{key} '{name}' is unknown: {hint}Known: {', '.join(sorted(choices))}.")
