"""Parse, run, exit code. A refused command line costs no torch import."""

import sys

from pskd import launch
from pskd.errors import EXIT_FAILED, PskdError


def main(argv: list[str]) -> int:
    """Train; returns the exit code. A node's ranks have one command line: its first one speaks."""
    if launch.is_launched():
        launch.die_with_launcher()  # first of all: imports take seconds, and a launcher can die
    from pskd import command_line  # noqa: PLC0415

    try:
        config = command_line.load(argv)
    except PskdError as error:
        if launch.local_rank() > 0:
            launch.leave_the_last_word()
        else:
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
        return EXIT_FAILED
    from pskd import job  # noqa: PLC0415  (torch and DeepSpeed: 5 s)

    return job.run(config)
