"""Drawings of runs. PURE: what was measured in, a matplotlib `Figure` out.

`svg` and `png` write one; equal figures give equal bytes. Needs the extra `report`.
"""

import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pskd.errors import PskdError
from pskd.metrics import Records
from pskd.report import points
from pskd.report.page import INK
from pskd.report.run_files import Line
from pskd.report.table import PUBLISHED_COLUMNS

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise PskdError(
        f'figures need a package that is not installed ({error.name}): pip install "pskd[report]".'
    ) from error

CURVES = (  # key in metrics.jsonl, title
    ("train_loss", "training loss"),
    *((key, title) for title, key, _ in PUBLISHED_COLUMNS),
)
NAMED_CLASSES = 20

_DPI = 144
_HISTOGRAM_BINS = 20
_MIDDLE = "#8a929b"
# Read on white and on black, and told apart by those who do not see red or green.
_COLORS = ("#3585c9", "#e0822a", "#2b9f79", "#b768a9", "#d24d57", "#9a7b4f", "#38a8b5", "#7f8790")
_STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=_COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.hspace": 0.06,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "patch.linewidth": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "pskd",
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollars
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def _style() -> Iterator[None]:
    """The same whatever the user's own settings are."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        # Of a name in another script. The page has it as text, the PNG as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def svg(figure: Figure) -> str:
    """On a transparent ground, texts as texts."""
    content = io.StringIO()
    with _style():
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
        figure.set_layout_engine("none")  # laid out once: it takes longer than all else
    return content.getvalue()


def png(figure: Figure) -> bytes:
    """On white."""
    content = io.BytesIO()
    with _style():
        figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()


def learning_curves(runs: Mapping[str, Sequence[Line]]) -> Figure:
    """A panel for each measure that some epoch has, a curve for each run, by its name."""
    with _style():
        shown = [
            (key, title)
            for key, title in CURVES
            if any(_number(line.get(key)) is not None for lines in runs.values() for line in lines)
        ]
        rows = math.ceil(len(shown) / 3)
        figure = Figure(figsize=(9.2, 2.5 * rows + (0.25 * math.ceil(len(runs) / 3))))
        axes = figure.subplots(rows, 3, squeeze=False).ravel()
        for ax, (key, title) in zip(axes, shown, strict=False):
            for label, lines in zip(_labels(runs), runs.values(), strict=True):
                _curve(ax, lines, key, label)
            ax.set_title(title)
            _epochs(ax)
        for ax in axes[len(shown) :]:
            ax.remove()
        _legend_below(figure, axes[0], runs)
        return figure


def schedules(lines: Sequence[Line]) -> Figure:
    """The learning rate of each epoch, and of PS-KD the weight of the past predictions."""
    with _style():
        keys = [("lr", "learning rate")]
        keys += [("alpha", "alpha")] if "alpha" in lines[0] else []
        return _panels(lines, keys, "steps-mid")


def throughput(lines: Sequence[Line]) -> Figure:
    """Images a second of each epoch, and how long training waited for what, if it did."""
    with _style():
        keys = [("images_per_s", "images/s")]
        keys += [(key, f"waits for {what}, s") for key, what, _ in points.waits(lines)]
        figure = _panels(lines, keys)
        for ax in figure.axes:
            ax.set_ylim(bottom=0)
        return figure


def reliability(runs: Mapping[str, Records], num_bins: int) -> Figure:
    """Accuracy by bins of confidence, and below how many samples lie in each; runs in a row."""
    with _style():
        wide = min(len(runs), 3)
        deep = math.ceil(len(runs) / wide)
        figure = Figure(figsize=(max(3.1 * wide, 4.2), 4.3 * deep))
        grid = figure.subplots(
            2 * deep, wide, squeeze=False, sharex="col", height_ratios=[2.4, 1] * deep
        )
        for k, (label, records) in enumerate(zip(_labels(runs), runs.values(), strict=True)):
            row, column = divmod(k, wide)
            upper, lower = grid[2 * row][column], grid[2 * row + 1][column]
            found = points.reliability(records, num_bins)
            _reliability(upper, lower, found)
            several = f"{label}\n" if len(runs) > 1 else ""
            upper.set_title(f"{several}ECE {found.ece:.2f} %")
            if column == 0:
                upper.set_ylabel("accuracy")
                lower.set_ylabel("samples")
        for k in range(len(runs), wide * deep):
            row, column = divmod(k, wide)
            grid[2 * row][column].remove()
            grid[2 * row + 1][column].remove()
        handles, titles = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, titles, loc="outside lower center", ncols=2)
        return figure


def risk_coverage(runs: Mapping[str, Records]) -> Figure:
    """Error among the most confident samples, and the least that as many errors allow."""
    with _style():
        figure = Figure(figsize=(7.6, 3.6))
        ax = figure.subplots()
        dotted: dict[str, Any] = {"linestyle": (0, (1, 2)), "linewidth": 1.4}
        for label, records in zip(_labels(runs), runs.values(), strict=True):
            coverage, risk, optimum = points.thin(*points.risk_coverage(records))
            (line,) = ax.plot(coverage, 100 * risk, label=label)
            ax.plot(coverage, 100 * optimum, color=line.get_color(), **dotted)
        ax.plot([], [], color=_MIDDLE, label="optimum", **dotted)
        ax.set_xlabel("coverage")
        ax.set_ylabel("risk: error % of what is covered")
        ax.set_xlim(0, 1)
        ax.set_ylim(bottom=0)
        figure.legend(loc="outside right upper")
        return figure


def confidences(records: Records) -> Figure:
    """Histograms of the confidence of right and of wrong predictions, each on its own scale."""
    with _style():
        figure = Figure(figsize=(6.2, 3.4))
        counts = points.histograms(records, _HISTOGRAM_BINS)
        left_K = np.arange(_HISTOGRAM_BINS) / _HISTOGRAM_BINS
        axes = figure.subplots(2, 1, sharex=True)
        for ax, count_K, name, color in zip(
            axes, counts, ("right", "wrong"), (_COLORS[2], _COLORS[4]), strict=True
        ):
            ax.bar(left_K, count_K, width=0.9 / _HISTOGRAM_BINS, align="edge", color=color)
            ax.set_ylabel(f"{name}, samples")
        axes[-1].set_xlabel("confidence")
        axes[-1].set_xlim(0, 1)
        return figure


def class_errors(error_C: points.Floats, names: Sequence[str]) -> Figure:
    """Errors in percent, the worst first: bars with names, or of many classes a curve."""
    with _style():
        order = np.argsort(-error_C, kind="stable")
        if len(names) <= NAMED_CLASSES:
            figure = Figure(figsize=(6.2, 0.6 + 0.24 * len(names)))
            ax = figure.subplots()
            place = np.arange(len(names))  # by number, as two classes may have one name
            ax.barh(place, error_C[order], height=0.7)
            ax.set_yticks(place, [_short(names[c]) for c in order])
            ax.invert_yaxis()
            ax.tick_params(axis="y", length=0)
            ax.set_xlabel("error %")
        else:
            figure = Figure(figsize=(6.2, 3.0))
            ax = figure.subplots()
            ax.plot(np.arange(1, len(names) + 1), error_C[order])
            ax.set_xlabel("classes, the worst first")
            ax.set_ylabel("error %")
            ax.set_ylim(bottom=0)
        return figure


def _panels(
    lines: Sequence[Line], keys: Sequence[tuple[str, str]], style: str = "default"
) -> Figure:
    figure = Figure(figsize=(4.6 * len(keys), 2.4))
    for ax, (key, title) in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        _curve(ax, lines, key, title, style)
        ax.set_title(title)
        _epochs(ax)
    return figure


def _curve(ax: Axes, lines: Sequence[Line], key: str, label: str, style: str = "default") -> None:
    """Epochs that were not measured are passed over; few points are marked."""
    known = [(line["epoch"] + 1, _number(line.get(key))) for line in lines]
    known = [(epoch, value) for epoch, value in known if value is not None]
    marker = "o" if len(known) <= 12 else ""
    ax.plot(
        *zip(*known, strict=True) if known else ([], []),
        label=label,
        marker=marker,
        markersize=3,
        drawstyle=style,
    )


def _epochs(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    ax.set_xlabel("epoch")


def _legend_below(figure: Figure, ax: Axes, runs: Mapping[str, Any]) -> None:
    if len(runs) > 1:
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 3))


def _reliability(upper: Axes, lower: Axes, found: points.Reliability) -> None:
    bins = len(found.count_K)
    left_K = np.arange(bins) / bins
    shape: dict[str, Any] = {"width": 0.92 / bins, "align": "edge"}
    upper.plot([0, 1], [0, 1], color=_MIDDLE, linewidth=1, linestyle="--")
    upper.bar(left_K, np.nan_to_num(found.accuracy_K), color=_COLORS[6], label="accuracy", **shape)
    low_K = np.fmin(found.accuracy_K, found.confidence_K)
    gap_K = np.abs(found.accuracy_K - found.confidence_K)
    gap = {"fill": False, "hatch": "////", "edgecolor": _COLORS[4], "linewidth": 1, **shape}
    label = "gap to mean confidence"
    upper.bar(left_K, np.nan_to_num(gap_K), bottom=np.nan_to_num(low_K), label=label, **gap)
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    bars = lower.bar(left_K, found.count_K, color=_MIDDLE, **shape)
    if bins <= 15:
        lower.bar_label(bars, fontsize=6, padding=1)
        lower.margins(y=0.15)
    lower.set_xlabel("confidence")


def _number(value: Any) -> float | None:
    """Not what was not measured, and not an infinite NLL."""
    return float(value) if value is not None and math.isfinite(value) else None


def _label(name: str) -> str:
    """Of a legend. Matplotlib leaves out names that begin with _."""
    return _short(f" {name}" if name.startswith("_") else name)


def _labels(names: Iterable[str]) -> list[str]:
    """Short names of runs; numbered if they would be the same."""
    short = [_label(name) for name in names]
    if len(set(short)) == len(short):
        return short
    return [f"{k}: {name}" for k, name in enumerate(short, start=1)]


def _short(name: str) -> str:
    """What is told apart by its end, as runs are, keeps it."""
    return name if len(name) <= 28 else f"{name[:13]}…{name[-14:]}"
