"""`pskd health`: whether a run is alive, as exit code 0 or 1."""

import argparse
import os
from pathlib import Path

from pskd.errors import PskdError
from pskd.health import STALE_S, check


def add_arguments(health: argparse.ArgumentParser) -> None:
    """To the command's parser."""
    health.description = (
        "Exit code 0: the run lives, is stopped or complete, or has not begun yet, as in a "
        "container that starts. 1: it failed, or says nothing any more."
    )
    health.add_argument(
        "run",
        type=Path,
        nargs="?",
        metavar="RUN",
        help="the run directory (default: the environment's PSKD_RUN_DIR)",
    )
    health.add_argument(
        "--stale-s",
        type=float,
        default=STALE_S,
        metavar="S",
        help=f"how old its heartbeat may be, in seconds (default: {STALE_S:g})",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print what the run does.

    Raises:
        PskdError: it failed, or says nothing any more.
    """
    path = arguments.run or os.environ.get("PSKD_RUN_DIR")
    if not path:
        raise PskdError("pskd health needs RUN, a run directory, or PSKD_RUN_DIR.")
    print(check(Path(path), arguments.stale_s))
