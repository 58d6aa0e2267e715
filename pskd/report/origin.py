"""What a run was made from: its data in words, its recipe's figures.

Imports no torch.
"""

from collections.abc import Mapping
from typing import Any

from pskd import recipe


def described(data: Mapping[str, Any]) -> str:
    """The samples that a run is measured on, in words: runs that differ here do not compare."""
    root = f" {data.get('root')}" if data["name"] == "imagefolder" else ""
    held_out = f", {data['held_out']} held out" if data.get("held_out") else ""
    return f"{data['name']}{root}{held_out}"


def published(name: str | None) -> Mapping[str, float]:
    """The published figures of a recipe of the package; none for others."""
    return recipe.read(name).published if name in recipe.names() else {}
