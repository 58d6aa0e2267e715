"""What `pskd inspect` prints and writes.

index.html         the page, see `inspection_page.py`
summary.json       counts, notes, and the first samples of each list
samples.npz        of every sample, by id, and of pairs of classes; see `_arrays`
label_errors.csv   probable label errors, the worst first
hardest.csv        the 1,000 samples with the lowest probability of their label
flips.csv          samples whose prediction was right in one of the last two epochs, wrong in one
classes.csv        one line a class
confusion.csv      the 1,000 pairs (label, other class) of the highest mean probability
"""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pskd.data.folder import shown
from pskd.files import named_by, write_arrays, write_atomically, write_json
from pskd.inspection.findings import ClassFigures, Findings
from pskd.inspection.thumbnails import name_of
from pskd.order import Ids
from pskd.report.table import Table, markdown

SAMPLE_COLUMNS = ("sample", "path", "label", "predicted", "p_label", "p_predicted", "margin")
CLASS_COLUMNS = ("class", "samples", "p_label", "p_predicted", "error", "label_errors")
PAIR_COLUMNS = ("label", "other", "mean_p_other", "predicted_other", "share")

_LONGEST = 1000  # lines of files that could name every sample, or every pair of classes

Cells = Sequence[object]


def write(findings: Findings, output: Path, top: int, page: str) -> None:
    """The files above, into a directory that is made if need be.

    Raises:
        PskdError: it cannot be written.
    """
    names = findings.catalog.class_names
    errors = findings.errors
    suggested = {int(i): int(k) for i, k in zip(errors.ids, errors.suggested, strict=True)}
    flips = [
        [kind, *row, _rounded(float(p))]
        for kind, ids in (("forgotten", findings.forgotten), ("learned", findings.learned))
        for row, p in zip(_samples(findings, ids), _own_before(findings, ids), strict=True)
    ]
    tables: dict[str, tuple[Cells, Iterable[Cells]]] = {
        "label_errors.csv": (
            [*SAMPLE_COLUMNS, "suggested"],
            [[*row, names[suggested[int(row[0])]]] for row in _samples(findings, errors.ids)],
        ),
        "hardest.csv": (SAMPLE_COLUMNS, _samples(findings, findings.hardest[:_LONGEST])),
        "flips.csv": (["change", *SAMPLE_COLUMNS, "p_label_before"], flips),
        "classes.csv": (CLASS_COLUMNS, class_rows(findings)),
        "confusion.csv": (PAIR_COLUMNS, pair_rows(findings, _LONGEST)),
    }
    with named_by("--output", output):
        output.mkdir(parents=True, exist_ok=True)
        for name, (header, rows) in tables.items():
            write_atomically(output / name, _csv(header, rows))
        write_json(output / "summary.json", summary(findings, top))
        write_arrays(output / "samples.npz", _arrays(findings))
        write_atomically(output / "index.html", page.encode())


def _samples(findings: Findings, ids: Ids) -> list[list[Any]]:
    """Lines of `SAMPLE_COLUMNS`. margin: p of the label, minus the largest p of another class."""
    now, names = findings.now, findings.catalog.class_names
    columns = zip(
        ids.tolist(),
        findings.labels_N[ids].tolist(),
        now.predicted_N[ids].tolist(),
        now.own_N[ids].tolist(),
        now.confidence_N[ids].tolist(),
        (now.own_N[ids] - now.other_N[ids]).tolist(),
        strict=True,
    )
    return [
        [i, name_of(findings.catalog, i), names[label], names[predicted], *map(_rounded, figures)]
        for i, label, predicted, *figures in columns
    ]


def class_rows(findings: Findings) -> list[list[Any]]:
    """Lines of `CLASS_COLUMNS`, in the order of the classes. error: 0 to 1."""
    names = findings.catalog.class_names
    return [
        [names[k], count, _rounded(own), _rounded(top), _rounded(error), suspects]
        for k, count, own, top, error, suspects in findings.by_class()
    ]


def pair_rows(findings: Findings, top: int) -> list[list[Any]]:
    """Lines of `PAIR_COLUMNS`, the most confused pair first. share: of the label's samples."""
    names = findings.catalog.class_names
    return [
        [names[label], names[other], _rounded(p), taken, _rounded(share)]
        for label, other, p, taken, share in findings.confused(top)
    ]


def summary(findings: Findings, top: int) -> dict[str, Any]:
    """As JSON: epochs counted from 1; `null` where there is nothing to measure."""
    lists = {
        "hardest": findings.hardest,
        "label_errors": findings.errors.ids,
        "forgotten": findings.forgotten,
        "learned": findings.learned,
    }
    return {
        "run": str(findings.run),
        "epoch": findings.epoch + 1,
        "epoch_before": None if findings.before_epoch is None else findings.before_epoch + 1,
        "samples": len(findings.labels_N),
        "samples_without_a_row": findings.skipped,
        "classes": list(findings.catalog.class_names),
        "error": _rounded(findings.error),
        "label_errors": len(findings.errors.ids),
        "label_errors_estimated": round(findings.errors.estimated(findings.count_C), 1),
        "forgotten": None if findings.before is None else len(findings.forgotten),
        "learned": None if findings.before is None else len(findings.learned),
        "notes": findings.notes,
        "top": {
            **{
                name: [
                    dict(zip(SAMPLE_COLUMNS, row, strict=True))
                    for row in _samples(findings, ids[:top])
                ]
                for name, ids in lists.items()
            },
            "confused": [
                dict(zip(PAIR_COLUMNS, row, strict=True)) for row in pair_rows(findings, top)
            ],
        },
    }


def text(findings: Findings, top: int) -> str:
    """For people, in Markdown."""
    parts = ["\n".join(headline(findings))]
    for title, ids in (
        ("Most probable label errors", findings.errors.ids),
        ("Hardest samples", findings.hardest),
        ("Forgotten", findings.forgotten),
        ("Learned", findings.learned),
    ):
        if len(ids):
            parts.append(_titled(title, sample_table(findings, ids[:top])))
    parts.append(_titled("Most confused classes", pair_table(findings, top)))
    worst = class_table(findings, worst_classes(findings, top))
    parts.append(_titled("Classes of the highest error", worst))
    parts.append("\n".join(f"Note: {note}" for note in findings.notes))
    return "\n\n".join(parts)


def headline(findings: Findings) -> list[str]:
    """What was looked at, and how much was found; a sentence a line."""
    estimated = findings.errors.estimated(findings.count_C)
    lines = [
        f"{shown(str(findings.run))}, epoch {findings.epoch + 1}: {findings.judged:,} samples of "
        f"{len(findings.count_C)} classes, {100 * findings.error:.2f} % of them predicted as "
        "another class than their label."
    ]
    if findings.skipped:
        lines.append(f"{findings.skipped:,} samples have no row yet and are left out.")
    lines.append(
        f"{len(findings.errors.ids):,} probable label errors by confident learning, whose estimate "
        f"of their number is {estimated:,.0f}."
    )
    if findings.before_epoch is not None:
        lines.append(
            f"Since epoch {findings.before_epoch + 1}: {len(findings.forgotten):,} samples "
            f"forgotten (right then, wrong now), {len(findings.learned):,} learned."
        )
    return lines


def sample_table(findings: Findings, ids: Ids) -> Table:
    """For people; p of it: of the predicted class."""
    rows = _samples(findings, ids)
    named = any(row[1] for row in rows)
    header = ["sample", *(["path"] if named else []), "label", "predicted", "p of label", "p of it"]
    lines = []
    for sample, path, label, predicted, own, top, _ in rows:
        cells = [str(sample), *([shown(path)] if named else []), shown(label), shown(predicted)]
        lines.append([*cells, f"{own:.4f}", f"{top:.4f}"])
    return Table(header, lines)


def shown_names(findings: Findings) -> list[str]:
    """Of the classes, as people can read them: a folder's name need not be text."""
    return [shown(name) for name in findings.catalog.class_names]


def pair_table(findings: Findings, top: int) -> Table:
    """For people: the most confused pairs."""
    names = shown_names(findings)
    header = ["label", "other class", "its mean p", "taken for it", "% of the label"]
    rows = [
        [names[label], names[other], f"{p:.4f}", str(taken), f"{100 * share:.2f}"]
        for label, other, p, taken, share in findings.confused(top)
    ]
    return Table(header, rows)


def worst_classes(findings: Findings, top: int) -> list[ClassFigures]:
    """The highest error first; classes without samples are left out."""
    present = [line for line in findings.by_class() if line.samples]
    return sorted(present, key=lambda line: -line.error)[:top]


def class_table(findings: Findings, lines: Sequence[ClassFigures]) -> Table:
    """For people."""
    names = shown_names(findings)
    header = ["class", "samples", "p of label", "p of prediction", "error %", "label errors"]
    rows = [
        [
            names[line.label],
            str(line.samples),
            f"{line.p_label:.4f}",
            f"{line.p_predicted:.4f}",
            f"{100 * line.error:.2f}",
            str(line.label_errors),
        ]
        for line in lines
    ]
    return Table(header, rows)


def _titled(title: str, table: Table) -> str:
    return f"{title}:\n\n{markdown(*table)}"


def _own_before(findings: Findings, ids: Ids) -> list[float]:
    return [] if findings.before is None else findings.before.own_N[ids].tolist()


def _arrays(findings: Findings) -> dict[str, np.ndarray[Any, Any]]:
    """By sample id: label, predicted, suggested (-1: no error) int32; p_label, p_other float32. By
    classes (C, C): mean_by_label float32, confident_joint int64.
    """
    suggested_N = np.full(len(findings.labels_N), -1, np.int32)
    suggested_N[findings.errors.ids] = findings.errors.suggested
    return {
        "label": findings.labels_N.astype(np.int32),
        "predicted": findings.now.predicted_N.astype(np.int32),
        "suggested": suggested_N,
        "p_label": findings.now.own_N,
        "p_other": findings.now.other_N,
        "mean_by_label": findings.now.mean_CC.astype(np.float32),
        "confident_joint": findings.errors.joint_CC,
    }


def _rounded(value: float) -> float | None:
    """JSON and CSV have no NaN."""
    return round(value, 6) if math.isfinite(value) else None


def _csv(header: Cells, rows: Iterable[Cells]) -> bytes:
    content = io.StringIO(newline="")
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return content.getvalue().encode("utf-8", "surrogateescape")
