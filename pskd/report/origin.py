"""What a run was made from: its recipe's figures, and what it changed of the recipe.

Imports no torch.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from pskd import recipe
from pskd.command_line import resolve
from pskd.config import fields_of
from pskd.fields import default_of
from pskd.methods.sections import METHODS

_OF_FILES = ("model.init", "method.teacher")
_OF_FIGURES = ("data.name", "data.limit", "data.held_out", "model.name", "train.epochs")
_DECIDE = ("evaluation.precision",)  # what is measured, not what is trained


def published(settings: Mapping[str, Mapping[str, Any]]) -> Mapping[str, float]:
    """The published figures of a run's recipe; none if it is not one of the package, or the run has
    another task, network, method or number of epochs. settings: of config.yaml.
    """
    name = settings["run"].get("recipe")
    if name not in recipe.names():
        return {}
    another = any(key in _OF_FIGURES or key.startswith("method.") for key in changed(settings))
    return {} if another else recipe.read(name).published


def changed(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What decides a run's result and is not as its recipe has it, by key, but for the seed.

    settings: of config.yaml. Which file of weights a run began with, or was taught by, is not told
    apart, as each seed may have its own. All that is not the default, if this version has no such
    recipe.
    """
    name = settings["run"].get("recipe")
    own = resolve(["--recipe", name]).flat() if name in recipe.names() else {}
    of_run = dict(settings.get("method", {}))
    method = of_run.get("name", own.get("method.name", "pskd"))
    if method != own.get("method.name"):  # options of the same name mean something else
        own = {k: v for k, v in own.items() if k == "method.name" or not k.startswith("method.")}
    found = {} if settings["run"].get("resume") is None else {"run.resume": "a run"}
    if method not in METHODS:  # of a program of one's own
        found |= {f"method.{key}": yaml_value(value) for key, value in of_run.items()}
    for key, field in fields_of(METHODS.get(method, METHODS["pskd"])).items():
        section, _, _ = key.partition(".")
        if section == "method" and method not in METHODS:
            continue
        before = own.get(key, default_of(field))
        value = settings.get(section, {}).get(field.name, before)
        if key in _OF_FILES and field.type in (str, str | None) and value:
            value = "a file"
            before = "a file" if before == "" else before  # has to be named
        decides = field.metadata["tag"] in ("numerics", "content") or key in _DECIDE
        if decides and key != "train.seed" and value != before:
            found[key] = yaml_value(value)
    return found


def yaml_value(value: Any) -> str:
    """As in the YAML file, but texts without quotes."""
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()
