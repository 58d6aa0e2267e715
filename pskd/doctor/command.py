"""`pskd doctor`: from its arguments to its exit code. Imports no torch before they are accepted."""

import os
import sys

from pskd import command_line, launch
from pskd.errors import EXIT_COMPLETE, EXIT_FAILED, AgreedError, PskdError

_TORCHRUN_PORT = 29500


def run(argv: list[str], master: str | None, timeout_s: int) -> int:
    """Look, and print; returns the exit code. argv: flags of train.py."""
    launched = launch.is_launched()
    if launched:
        launch.die_with_launcher()  # first of all: imports take seconds, and a launcher can die
    try:
        if timeout_s < 1:
            raise PskdError(f"--timeout {timeout_s}: use 1 second or more.")
        if master is not None and launched:
            raise PskdError(f"--master {master} is for a start without a launcher: leave it out.")
        where = None if master is None else _split(master)
        config = command_line.load(argv)
        from pskd.doctor.checks import Master, check  # noqa: PLC0415  (torch, DeepSpeed: 5 s)

        ready = check(config, None if where is None else Master(*where), timeout_s)
    except PskdError as error:
        # A node's ranks meet the same: its first one speaks.
        speaker = launch.rank() if isinstance(error, AgreedError) else launch.local_rank()
        if speaker > 0:
            launch.leave_the_last_word()
        else:
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
        if launched:
            os._exit(EXIT_FAILED)  # groups whose peers are gone may abort an orderly end
        return EXIT_FAILED
    return EXIT_COMPLETE if ready else EXIT_FAILED


def _split(master: str) -> tuple[str, int]:
    address, colon, port = master.partition(":")
    if not address or (colon and not (port.isdecimal() and 0 < int(port) < 1 << 16)):
        raise PskdError(f"--master {master}: use ADDRESS or ADDRESS:PORT, such as 10.0.0.1:29500.")
    return address, int(port or _TORCHRUN_PORT)
