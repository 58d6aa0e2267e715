"""`pskd compare --html`: runs side by side as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pskd.config import fields_of
from pskd.fields import default_of
from pskd.files import named_by, write_atomically
from pskd.methods.sections import METHODS
from pskd.metrics import Records
from pskd.report import figures
from pskd.report.compare import different_data, labels
from pskd.report.origin import yaml_value
from pskd.report.page import Drawing, Part, Section, Text, page
from pskd.report.run_files import RunFiles, read
from pskd.report.run_page import without_predictions
from pskd.report.table import Table
from pskd.words import counted


def compare_page(runs: Sequence[Path], table: Table, output: Path, bins: int | None) -> None:
    """Write the page. table: of `compare.py`. bins: as for `pskd report`.

    Raises:
        PskdError: a directory holds no run, or `output` cannot be written.
    """
    files = dict(zip(labels(runs), map(read, runs), strict=True))
    curves = figures.learning_curves({name: run.lines for name, run in files.items()})
    sections = [
        Section("Measures", [table]),
        Section("Settings", _settings(files)),
        Section("Learning curves", [Drawing(figures.svg(curves), "Loss and measures by epoch.")]),
    ]
    records = {name: run.records for name, run in files.items() if run.records is not None}
    if records:
        sections += _of_predictions(records, bins or max(run.bins for run in files.values()))
    title = f"{counted(len(runs), 'run')} side by side"
    with named_by("--html", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page(title, sections, _lead(runs, files)).encode())


def _lead(runs: Sequence[Path], files: Mapping[str, RunFiles]) -> list[Part]:
    warning = different_data(runs)
    notices = [warning] if warning is not None else []
    without = [run for run in files.values() if run.records is None]
    notices += [without_predictions(without)] if without else []
    on = {run.data for run in files.values()}
    lead = [Text(f"Measured on {on.pop()}.")] if warning is None else []
    return [*lead, *(Text(notice, notice=True) for notice in notices)]


def _settings(files: Mapping[str, RunFiles]) -> list[Part]:
    """What differs between the runs, but for where they lie and how they were started."""
    flat = {
        name: {
            f"{section}.{key}": yaml_value(value)
            for section, values in run.settings.items()
            if section != "run"
            for key, value in values.items()
        }
        for name, run in files.items()
    }
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    defaults = {name: _defaults(run) for name, run in files.items()}
    rows = [
        [key, *(values.get(key, "-") for values in flat.values())]
        for key in keys
        if len({flat[name].get(key, defaults[name].get(key, "-")) for name in files}) > 1
    ]
    if not rows:
        return [Text("All runs have the same settings.")]
    return [Text("Where the runs differ:"), Table(["key", *files], rows)]


def _defaults(run: RunFiles) -> dict[str, str]:
    """What holds for keys that are younger than a run, by key; its method has its own."""
    method = METHODS.get(run.settings.get("method", {}).get("name", ""))
    if method is None:
        return {}
    return {key: yaml_value(default_of(field)) for key, field in fields_of(method).items()}


def _of_predictions(records: Mapping[str, Records], bins: int) -> list[Section]:
    calibration = Drawing(
        figures.svg(figures.reliability(records, bins)),
        "Accuracy by confidence of each run, with the number of samples in each bin.",
        f"{counted(bins, 'bin')}; the dashed line is perfect calibration.",
    )
    risk = Drawing(
        figures.svg(figures.risk_coverage(records)),
        "Risk by coverage of each run.",
        "The error among the most confident samples. Dotted: the optimum, as many errors, all of "
        "them covered last.",
    )
    return [Section("Calibration", [calibration]), Section("Risk and coverage", [risk])]
