"""`pskd report`: one run as a page, and its figures as files."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

from pskd.command_line import resolve
from pskd.errors import PskdError
from pskd.files import named_by, write_atomically
from pskd.metrics import Records
from pskd.report import figures, points
from pskd.report.origin import published, yaml_value
from pskd.report.page import Code, Drawing, Part, Section, Text, page
from pskd.report.run_files import Line, RunFiles, read
from pskd.report.table import MEASURE_COLUMNS, Table
from pskd.run_records import changes
from pskd.run_status import standing
from pskd.words import counted

if TYPE_CHECKING:  # at run time, only figures.py says what is missing
    from matplotlib.figure import Figure

_COLUMNS = (("training loss", "train_loss", 4), *MEASURE_COLUMNS)


class Plot(NamedTuple):
    """A figure, the name of its files, what it shows, and what to know about it."""

    name: str
    figure: "Figure"
    alt: str
    caption: str = ""


def report(run: Path, output: Path | None, bins: int | None) -> Path:
    """Write `index.html` and the figures (PNG, SVG) into `output`; returns the page's path.

    output: None: RUN/report. bins: of the reliability diagram; None: those of the run's ECE.

    Raises:
        PskdError: no run with a finished epoch, or nothing can be written there.
    """
    files = read(run)
    directory = output or run / "report"
    drawer = Drawer(directory)
    sections = [
        Section("Measures", _measures(files)),
        Section("Learning curves", [drawer(_learning_curves(files))]),
        Section("Schedules", [drawer(_schedules(files))]),
    ]
    if files.records is not None:
        sections += _of_predictions(files, files.records, bins or files.bins, drawer)
    sections += [
        Section("Throughput", _throughput(files, drawer)),
        Section("Configuration", _configuration(files)),
        Section("Environment", _environment(files)),
        Section("Starts", _starts(files)),
    ]
    path = directory / "index.html"
    with named_by("--output", path):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page(files.name, sections, _lead(files)).encode())
    return path


class Drawer:
    """Writes figures into a directory, and hands them on for the page."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, plot: Plot) -> Drawing:
        """Write both files."""
        text = figures.svg(plot.figure)
        with named_by("--output", self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self._directory / f"{plot.name}.svg", text.encode())
            write_atomically(self._directory / f"{plot.name}.png", figures.png(plot.figure))
        return Drawing(text, plot.alt, plot.caption)


def without_predictions(runs: Sequence[RunFiles]) -> str:
    """What runs without evaluation.npz have no figures of, and the remedy."""
    if not all(files.complete for files in runs):
        return (
            "Reliability, risk and coverage, confidences and the errors of classes are shown of "
            "complete runs only: they come from the last epoch's evaluation."
        )
    names = ", ".join(files.name for files in runs)
    they_were = f"{names} was" if len(runs) == 1 else "they were"
    remedies = ", ".join(f"`train.py --run.dir {files.path}`" for files in runs)
    return (
        f"Reliability, risk and coverage, confidences and the errors of classes of {names} are "
        f"left out: {they_were} completed by an older version, without evaluation.npz. {remedies} "
        "writes it, without training again."
    )


def _lead(files: RunFiles) -> list[Part]:
    model = files.settings.get("model", {}).get("name")
    method = files.settings.get("method", {}).get("name")
    seed = files.settings.get("train", {}).get("seed")
    parts: list[Part] = [Text(f"{model} on {files.data}, method {method}, seed {seed}.")]
    if not files.complete:
        state, remedy = standing(files.path)
        planned = files.settings.get("train", {}).get("epochs")
        text = f"Unfinished: {len(files.lines)} of {planned} epochs. The run is {state}."
        parts.append(Text(f"{text} {remedy}", True))
    if files.records is None:
        parts.append(Text(without_predictions([files]), True))
    return parts


def _measures(files: RunFiles) -> list[Part]:
    known = published(files.settings)
    columns: list[tuple[str, Line]] = [(f"epoch {files.last['epoch'] + 1}", files.last)]
    if files.best is not None and files.best["epoch"] != files.last["epoch"]:
        columns.append((f"best top-1 error: epoch {files.best['epoch'] + 1}", files.best))
    header = ["measure", *(title for title, _ in columns)]
    header += ["published"] if known else []
    rows = []
    for title, key, digits in _COLUMNS:
        row = [title, *(_number(line.get(key), digits) for _, line in columns)]
        if known:
            row.append(f"{known[key]:.2f}" if key in known else "-")
        rows.append(row)
    parts: list[Part] = [Table(header, rows)]
    if len(columns) == 1 and files.best is not None:
        parts.append(Text("The top-1 error was never lower."))
    if known:
        parts.append(Text(f"Published: of what recipe {files.recipe} repeats."))
    return parts


def _learning_curves(files: RunFiles) -> Plot:
    curves = figures.learning_curves({files.name: files.lines})
    return Plot("learning_curves", curves, "Loss and measures by epoch.")


def _schedules(files: RunFiles) -> Plot:
    drawn = figures.schedules(files.lines)
    return Plot("schedules", drawn, "Learning rate, and alpha of PS-KD, by epoch.")


def _of_predictions(files: RunFiles, records: Records, bins: int, drawer: Drawer) -> list[Section]:
    names = class_names(files, records)
    other = "" if bins == files.bins else f", where the run's own ECE has {files.bins}"
    calibration = Plot(
        "reliability",
        figures.reliability({files.name: records}, bins),
        "Accuracy by confidence, with the number of samples in each bin.",
        f"{counted(len(records), 'sample')} in {counted(bins, 'bin')}{other}; the dashed line is "
        "perfect calibration.",
    )
    confidences = Plot(
        "confidences",
        figures.confidences(records),
        "Histograms of the confidence of right and wrong predictions.",
        "How many right and wrong predictions were made with which confidence.",
    )
    risk = Plot(
        "risk_coverage",
        figures.risk_coverage({files.name: records}),
        "Risk by coverage, and its optimum.",
        "The error among the most confident samples; its mean is the AURC "
        f"({1000 * _mean_risk(records):.2f} x1000). Optimum: as many errors, all covered last.",
    )
    return [
        Section("Calibration", [drawer(calibration), drawer(confidences)]),
        Section("Risk and coverage", [drawer(risk)]),
        Section("Classes", _classes(records, names, drawer)),
    ]


def _mean_risk(records: Records) -> float:
    return float(points.risk_coverage(records)[1].mean())


def class_names(files: RunFiles, records: Records) -> Sequence[str]:
    """Names, or numbers where a run of an older version tells none."""
    if files.class_names is not None:
        return files.class_names
    largest = max(int(records.label_N.max()), int(records.prediction_N.max()))
    return [str(c) for c in range(largest + 1)]


def _classes(records: Records, names: Sequence[str], drawer: Drawer) -> list[Part]:
    count_C, wrong_C = points.class_errors(records, len(names))
    present_C = np.flatnonzero(count_C)
    error_C = 100 * wrong_C[present_C] / count_C[present_C]
    shown = [names[c] for c in present_C.tolist()]
    worst = present_C[np.argsort(-error_C, kind="stable")][: figures.NAMED_CLASSES]
    plot = Plot(
        "class_errors",
        figures.class_errors(error_C, shown),
        "The error of each class, the worst first.",
    )
    rows = [
        [
            names[c],
            f"{100 * wrong_C[c] / count_C[c]:.2f}",
            str(wrong_C[c]),
            str(count_C[c]),
            _taken_for(records, c, names),
        ]
        for c in worst.tolist()
    ]
    parts: list[Part] = [drawer(plot)]
    if len(shown) > len(worst):
        parts.append(Text(f"The worst {len(worst)} of {len(shown)} classes:"))
    header = ["class", "error %", "wrong", "samples", "most often taken for"]
    return [*parts, Table(header, rows)]


def _taken_for(records: Records, label: int, names: Sequence[str]) -> str:
    """The class that most of the wrong predictions for a class name."""
    wrong_N = (records.label_N == label) & (records.rank_N > 0)
    count_C = np.bincount(records.prediction_N[wrong_N].numpy(), minlength=len(names))
    most = int(count_C.argmax())
    return f"{names[most]} ({count_C[most]})" if count_C[most] else "-"


def _throughput(files: RunFiles, drawer: Drawer) -> list[Part]:
    rates = [line["images_per_s"] for line in files.lines]
    text = (
        f"Median {median(rates):.0f} images/s, from {min(rates):.0f} to {max(rates):.0f} in "
        "single epochs."
    )
    alt = "Images a second by epoch."
    for _, what, waited_s in points.waits(files.lines):
        text += f" The rank that waited longest for {what} waited {waited_s:.1f} s in all."
        alt = "Images a second, and waits, by epoch."
    plot = Plot("throughput", figures.throughput(files.lines), alt)
    return [drawer(plot), Text(text)]


def _configuration(files: RunFiles) -> list[Part]:
    text = yaml.safe_dump(dict(files.settings), sort_keys=False)
    parts: list[Part] = [Code(text.rstrip(), "All settings: config.yaml")]
    if files.recipe is None:
        return [Text("The run began with no recipe."), *parts]
    try:
        own = yaml.safe_load(resolve(["--recipe", files.recipe]).to_yaml())
    except PskdError:
        return [Text(f"Recipe {files.recipe}, which this version does not have."), *parts]
    rows = [
        [f"{section}.{key}", yaml_value(own[section].get(key)), yaml_value(value)]
        for section, values in files.settings.items()
        for key, value in values.items()
        if section in own and (section, key) != ("run", "recipe")
        if own[section].get(key) != value
    ]
    if not rows:
        return [Text(f"As recipe {files.recipe} has it."), *parts]
    differ = Text(f"Recipe {files.recipe}, but for:")
    return [differ, Table(["key", "recipe", "run"], rows), *parts]


def _environment(files: RunFiles) -> list[Part]:
    if not files.starts:
        return [Text("The run has no env.json.", notice=True)]
    facts = files.starts[-1]["facts"]
    rows = [[key, yaml_value(value)] for key, value in facts.items()]
    text = "At the last start." if len(files.starts) > 1 else "At the start."
    return [Text(text), Table(["what", "value"], rows)]


def _starts(files: RunFiles) -> list[Part]:
    rows = []
    before: Mapping[str, Any] | None = None
    for start in files.starts:
        facts = start["facts"]
        changed = [] if before is None else changes(before, facts)
        rows.append(
            [
                str(start["start"] + 1),
                time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(start["time"])),
                start["host"],
                " ".join(start["command"]),
                "; ".join(changed) or "-",
            ]
        )
        before = facts
    parts: list[Part] = [Table(["start", "UTC", "host", "command", "changed"], rows)]
    origin = files.starts[0].get("origin") if files.starts else None
    if origin:
        told = ", ".join(f"{key} {yaml_value(value)}" for key, value in origin.items())
        parts.append(Text(f"The run began from another one's checkpoint: {told}."))
    return parts


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
