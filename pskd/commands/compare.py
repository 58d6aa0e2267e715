"""`pskd compare`: complete runs side by side."""

import argparse
import sys
from pathlib import Path

from pskd.commands.report import add_bins
from pskd.errors import PskdError


def add_arguments(compare: argparse.ArgumentParser) -> None:
    """To the command's parser."""
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    compare.add_argument(
        "--by-recipe",
        action="store_true",
        help="one row for runs that differ in the seed alone: mean, deviation, published figure",
    )
    compare.add_argument(
        "--format",
        choices=["text", "markdown", "latex"],
        default="markdown",
        help="of the table (default: markdown; latex: for the package booktabs)",
    )
    compare.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with figures as well"
    )
    add_bins(compare)


def run(arguments: argparse.Namespace) -> None:
    """Print the table; write the page, if one is asked for.

    Raises:
        PskdError: a directory holds no complete run, or the page cannot be written.
    """
    if arguments.bins is not None and arguments.html is None:
        raise PskdError(f"--bins {arguments.bins} means nothing without --html: leave it out.")
    from pskd.report.compare import by_recipe, comparison, different_data
    from pskd.report.table import render

    table = (by_recipe if arguments.by_recipe else comparison)(arguments.runs)
    warning = different_data(arguments.runs)
    if arguments.html is not None:
        from pskd.report.compare_page import compare_page

        compare_page(arguments.runs, table, arguments.html, arguments.bins)
    print(render(table, arguments.format))
    if warning is not None:
        sys.stderr.write(f"warning: {warning}\n")
