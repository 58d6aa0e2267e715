"""`pskd inspect`: its arguments and the work. What takes long to import waits until asked for."""

import argparse
from pathlib import Path

from pskd.fields import at_least


def add_arguments(inspect: argparse.ArgumentParser) -> None:
    """To the command's parser; `--data.root=DIR` and the like are taken apart before."""
    inspect.description = (
        "Hard samples, probable label errors, forgotten samples and confused classes, from the "
        "past predictions of a PS-KD run. --data.root DIR names data that were moved."
    )
    inspect.add_argument("run", type=Path, metavar="RUN", help="the directory of a run")
    inspect.add_argument(
        "--output", type=Path, metavar="DIR", help="where files go (default: RUN/inspect)"
    )
    inspect.add_argument(
        "--top",
        type=at_least(1, "--top"),
        default=10,
        metavar="K",
        help="so many of each are printed (default: 10)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the files; print what was found. settings: where the data are now, see `open_run`.

    Raises:
        PskdError: nothing to look at, with the reason; files cannot be written.
    """
    from pskd.inspection.findings import find
    from pskd.inspection.source import open_run
    from pskd.report.inspection import text, write
    from pskd.report.inspection_page import inspection_page

    findings = find(open_run(arguments.run, arguments.settings))
    place = arguments.output or arguments.run / "inspect"
    write(findings, place, arguments.top, inspection_page(findings, arguments.top))
    print(f"{text(findings, arguments.top)}\n\nThe page: {place / 'index.html'}; tables beside it.")
