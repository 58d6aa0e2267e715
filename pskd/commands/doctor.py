"""`pskd doctor`: from its arguments to its exit code. Imports no torch before they are accepted."""

import argparse

from pskd import launch
from pskd.errors import EXIT_COMPLETE, EXIT_FAILED, PskdError
from pskd.fields import at_least

_TORCHRUN_PORT = 29500


def add_arguments(doctor: argparse.ArgumentParser) -> None:
    """To the command's parser; flags of train.py are taken apart before."""
    doctor.usage = "%(prog)s [--master ADDRESS[:PORT]] [--timeout S] [flags of train.py]"
    doctor.description = (
        "Says on one page whether this machine can run a training, and what to do where it cannot. "
        "Takes the flags of train.py; changes nothing. On all nodes together: scripts/torchrun.sh "
        "--doctor, torchrun ... -m pskd.cli doctor ..., or torchrun ... --no-python pskd doctor "
        "...; `deepspeed --module` as well."
    )
    doctor.add_argument(
        "--master",
        metavar="ADDRESS[:PORT]",
        help="without a launcher: look whether this node reaches the master of a coming one "
        "(default port: 29500)",
    )
    doctor.add_argument(
        "--timeout",
        type=at_least(1, "--timeout"),
        default=60,
        metavar="S",
        help="seconds after which other ranks count as out of reach (default: 60)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Look, and print; returns the exit code. settings: flags of train.py.

    Raises:
        PskdError: a flag that cannot be, or ranks that do not come together.
    """
    master, timeout_s = arguments.master, arguments.timeout
    if master is not None and launch.is_launched():
        raise PskdError(f"--master {master} is for a start without a launcher: leave it out.")
    where = None if master is None else _split(master)
    from pskd import command_line

    config = command_line.load(arguments.settings)
    from pskd.doctor.checks import Master, check

    ready = check(config, None if where is None else Master(*where), timeout_s)
    return EXIT_COMPLETE if ready else EXIT_FAILED


def _split(master: str) -> tuple[str, int]:
    address, colon, port = master.partition(":")
    if not address or (colon and not (port.isdecimal() and 0 < int(port) < 1 << 16)):
        raise PskdError(f"--master {master}: use ADDRESS or ADDRESS:PORT, such as 10.0.0.1:29500.")
    return address, int(port or _TORCHRUN_PORT)
