"""From the command line to a `Config`: recipe, then --config files, then flags; later wins.

Each layer is turned into the flags that say the same, so one parser checks types everywhere.
Imports no torch, so that `--help` and a refusal take a fraction of a second.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse

from pskd import recipe
from pskd.config import Config, fields_of, section_types
from pskd.errors import PskdError
from pskd.fields import default_of, known
from pskd.ignored_options import ignored
from pskd.methods.sections import METHODS

_DEFAULT_METHOD = "pskd"

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
    "data_path": "--data.root",
    "workers": "--data.threads, for folders of images",
    "alpha_T": "--method.alpha_T",
    "saveckp_freq": "--checkpoint.export_every",
    "rank": "torchrun --node-rank",
    "world_size": "torchrun --nnodes and --nproc-per-node",
    "dist_url": "torchrun --master-addr and --master-port",
    "dist_backend": "nothing: nccl on GPUs, gloo on CPUs",
    "multiprocessing_distributed": "torchrun --nproc-per-node",
}
_SHORT = {
    "--deepspeed_config": "--engine.deepspeed_config",
    "--resume": "--run.resume",
    "--profile": "--run.profile",
}
_LAUNCHER_FLAGS = ("--local_rank", "--local-rank")  # set by `deepspeed`; we read the environment


class _Layer(NamedTuple):
    """Flags `--section.field=value`, and where they come from."""

    source: str
    tokens: list[str]


_OF_KIND = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a finite number",
    "list": "a list, such as [3,5]",
}


def is_empty(argv: list[str]) -> bool:
    """Whether nothing is given but what a launcher adds."""
    return _split(argv) == (None, [], [])


def load(argv: list[str]) -> Config:
    """Parse and check a command line.

    Raises:
        PskdError: unknown key (with a suggestion), wrong type, or a value out of range.
        SystemExit: after --help.
    """
    config = resolve(argv)
    config.check()
    return config


def resolve(argv: list[str]) -> Config:
    """As `load`, but values may be out of range, and what has to be named may be missing."""
    name, config_files, flags = _split(argv)
    if name is None and not config_files:
        config_files = _config_of_run(flags)
    layers = []
    if name is not None:
        layers += [_layer(*part) for part in recipe.read(name).parts]
        layers.append(_Layer("", [f"--run.recipe={name}"]))
    for path in config_files:
        layers += [_layer(*part) for part in recipe.read_file(Path(path)).parts]
    layers.append(_Layer("", [flag for flag in flags if flag != "--help"]))
    return _resolved(layers, flags)


def over(source: str, settings: Mapping[str, Any], flags: list[str]) -> Config:
    """Flags on top of the sections of a saved configuration; values may be out of range.

    Raises:
        PskdError: unknown key or wrong type; source: what `settings` are called then.
    """
    return _resolved([_layer(source, settings), _Layer("", _split(flags)[2])], [])


def _resolved(layers: list[_Layer], flags: list[str]) -> Config:
    method, layers = _choose_method(layers)
    if "--help" in flags:
        _parser(method).print_help()
        raise SystemExit(0)
    for layer in layers:
        _check_keys(layer, method)
    config = _configured(layers, method)
    overruled = _overruled(layers, config)
    if not overruled:
        return config
    kept = [_Layer(k.source, [t for t in k.tokens if _key(t) not in overruled]) for k in layers]
    return _configured(kept, method)


def _configured(layers: list[_Layer], method: str) -> Config:
    values = _parse([token for layer in layers for token in layer.tokens], method)
    return Config(**{s: kind(**values[s]) for s, kind in section_types(METHODS[method])})


def _overruled(layers: list[_Layer], config: Config) -> set[str]:
    """Options that a later layer leaves without effect: as that of another method's, they go.

    What has none by its own layer is refused by `Config.check`.
    """
    place = {_key(token): number for number, layer in enumerate(layers) for token in layer.tokens}
    return {
        key
        for key, by, _ in ignored(config.flat(), config.method.keeps_predictions)
        if place.get(key, -1) < max(place.get(name, -1) for name in by)
    }


def _key(token: str) -> str:
    """`section.field` of a flag; KEY+ appends to a list."""
    return token.partition("=")[0].removeprefix("--").removesuffix("+")


def _split(argv: list[str]) -> tuple[str | None, list[str], list[str]]:
    """Take --recipe, --config and the launchers' flags out; the rest are `section.field` flags."""
    name: str | None = None
    config_files: list[str] = []
    flags: list[str] = []
    queue = list(argv)
    while queue:
        flag, separator, value = queue.pop(0).partition("=")
        flag = _SHORT.get(flag, flag)
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
                name = value
            else:
                config_files.append(value)
        else:
            flags.append(flag + separator + value)
    return name, config_files, flags


def _config_of_run(flags: list[str]) -> list[str]:
    """A run that is resumed without recipe or file brings its own configuration."""
    given = dict(flag.partition("=")[::2] for flag in flags)
    candidates = [Path(given["--run.dir"])] if "--run.dir" in given else []
    if "--run.resume" in given:
        source = Path(given["--run.resume"])  # a run, or RUN/checkpoints/NAME
        candidates += [source, source.parent.parent]
    found = [str(path / "config.yaml") for path in candidates if (path / "config.yaml").is_file()]
    return found[:1]


def _layer(source: str, settings: Mapping[str, Any]) -> _Layer:
    tokens = []
    for section, values in settings.items():
        if not isinstance(values, dict):
            raise PskdError(
                f"{source}: '{section}' must be a section, such as '{section}: {{name: ...}}'."
            )
        for name, value in values.items():
            plain = isinstance(value, str | date)  # YAML reads 2026-01-31 as a date
            text = str(value) if plain else json.dumps(value, default=str)
            tokens.append(f"--{section}.{name}={text}")
    return _Layer(source, tokens)


def _choose_method(layers: list[_Layer]) -> tuple[str, list[_Layer]]:
    """The method decides which keys its section has, so it is read before the rest.

    A layer that names another method drops what earlier layers said of theirs.
    """
    method = _DEFAULT_METHOD
    kept: list[_Layer] = []
    for layer in layers:
        names = [t.partition("=")[2] for t in layer.tokens if t.startswith("--method.name=")]
        if names and names[-1] != method:
            method = names[-1]
            known(method, METHODS, "method.name")
            kept = [
                _Layer(k.source, [t for t in k.tokens if not t.startswith("--method.")])
                for k in kept
            ]
        kept.append(layer)
    return method, kept


def _keys(method: str) -> Mapping[str, dataclasses.Field[Any]]:
    return fields_of(METHODS[method])


def _check_keys(layer: _Layer, method: str) -> None:
    prefix = f"{layer.source}: " if layer.source else ""
    for token in layer.tokens:
        if not token.startswith("--"):
            raise PskdError(f"'{token}' is not a flag. Use --section.field VALUE; see --help.")
        name = token.partition("=")[0].removeprefix("--")
        if _key(token) not in _keys(method):
            raise PskdError(prefix + _unknown_key(name, method))
        if "=" not in token:
            raise PskdError(f"--{name} needs a value: --{name} VALUE.")


def _unknown_key(name: str, method: str) -> str:
    if name in _PUBLIC_FLAGS:
        ours = _PUBLIC_FLAGS[name]
        return f"unknown key '{name}' (a flag of the public code). Here it is {ours}."
    owners = [m for m in METHODS if name in _keys(m)]
    if owners:
        return (
            f"unknown key '{name}': it belongs to method {' and '.join(owners)}, "
            f"but method.name is {method}."
        )
    keys = list(_keys(method))
    section, _, field = name.rpartition(".")
    initials = "".join(word[:1] for word in field.split("_"))  # learning_rate: lr
    near = [k for k in keys if k == f"{section}.{initials}"]
    near += difflib.get_close_matches(name, keys, n=1, cutoff=0.6)
    near += [k for k in keys if k.rpartition(".")[2] == name.rpartition(".")[2]]
    hint = f" Did you mean '{near[0]}'?" if near else " See --help for the keys."
    return f"unknown key '{name}'.{hint}"


def _parser(method: str) -> Any:
    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s [--recipe NAME] [--config FILE.yaml] [--section.field VALUE ...]",
        description="Train an image classifier. Later wins: recipe, --config files, flags. "
        "`pskd recipes` lists the recipes; digits-pskd needs no data of your own.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    for section, kind in section_types(METHODS[method]):
        group = parser.add_argument_group(section, (kind.__doc__ or "").strip())
        for f in dataclasses.fields(kind):
            text = f"{f.metadata['help']} [{f.metadata['tag']}]"
            flag, default = f"--{section}.{f.name}", default_of(f)
            group.add_argument(flag, type=f.type, default=default, help=text)
    return parser


def _parse(tokens: list[str], method: str) -> dict[str, Any]:
    try:
        return dict(_parser(method).parse_args(tokens).as_dict())
    except jsonargparse.ArgumentError as error:
        message = " ".join(str(error).replace("Parser key ", "").split())
        message = re.sub(r"a <class '(\w+)'>|a typing\.Literal", r"\1", message)
        wrong = re.fullmatch(r'"(\S+)": Expected (\w+|\[.*\])\. Got value:(.*)', message)
        if wrong is None:
            raise PskdError(f"{message}.") from error
        key, kind, value = wrong.groups()
        remedy = _OF_KIND.get(kind, f"one of {kind.strip('[]')}")
        raise PskdError(f"{key} is {value.strip() or 'empty'}: use {remedy}.") from error
