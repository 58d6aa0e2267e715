"""`pskd export`: a run's network for other programs."""

import argparse
from pathlib import Path


def add_arguments(export: argparse.ArgumentParser) -> None:
    """To the command's parser."""
    export.add_argument("run", type=Path, metavar="RUN", help="the directory of a complete run")
    export.add_argument(
        "--weights", choices=["last", "best"], default="last", help="of which epoch (default: last)"
    )
    export.add_argument(
        "--format",
        choices=["state-dict", "torch-export", "onnx"],
        default="state-dict",
        help="for load_state_dict, torch.export.load or ONNX (default: state-dict)",
    )
    export.add_argument(
        "--output", type=Path, metavar="FILE", help="default: in RUN/exports, named by the network"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the file and the JSON beside it; print where they are."""
    from pskd.export import export

    written = export(
        arguments.run, which=arguments.weights, kind=arguments.format, output=arguments.output
    )
    print("\n".join(map(str, written)))
