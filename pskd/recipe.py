"""Recipes: the settings of a run by name, each on top of the one `base:` that it may name.

A file holds the sections of `config.py`, and beside them

    base:       whose settings it begins with: another recipe's name; in a file of one's own, also
                the path of another file (x.yaml), relative to it
    source:     where the settings come from: a publication, public code, or 'ours'
    published:  the measures that the document reports for it, see `PUBLISHED_MEASURES`

Imports no torch.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pskd.errors import PskdError
from pskd.fields import known
from pskd.files import yaml_defect
from pskd.methods.sections import METHODS

PUBLISHED_MEASURES = ("top1_error", "top5_error", "nll", "ece", "aurc")


class Part(NamedTuple):
    """One file of a chain of bases: what it is called in messages, and its sections."""

    label: str
    sections: dict[str, Any]


class Recipe(NamedTuple):
    """parts: the bases first. published: measure -> value; empty if the document has no such row.

    Source and published are those of the file itself, and not of its bases.
    """

    parts: list[Part]
    source: str
    published: dict[str, float]


def names() -> list[str]:
    """The recipes that the package holds, sorted."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if _is_yaml(p.name))


def table(prefix: str) -> list[str]:
    """The recipes whose names begin so, by what they train and then by method.

    Raises:
        PskdError: there is none.
    """
    found = [name for name in names() if name.startswith(prefix)]
    if not found:
        known(prefix, names(), "recipe")
    return sorted(found, key=_place)


def _place(name: str) -> tuple[list[str], int, list[str]]:
    words = name.split("-")
    at = next((i for i, word in enumerate(words) if word in METHODS), len(words))
    method = list(METHODS).index(words[at]) if at < len(words) else -1
    return words[:at], method, words[at + 1 :]


def read(name: str) -> Recipe:
    """A recipe of the package.

    Raises:
        PskdError: unknown (with a suggestion), or bases that go in a circle.
    """
    known(name, names(), "--recipe")
    return _read(name)


def read_file(path: Path) -> Recipe:
    """A file of one's own.

    Raises:
        PskdError: not there, no YAML, or a base that is unknown or goes in a circle.
    """
    return _read(path)


def _read(first: str | Path) -> Recipe:
    chain: list[str | Path] = []
    contents: list[dict[str, Any]] = []
    reference: str | Path | None = first
    while reference is not None:
        if reference in chain:
            circle = " -> ".join(map(str, [*chain, reference]))
            raise PskdError(f"{_label(first)}: the bases go in a circle: {circle}. Cut it.")
        chain.append(reference)
        contents.append(_content(reference))
        reference = _base(reference, contents[-1].pop("base", None))
    facts = [_facts(reference, content) for reference, content in zip(chain, contents, strict=True)]
    parts = [Part(_label(r), content) for r, content in zip(chain, contents, strict=True)]
    return Recipe(parts[::-1], *facts[0])


def _content(reference: str | Path) -> dict[str, Any]:
    label = _label(reference)
    try:
        if isinstance(reference, Path):
            content = yaml.safe_load(reference.read_text())
        else:
            content = yaml.safe_load((_folder() / f"{reference}.yaml").read_text())
    except OSError as error:
        raise PskdError(f"{label}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PskdError(f"{label} is not YAML ({yaml_defect(error)}).") from error
    if not isinstance(content, dict):
        raise PskdError(f"{label} must hold sections such as 'train: {{epochs: 10}}'.")
    return content


def _base(owner: str | Path, base: Any) -> str | Path | None:
    if base is None:
        return None
    if isinstance(owner, Path) and isinstance(base, str) and _is_yaml(base):
        return (owner.parent / base).resolve()
    known(str(base), names(), f"{_label(owner)}: base")
    return str(base)


def _facts(reference: str | Path, content: dict[str, Any]) -> tuple[str, dict[str, float]]:
    source, published = content.pop("source", ""), content.pop("published", {})
    label = _label(reference)
    if not isinstance(source, str) or not isinstance(published, dict):
        raise PskdError(f"{label}: source must be a text, published {{measure: value}}.")
    for measure, value in published.items():
        known(str(measure), PUBLISHED_MEASURES, f"{label}: published")
        if not isinstance(value, int | float):
            raise PskdError(f"{label}: published.{measure} is {value}: give a number.")
    return source, published


def _label(reference: str | Path) -> str:
    return f"--config {reference}" if isinstance(reference, Path) else f"recipe {reference}"


def _folder() -> Any:
    return files("pskd.recipes")


def _is_yaml(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))
