"""`pskd import`: weights of public code for this program."""

import argparse
from pathlib import Path


def add_arguments(command: argparse.ArgumentParser) -> None:
    """To the command's parser."""
    command.add_argument("file", type=Path, metavar="FILE", help="a checkpoint or state dict")
    command.add_argument(
        "--model", required=True, metavar="NAME", help="the network, as model.name"
    )
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="OUT.pth",
        help="for --model.init and teachers",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the file; print where it is."""
    from pskd.export import import_public

    import_public(arguments.file, arguments.model, arguments.output)
    print(arguments.output)
