"""`pskd inspect`: its arguments and the work. What takes long to import waits until asked for."""

import argparse
from pathlib import Path

from pskd.errors import PskdError


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
        "--top", type=int, default=10, metavar="K", help="so many of each are printed (default: 10)"
    )


def inspect(run: Path, settings: list[str], output: Path | None, top: int) -> str:
    """Write the files; returns what is printed.

    settings: where the data are now, see `open_run`. output: None: RUN/inspect. top: so many of
    each list are printed.

    Raises:
        PskdError: nothing to look at, with the reason; files cannot be written.
    """
    if top < 1:
        raise PskdError(f"--top is {top}: use 1 or more.")
    from pskd.inspection.findings import find  # noqa: PLC0415
    from pskd.inspection.source import open_run  # noqa: PLC0415
    from pskd.report.inspection import text, write  # noqa: PLC0415
    from pskd.report.inspection_page import inspection_page  # noqa: PLC0415

    findings = find(open_run(run, settings))
    place = output or run / "inspect"
    write(findings, place, top, inspection_page(findings, top))
    return f"{text(findings, top)}\n\nThe page: {place / 'index.html'}; tables beside it."
