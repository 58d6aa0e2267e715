"""`pskd report`: a run as a page with figures."""

import argparse
from pathlib import Path

from pskd.fields import at_least


def add_arguments(report: argparse.ArgumentParser) -> None:
    """To the command's parser."""
    report.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    report.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="for index.html and the figures (default: RUN/report)",
    )
    add_bins(report)


def add_bins(command: argparse.ArgumentParser) -> None:
    """Of figures, as `pskd compare` has them as well."""
    command.add_argument(
        "--bins",
        type=at_least(1, "--bins"),
        help="of reliability diagrams (default: those of the run's ECE)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write page and figures; print where the page is."""
    from pskd.report.run_page import report

    print(report(arguments.run, arguments.output, arguments.bins))
