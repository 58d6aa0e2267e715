"""Tagged configuration fields, and the checks that sections share.

Every field says what a change of it means for a run that is resumed in place: `numerics` changes
the result and is refused; so is `content`, the name of a file of which the content counts; `speed`
and `output` do not change the result and are allowed.
"""

import difflib
from collections.abc import Callable, Collection
from dataclasses import Field, field
from typing import Any

from pskd.errors import PskdError

_MOST_SHOWN = 20


def _tagged(tag: str) -> Callable[[Any, str], Any]:
    def make(default: Any, help: str) -> Any:
        metadata = {"tag": tag, "help": help}
        if isinstance(default, list):
            return field(default_factory=lambda: list(default), metadata=metadata)
        return field(default=default, metadata=metadata)

    return make


TAGS = ("numerics", "content", "speed", "output")
numerics = _tagged("numerics")
content = _tagged("content")
speed = _tagged("speed")
output = _tagged("output")


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise a PskdError that names key, value and remedy unless the condition holds."""
    if not condition:
        raise PskdError(f"{key} is {value}: {remedy}")


def at_least(least: int, flag: str) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on.

    Raises:
        PskdError: a smaller one; names the flag.
    """

    def count(text: str) -> int:
        value = int(text)
        require(value >= least, flag, value, f"use {least} or more.")
        return value

    count.__name__ = "int"  # argparse says so of what is no number
    return count


def known(name: str, choices: Collection[str], key: str) -> None:
    """Raise a PskdError with a suggestion unless `name` is one of the choices."""
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
        hint = f": did you mean '{near[0]}'?" if near else "."
        shown = sorted(choices)
        if len(shown) > _MOST_SHOWN:
            close = difflib.get_close_matches(name, choices, n=_MOST_SHOWN, cutoff=0.2)
            shown = [*(close or shown[:_MOST_SHOWN]), "..."]
        raise PskdError(f"{key} '{name}' is unknown{hint} Known: {', '.join(shown)}.")


def default_of(of: Field[Any]) -> Any:
    """The default of a field of a section."""
    return of.default_factory() if callable(of.default_factory) else of.default
