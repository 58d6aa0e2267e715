"""`pskd index`: look at a folder of images, once. The work: `indexing.py`."""

import argparse
from pathlib import Path

from pskd.fields import at_least


def add_arguments(index: argparse.ArgumentParser) -> None:
    """To the command's parser."""
    index.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="DIR/<class>/<image>; or a folder of two such folders, train and val",
    )
    index.add_argument(
        "--index-path",
        type=Path,
        metavar="FILE",
        help="where the index goes (default: DIR/.pskd-index, else ~/.cache/pskd)",
    )
    index.add_argument(
        "--drop-bad", action="store_true", help="leave out files of no use, do not refuse them"
    )
    index.add_argument(
        "--verify", action="store_true", help="decode every file and compare it with the index"
    )
    index.add_argument(
        "--ground-truth",
        type=Path,
        metavar="FILE",
        help="ILSVRC2012_validation_ground_truth.txt, for a flat DIR or for val; needs --classes",
    )
    index.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names in the order of their integers: meta.mat, or a text file",
    )
    index.add_argument("--list", type=Path, metavar="FILE", help="lines `path label`")
    index.add_argument(
        "--workers",
        type=at_least(1, "--workers"),
        metavar="K",
        help="processes that read (default: one a core)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Index, and print a report of each folder."""
    from pskd.commands.indexing import reports

    for report in reports(arguments):
        print(report)
