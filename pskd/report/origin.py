"""What a run was made from: its recipe's figures, and what it changed of the recipe.

Imports no torch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from pskd import recipe
from pskd.command_line import resolve
from pskd.config import section_types
from pskd.fields import default_of
from pskd.methods.sections import METHODS


def published(name: str | None) -> Mapping[str, float]:
    """The published figures of a recipe of the package; none for others."""
    return recipe.read(name).published if name in recipe.names() else {}


def changed(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What decides a run's result and is not as its recipe has it, by key, but for the seed.

    settings: of config.yaml. All that is not the default, if this version has no such recipe.
    """
    name = settings["run"].get("recipe")
    own = resolve(["--recipe", name]).flat() if name in recipe.names() else {}
    method = METHODS.get(settings.get("method", {}).get("name", ""))
    if method is None:
        return {}
    found = {}
    for section, kind in section_types(method):
        for field in dataclasses.fields(kind):
            key = f"{section}.{field.name}"
            before = own.get(key, default_of(field))
            value = settings.get(section, {}).get(field.name, before)
            if key == "model.init" and value is not None:
                value = "a file"  # each seed may have its own
            decides = field.metadata["tag"] in ("numerics", "content") and key != "train.seed"
            if decides and before not in (value, ""):  # which has to be named: a teacher
                found[key] = yaml_value(value)
    return found


def yaml_value(value: Any) -> str:
    """As in the YAML file, but texts without quotes."""
    if isinstance(value, str):
        return value
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()
