"""Tables in Markdown, and which measures stand in them."""

from collections.abc import Sequence

# title, key in results and recipes, decimals
MEASURE_COLUMNS = (
    ("top-1 error %", "top1_error", 2),
    ("top-5 error %", "top5_error", 2),
    ("NLL", "nll", 4),
    ("ECE %", "ece", 2),
    ("AURC x1000", "aurc", 2),
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (header, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
