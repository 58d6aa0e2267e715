"""Parse, run, exit code. A refused command line costs no torch import."""

import sys
from typing import NoReturn

from pskd import launch
from pskd.errors import EXIT_FAILED, PskdError


def main(argv: list[str]) -> int:
    """Train; returns the exit code. A node's ranks have one command line: its first one speaks."""
    if launch.is_launched():
        launch.die_with_launcher()  # first of all: imports take seconds, and a launcher can die
    from pskd import command_line  # noqa: PLC0415

    try:
        if command_line.is_empty(argv):
            raise PskdError(
                "nothing is given to train: --recipe NAME is the least (`pskd recipes` lists "
                "them; digits-pskd needs no data). See --help."
            )
        config = command_line.load(argv)
    except PskdError as error:
        launch.refuse(error)
        return EXIT_FAILED
    from pskd import job  # noqa: PLC0415  (torch and DeepSpeed: 5 s)

    return job.run(config)


def run() -> NoReturn:
    """The whole of train.py, and of a program of one's own: train by its arguments, and exit."""
    launch.end(main(sys.argv[1:]))
