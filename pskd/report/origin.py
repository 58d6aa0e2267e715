"""What a run was made from: its saved configuration, its data in words, its recipe's figures.

Imports no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pskd import recipe
from pskd.errors import PskdError

Sections = Mapping[str, Mapping[str, Any]]


def saved_settings(run: Path) -> Sections:
    """The sections of config.yaml.

    Raises:
        PskdError: there is none, or it is damaged.
    """
    path = run / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise PskdError(
            f"{run} is no run directory ({error.strerror}: config.yaml). Name one that training "
            "has made."
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise PskdError(f"{path} cannot be read: {error}. Restore it.") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("run"), dict):
        raise PskdError(f"{path} holds no sections of a run's configuration. Restore it.")
    sections: Sections = settings
    return sections


def described(data: Mapping[str, Any]) -> str:
    """The samples that a run is measured on, in words: runs that differ here do not compare."""
    root = f" {data.get('root')}" if data["name"] == "imagefolder" else ""
    held_out = f", {data['held_out']} held out" if data.get("held_out") else ""
    return f"{data['name']}{root}{held_out}"


def published(name: str | None) -> Mapping[str, float]:
    """The published figures of a recipe of the package; none for others."""
    return recipe.read(name).published if name in recipe.names() else {}
