"""What `pskd evaluate` prints."""

import json
import math
from typing import Any

from pskd.evaluation.bootstrap import SEED
from pskd.evaluation.predictions import Figures, Part
from pskd.metrics import MEASURES
from pskd.report.table import MEASURE_COLUMNS, markdown
from pskd.words import counted


def table(figures: Figures) -> str:
    """For people: a table in Markdown, and what it rests on."""
    parts = [("", figures.raw)]
    if figures.scaled is not None:
        parts.append((f", T = {figures.temperature:.4f}", figures.scaled))
    header = ["measure"]
    for title, part in parts:
        header.append("value" + title)
        header += ["95 % interval"] if part.intervals is not None else []
    rows = []
    for title, name, digits in MEASURE_COLUMNS:
        row = [title]
        for _, part in parts:
            row += _cells(part, name, digits)
        rows.append(row)
    lines = [
        markdown(header, rows),
        f"Of {figures.source}: {counted(figures.samples, 'sample')}, "
        f"{counted(figures.classes, 'class')}, {counted(figures.bins, 'bin')} of the ECE.",
    ]
    if figures.fitted_on is not None:
        lines.append(f"T minimises the NLL of {figures.fitted_on}.")
    if figures.resamples:
        resamples = counted(figures.resamples, "bootstrap resample")
        lines.append(f"Intervals: the middle 95 % of {resamples} of the samples, seed {SEED}.")
    return "\n".join(lines)


def as_json(figures: Figures) -> str:
    """The measures as one JSON object; intervals and a temperature only if there are any."""
    content: dict[str, Any] = _finite(figures.raw.measures)
    if figures.raw.intervals is not None:
        content["intervals"] = _bounds(figures.raw)
        content["bootstrap"] = {"resamples": figures.resamples, "seed": SEED}
    if figures.scaled is not None:
        content["temperature"] = figures.temperature
        content["fitted_on"] = figures.fitted_on
        content["scaled"] = _finite(figures.scaled.measures)
        if figures.scaled.intervals is not None:
            content["scaled_intervals"] = _bounds(figures.scaled)
    return json.dumps(content)


def _cells(part: Part, name: str, digits: int) -> list[str]:
    value = part.measures[name]
    cells = ["-" if value is None else f"{value:.{digits}f}"]
    if part.intervals is not None:
        bounds = part.intervals[name]
        cells.append("-" if bounds is None else " to ".join(f"{b:.{digits}f}" for b in bounds))
    return cells


def _finite(values: dict[str, float | None]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {k: v if v is None or math.isfinite(v) else None for k, v in values.items()}


def _bounds(part: Part) -> dict[str, list[float | None] | None]:
    assert part.intervals is not None
    found: dict[str, list[float | None] | None] = {}
    for name in MEASURES:
        bounds = part.intervals[name]
        found[name] = bounds and [b if math.isfinite(b) else None for b in bounds]
    return found
