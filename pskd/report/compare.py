"""Runs side by side: the five measures of each, last epoch first, the best beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pskd.errors import PskdError

_COLUMNS = (
    ("top-1 error %", "top1_error", 2),
    ("top-5 error %", "top5_error", 2),
    ("NLL", "nll", 4),
    ("ECE %", "ece", 2),
    ("AURC x1000", "aurc", 2),
)


def comparison(runs: Sequence[Path]) -> str:
    """A table in Markdown of complete runs: their last epoch, and the best top-1 error.

    Raises:
        PskdError: a directory holds no complete run.
    """
    header = ["run", "epochs", *(title for title, _, _ in _COLUMNS), "best top-1 error % (epoch)"]
    rows = [header, *(_row(run) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _row(run: Path) -> list[str]:
    try:
        result: dict[str, Any] = json.loads((run / "result.json").read_text())
    except OSError as error:
        raise PskdError(
            f"{run} holds no complete run ({error.strerror}: result.json). "
            f"`train.py --run.dir {run}` resumes it."
        ) from error
    last, best = result["last"], result["best"]
    cells = ["-" if last[key] is None else f"{last[key]:.{digits}f}" for _, key, digits in _COLUMNS]
    best_cell = f"{best['top1_error']:.2f} ({best['epoch'] + 1})"
    return [run.name, str(last["epoch"] + 1), *cells, best_cell]
