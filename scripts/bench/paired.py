"""Ratios of two things that were measured in turns, with what is not known about them."""

import numpy as np
import numpy.typing as npt


def interval(ratios: npt.ArrayLike, resamples: int = 2000) -> str:
    """Median of the ratios of paired blocks, with its 95 % interval by bootstrap."""
    values = np.asarray(ratios, np.float64)
    draws = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return f"{np.median(values):.2f} [{low:.2f}, {high:.2f}]"


def table(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
