"""`pskd store info | verify`: the past predictions of a run."""

import argparse
from pathlib import Path

from pskd.errors import PskdError


def add_arguments(store: argparse.ArgumentParser) -> None:
    """To the command's parser."""
    actions = store.add_subparsers(required=True, metavar="ACTION")
    for name, action, text in (
        ("info", _info, "which generations there are, and who names them"),
        ("verify", _verify, "read every row and compare its checksum"),
    ):
        parser = actions.add_parser(name, help=text)
        parser.add_argument("directory", type=Path, metavar="DIR", help="a run, or its store/")
        parser.set_defaults(action=action)


def run(arguments: argparse.Namespace) -> None:
    """Print what there is, or what is damaged.

    Raises:
        PskdError: no past predictions there, or damaged ones.
    """
    arguments.action(arguments.directory)


def _info(directory: Path) -> None:
    from pskd.report.store import info

    print(info(directory))


def _verify(directory: Path) -> None:
    from pskd.report.store import verify

    damaged = 0
    for what, damage in verify(directory):
        print(f"{'ok' if damage is None else 'DAMAGED':8} {what}")
        if damage is not None:
            damaged += 1
            print(f"         {damage}")
    if damaged:
        raise PskdError(f"{damaged} of the files of {directory} are damaged or missing.")
