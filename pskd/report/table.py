"""Tables as text, Markdown and LaTeX, and which measures stand in them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pskd.recipe import PUBLISHED_MEASURES

Format = Literal["text", "markdown", "latex"]

# title, key in results and recipes, decimals
MEASURE_COLUMNS = (
    ("top-1 error %", "top1_error", 2),
    ("top-5 error %", "top5_error", 2),
    ("NLL", "nll", 4),
    ("ECE %", "ece", 2),
    ("AURC x1000", "aurc", 2),
    ("E-AURC x1000", "eaurc", 2),
)
PUBLISHED_COLUMNS = tuple(row for row in MEASURE_COLUMNS if row[1] in PUBLISHED_MEASURES)

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
    }
)


class Table(NamedTuple):
    """header: a title for each column. rows: a cell for each column."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(table: Table, form: Format) -> str:
    """The table as text: aligned columns, Markdown, or LaTeX (with the package booktabs)."""
    match form:
        case "text":
            return _text(table)
        case "markdown":
            return markdown(*table)
        case "latex":
            return _latex(table)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns."""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = _widths(escaped)
    lines = ["| " + " | ".join(_aligned(row, widths)) + " |" for row in escaped]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _text(table: Table) -> str:
    rows = (table.header, *table.rows)
    return "\n".join("  ".join(_aligned(row, _widths(rows))).rstrip() for row in rows)


def _latex(table: Table) -> str:
    """The first column to the left, the others, which are numbers, to the right."""
    lines = [
        " & ".join(cell.translate(_LATEX) for cell in row) + r" \\"
        for row in (table.header, *table.rows)
    ]
    columns = "l" + "r" * (len(table.header) - 1)
    head = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*head, *lines[1:], r"\bottomrule", r"\end{tabular}"])


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
