"""Runs side by side: the five measures of each, last epoch first, the best beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pskd.data.catalog import FOLDER
from pskd.data.sections import described
from pskd.errors import PskdError
from pskd.report.origin import changed, published
from pskd.report.table import PUBLISHED_COLUMNS, Table
from pskd.run_records import read_preprocessing, read_result, saved_settings
from pskd.words import counted


def comparison(runs: Sequence[Path]) -> Table:
    """Complete runs: their last epoch, and the best top-1 error.

    A cell is `value (published)` where the run's recipe has a published figure.

    Raises:
        PskdError: a directory holds no complete run.
    """
    names = labels(runs)
    known = [published(saved_settings(run)) for run in runs]
    rows = [_row(*each) for each in zip(runs, names, known, strict=True)]
    return Table(["run", "epochs", *_titles(known), "best top-1 error % (epoch)"], rows)


def by_recipe(runs: Sequence[Path]) -> Table:
    """The last epochs, one row for runs that differ in the seed alone, and the published figures.

    The row is called by the recipe, and by what the runs changed of it. A cell is
    `mean +- deviation (published)`; the deviation is that of a sample, and is left out for a single
    run.

    Raises:
        PskdError: a directory holds no complete run, or one that began with no recipe; or two runs
            of a row have the same seed.
    """
    groups: dict[tuple[str, str], dict[Path, dict[str, Any]]] = {}
    labels(runs)  # each once
    for run in runs:
        groups.setdefault(_settings(run), {})[run] = _result(run)["last"]
    rows, known = [], []
    for (recipe_name, changes), lasts in groups.items():
        _check_seeds(list(lasts))
        known.append(published(saved_settings(next(iter(lasts)))))
        name = ", ".join(part for part in (recipe_name, changes) if part)
        rows.append([name, str(len(lasts)), *_cells(list(lasts.values()), known[-1])])
    return Table(["recipe", "runs", *_titles(known)], rows)


def _settings(run: Path) -> tuple[str, str]:
    """(the recipe, what the run changed of it and what it was measured on)."""
    settings = saved_settings(run)
    changes = [f"{key} {value}" for key, value in changed(settings).items()]
    root = settings.get("data", {}).get("root")
    on = [f"data.root {root}"] if root is not None and settings["data"]["name"] == FOLDER else []
    return _recipe(run), ", ".join([*changes, *on])


def _check_seeds(runs: Sequence[Path]) -> None:
    """The deviation is that over seeds."""
    first: dict[int, Path] = {}
    for run in runs:
        seed = saved_settings(run).get("train", {}).get("seed")
        if seed in first:
            raise PskdError(
                f"{first[seed]} and {run} are runs of one recipe, its settings and seed {seed}, "
                "so they tell nothing of the deviation over seeds: name one of them."
            )
        if seed is not None:
            first[seed] = run


def _titles(known: Sequence[Mapping[str, float]]) -> list[str]:
    """Of the columns of measures; known: published figures of each row."""
    return [
        f"{title} (published)" if any(key in figures for figures in known) else title
        for title, key, _ in PUBLISHED_COLUMNS
    ]


def labels(runs: Sequence[Path]) -> list[str]:
    """What tells the runs apart: the names of their directories, or of equal ones the paths.

    Raises:
        PskdError: a directory is named twice.
    """
    places = [run.resolve() for run in runs]
    for k, (run, place) in enumerate(zip(runs, places, strict=True)):
        first = runs[places.index(place)]
        if places.index(place) < k:
            same = f"{first} and {run} are one run, which" if first != run else run
            raise PskdError(f"{same} is named twice: name each run once.")
    names = [place.name for place in places]
    return [
        str(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)
    ]


def different_data(runs: Sequence[Path]) -> str | None:
    """A warning if the runs were not measured on the same samples and classes, else None."""
    found: dict[str, list[str]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        found.setdefault(_measured_on(run), []).append(label)
    if len(found) < 2:
        return None
    what = "; ".join(f"{data}: {', '.join(names)}" for data, names in found.items())
    return f"These runs are of different data, so their measures do not compare ({what})."


def _measured_on(run: Path) -> str:
    text = described(saved_settings(run).get("data", {"name": "unnamed data"}))
    about = read_preprocessing(run)
    if about is None:  # of an older version
        return text
    return f"{text}, {counted(len(about['class_names']), 'class')}"


def _row(run: Path, label: str, known: Mapping[str, float]) -> list[str]:
    result = _result(run)
    last, best = result["last"], result["best"]
    best_cell = f"{best['top1_error']:.2f} ({best['epoch'] + 1})"
    return [label, str(last["epoch"] + 1), *_cells([last], known), best_cell]


def _cells(lasts: Sequence[dict[str, Any]], known: Mapping[str, float]) -> list[str]:
    return [
        _cell([last[key] for last in lasts], known.get(key), digits)
        for _, key, digits in PUBLISHED_COLUMNS
    ]


def _cell(values: list[float | None], published: float | None, digits: int) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    text = f"{mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ± {stdev(known):.{digits}f}"
    return text if published is None else f"{text} ({published:.2f})"


def _result(run: Path) -> dict[str, Any]:
    saved_settings(run)  # is it a run at all
    return read_result(run)


def _recipe(run: Path) -> str:
    name = saved_settings(run)["run"].get("recipe")
    if name is None:
        raise PskdError(
            f"{run} began with no recipe: `pskd compare` without --by-recipe shows each run."
        )
    return str(name)
