"""Runs side by side: the five measures of each, last epoch first, the best beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from pskd import recipe
from pskd.errors import PskdError
from pskd.report.table import MEASURE_COLUMNS, markdown


def comparison(runs: Sequence[Path]) -> str:
    """A table in Markdown of complete runs: their last epoch, and the best top-1 error.

    Raises:
        PskdError: a directory holds no complete run.
    """
    titles = [title for title, _, _ in MEASURE_COLUMNS]
    header = ["run", "epochs", *titles, "best top-1 error % (epoch)"]
    return markdown(header, [_row(run) for run in runs])


def by_recipe(runs: Sequence[Path]) -> str:
    """A table in Markdown of the last epochs, one row a recipe, and the published figures.

    A cell is `mean +- deviation (published)` over the runs of the recipe; the deviation is that of
    a sample, and is left out for a single run.

    Raises:
        PskdError: a directory holds no complete run, or one that began with no recipe.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(_recipe(run), []).append(_result(run)["last"])
    header = ["recipe", "runs", *(title for title, _, _ in MEASURE_COLUMNS)]
    rows = []
    for name, lasts in groups.items():
        published = recipe.read(name).published
        cells = [
            _cell([last[key] for last in lasts], published.get(key), digits)
            for _, key, digits in MEASURE_COLUMNS
        ]
        rows.append([name, str(len(lasts)), *cells])
    return markdown(header, rows)


def _row(run: Path) -> list[str]:
    result = _result(run)
    last, best = result["last"], result["best"]
    cells = [_cell([last[key]], None, digits) for _, key, digits in MEASURE_COLUMNS]
    best_cell = f"{best['top1_error']:.2f} ({best['epoch'] + 1})"
    return [run.name, str(last["epoch"] + 1), *cells, best_cell]


def _cell(values: list[float | None], published: float | None, digits: int) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    text = f"{mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ± {stdev(known):.{digits}f}"
    return text if published is None else f"{text} ({published:.2f})"


def _result(run: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads((run / "result.json").read_text())
    except OSError as error:
        raise PskdError(
            f"{run} holds no complete run ({error.strerror}: result.json). "
            f"`train.py --run.dir {run}` resumes it."
        ) from error
    return result


def _recipe(run: Path) -> str:
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text())
        name = settings["run"].get("recipe")
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise PskdError(f"{run / 'config.yaml'} cannot be read: {error}.") from error
    if name is None:
        raise PskdError(
            f"{run} began with no recipe: `pskd compare` without --by-recipe shows each run."
        )
    return str(name)
