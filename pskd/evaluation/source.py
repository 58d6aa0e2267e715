"""What `pskd evaluate` looks at: a network, from a run, an export or foreign weights, and its data.

Letters: B samples.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pskd import command_line, deepspeed_config, models
from pskd.config import Config
from pskd.data import colour
from pskd.data.catalog import FOLDER, Catalog
from pskd.data.sections import DataSection
from pskd.errors import PskdError
from pskd.export import facts_of, public_network
from pskd.fields import known
from pskd.files import read_run_json
from pskd.inference import Inference
from pskd.loading import AnyCatalog
from pskd.models.probe import check_takes
from pskd.run_records import read_complete, read_preprocessing, read_starts, saved_settings
from pskd.run_status import read_status, standing
from pskd.weights import (
    check_written,
    difference,
    export_path,
    head_of,
    read_saved,
    read_weights,
    weights_for,
)

log = logging.getLogger("pskd")

_READ = ("evaluation.batch_size", "evaluation.precision", "run.threads", "run.timeout_s")
_FOR_TRAINING_DATA = ("limit", "held_out", "index_path", "val_index_path")


@dataclass(frozen=True)
class Source:
    """Where the network comes from; paths are not looked at yet.

    path: a run, or a file of weights. which: last or best, of a run. model: of foreign weights.
    """

    path: Path
    which: str
    model: str | None

    @property
    def run(self) -> Path | None:
        """The run itself, or the one in which an export lies; foreign weights have none."""
        if self.model is not None:
            return None
        above = self.path if self.path.is_dir() else self.path.absolute().parent.parent
        return above if (above / "config.yaml").is_file() else None

    def __str__(self) -> str:
        """For messages."""
        return f"{self.path} ({self.which})" if self.path.is_dir() else str(self.path)


@dataclass(frozen=True)
class Settings:
    """config: of which the data and what `_READ` names count. own: the data are the run's own.

    held_out: the run's own data, with the samples that it held out; None if it held out none.
    sized: whether the flags name the size of images.
    """

    config: Config
    own: bool
    held_out: DataSection | None
    sized: bool


@dataclass(frozen=True)
class Subject:
    """network: in evaluation mode. preprocessing: as `data/preprocessing.py` says, if known."""

    network: nn.Module
    num_classes: int
    preprocessing: dict[str, Any] | None
    inference: Inference


def settings(source: Source, flags: list[str]) -> Settings:
    """The run's configuration with flags on top; without a run, the flags alone.

    Raises:
        PskdError: a flag that is not read here, a bad value, or no data named.
    """
    given = _given(flags)
    for key in given:
        section, _, _ = key.partition(".")
        if section != "data" and key not in _READ:
            raise PskdError(
                f"--{key}: `pskd evaluate` does not read it, only data.* and {', '.join(_READ)}."
            )
    _check_exists(source)
    saved = _saved(source)
    own_data = dict(saved.get("data", {}))
    if not own_data and "data.name" not in given:
        _check_holds_weights(source)
        raise PskdError(
            f"{source}: the data to evaluate it on are not known. Name them as for train.py: "
            f"--data.name NAME [--data.root DIR]; {FOLDER} is a folder of images."
        )
    named = f"{source.run}/config.yaml" if source.run is not None else f"{source.path}.json"
    own = bool(own_data) and all(
        given.get(f"data.{key}", own_data.get(key)) == own_data.get(key) for key in ("name", "root")
    )
    held_out = None
    if own_data.get("held_out"):
        held_out = command_line.over(named, saved, []).data
    if not own:
        same_kind = given.get("data.name", own_data.get("name")) == own_data.get("name")
        kept = {k: v for k, v in own_data.items() if k not in _FOR_TRAINING_DATA}
        saved = {**saved, "data": kept if same_kind else {}}
    config = command_line.over(named, saved, flags)
    for name in ("run", "data", "evaluation"):
        getattr(config, name).check()
    sized = bool({"data.image_size", "data.pad_to"} & set(given))
    return Settings(config, own, held_out, sized)


def subject(source: Source, given: Settings) -> Subject:
    """Read the network.

    Raises:
        PskdError: an unfinished run, or no weights that fit; says what is there.
    """
    if source.model is not None:
        network = public_network(source.path, source.model).eval()
        classes = len(network.state_dict()[head_of(network)[0]])
        return Subject(network, classes, None, Inference())
    if source.path.is_dir():
        return _of_run(source, given.config)
    return _of_export(source, given.config)


def place_of(source: Source) -> tuple[int, int]:
    """(ranks, threads a rank) that the run was evaluated by; (1, 0: automatic) without a run."""
    run = source.run
    starts = [] if run is None else read_starts(run)
    if not starts:
        return 1, 0
    facts = starts[-1]["facts"]
    return int(facts["world"]), int(facts["threads"])


def fitting(subject: Subject, catalog: AnyCatalog, given: Settings, name: str) -> AnyCatalog:
    """The data, normalised as the network was trained, if they are what it can judge.

    Raises:
        PskdError: other classes or sizes of images.
    """
    section, about = given.config.data, subject.preprocessing
    if catalog.num_classes != subject.num_classes:
        raise PskdError(
            f"{name} tells {subject.num_classes} classes apart, but data.name {section.name} has "
            f"{catalog.num_classes}. Name the data that it was trained for."
        )
    size, key = (section.image_size, section.image_size), "data.image_size"
    if isinstance(catalog, Catalog):
        height, width = catalog.validation.images_NHWC.shape[1:3]
        size, key = (height, width), "data.pad_to"
    if about is not None:
        _check_names(about["class_names"], catalog.class_names, name, section)
        own_size = (about["height"], about["width"])
        if size != own_size and not given.sized:
            raise PskdError(
                f"{name} was trained on images of {own_size[0]}x{own_size[1]} pixels, these have "
                f"{size[0]}x{size[1]}. Choose a size with --{key}."
            )
        if isinstance(catalog, Catalog):
            catalog = replace(
                catalog, mean=_of(about["mean"], catalog.mean), std=_of(about["std"], catalog.std)
            )
    check_takes(subject.network, name, [size], key)
    subject.network.eval()
    return catalog


def renormalised(subject: Subject, catalog: AnyCatalog, images_BCHW: Tensor) -> Tensor:
    """Images of a folder come with ImageNet's mean and deviation; the network may want others."""
    about = subject.preprocessing
    if about is None or isinstance(catalog, Catalog):
        return images_BCHW
    if tuple(about["mean"]) == tuple(colour.MEAN) and tuple(about["std"]) == tuple(colour.STD):
        return images_BCHW
    mean, std, wanted, scale = (
        torch.tensor(list(values), device=images_BCHW.device)[:, None, None]
        for values in (colour.MEAN, colour.STD, about["mean"], about["std"])
    )
    return (images_BCHW * std + (mean - wanted)) / scale


def _saved(source: Source) -> dict[str, Any]:
    """The run's configuration; of an export that lies elsewhere, its data; else nothing."""
    if source.run is not None:
        return dict(saved_settings(source.run))
    beside = None if source.model is not None else _described_beside(source.path)
    if beside is None or not beside.get("data"):
        return {}
    return {name: beside[name] for name in ("data", "evaluation") if beside.get(name)}


def _given(flags: list[str]) -> dict[str, str]:
    pairs = (flag.partition("=") for flag in flags)
    return {key.removeprefix("--"): value for key, _, value in pairs}


def _check_exists(source: Source) -> None:
    path = source.path
    if not path.exists():
        raise PskdError(f"{path}: no such run or file of weights.")
    if path.is_dir():
        saved_settings(path)


def _check_holds_weights(source: Source) -> None:
    """Before anything is asked for; read again when all is known."""
    if source.model is not None or _described_beside(source.path) is None:
        read_weights(source.path)


def _of_run(source: Source, config: Config) -> Subject:
    run = source.path
    best = export_path(run, "best")
    if source.which == "last" and not (run / "result.json").is_file():
        if read_status(run).get("state") == "complete" or not best.is_file():
            read_complete(run, "result.json")
        state, remedy = standing(run)
        raise PskdError(
            f"{run} is not complete ({state}), so there is no last epoch. {remedy} Or evaluate "
            "--weights best, the best epoch as yet."
        )
    facts = facts_of(run, "last") if source.which == "last" else read_saved(best)
    network = models.build(facts["model"], facts["num_classes"])
    network.load_state_dict(facts["net"])
    about = read_preprocessing(run) or read_complete(run, "preprocessing.json")
    return Subject(network.eval(), facts["num_classes"], about, _inference_of(run, config))


def _inference_of(run: Path | None, config: Config) -> Inference:
    """As the run computed; in float32 without a run."""
    if run is None:
        return Inference()
    settings = read_complete(run, "ds_config.json")
    return Inference(deepspeed_config.precision(settings), config.engine.channels_last)


def _of_export(source: Source, config: Config) -> Subject:
    path, about = source.path, None
    beside = _described_beside(path)
    if beside is not None:
        facts, about = beside, beside["preprocessing"]
    else:
        facts = read_saved(path)
        if source.run is not None:
            about = read_preprocessing(source.run)
    if "model" not in facts or "num_classes" not in facts:
        raise PskdError(
            f"{path} does not say which network it holds, and no {path.name}.json lies beside: "
            f"--model NAME --weights {path} says it."
        )
    known(facts["model"], models.MODELS, f"{path}: model")
    network = models.build(facts["model"], facts["num_classes"])
    weights = weights_for(facts["model"], path)
    if beside is not None:
        check_written(path, weights, beside["weights_sha256"])
    wrong = difference(network.state_dict(), weights)
    if wrong is not None:
        raise PskdError(f"{path} does not hold a {facts['model']}: {wrong}.")
    network.load_state_dict(weights)
    inference = _inference_of(source.run, config)
    return Subject(network.eval(), facts["num_classes"], about, inference)


def _described_beside(path: Path) -> dict[str, Any] | None:
    """What `pskd export` wrote beside the file, if it is one of its state dicts."""
    facts: dict[str, Any] | None = read_run_json(path.with_name(path.name + ".json"))
    if facts is not None and facts.get("format") != "state-dict":
        raise PskdError(
            f"{path} is of format {facts.get('format')}: evaluate one of `pskd export --format "
            "state-dict`, or the run."
        )
    return facts


def _check_names(
    trained: list[str], found: tuple[str, ...], name: str, section: DataSection
) -> None:
    """Logits are matched with labels by number."""
    odd = [k for k, (a, b) in enumerate(zip(trained, found, strict=True)) if a != b]
    if not odd:
        return
    first = f"class {odd[0]} is {trained[odd[0]]!r} to it and {found[odd[0]]!r} in the data"
    if set(trained) == set(found):
        raise PskdError(
            f"{name} was trained on the classes of data.name {section.name} in another order: "
            f"{first}. Give the data the same order of classes."
        )
    log.warning("%s: other names of classes, which are matched by number: %s", name, first)


def _of(trained: list[float], own: tuple[float, ...]) -> tuple[float, ...]:
    """Of three channels; a grey data set's own figure where they say the same."""
    same = list(own) * (3 if len(own) == 1 else 1) == list(trained)
    return own if same else tuple(trained)
