"""Row encodings by name. Imports no torch, so that `--help` is fast."""

import re
from importlib import import_module
from typing import TYPE_CHECKING

from pskd.fields import known

if TYPE_CHECKING:
    from pskd.store.encoding import Encoding

# name -> (module, class); an encoding of one's own can be added from outside.
ENCODINGS: dict[str, tuple[str, str]] = {
    "float16": ("pskd.store.encoding", "Float16"),
    "float32": ("pskd.store.encoding", "Float32"),
    "uint8-log": ("pskd.store.encoding", "Uint8Log"),
}
_TOP = re.compile(r"top([1-9]\d*)")


def check_encoding(name: str) -> None:
    """Refuse an unknown encoding.

    Raises:
        PskdError: with a suggestion.
    """
    if not _TOP.fullmatch(name):
        known(name, [*ENCODINGS, "top20", "top50"], "store.encoding")


def create_encoding(name: str) -> "Encoding":
    """The encoding of a name; `top<k>` keeps the k largest classes.

    Raises:
        PskdError: unknown.
    """
    check_encoding(name)
    top = _TOP.fullmatch(name)
    module, kind = ("pskd.store.encoding", "TopK") if top else ENCODINGS[name]
    encoding: Encoding = getattr(import_module(module), kind)(*([int(top[1])] if top else []))
    return encoding
