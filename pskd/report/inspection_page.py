"""The page of `pskd inspect`: the same lists with their images."""

from pskd.data import folder
from pskd.inspection.findings import Findings
from pskd.inspection.thumbnails import SIDE, picture
from pskd.order import Ids
from pskd.report.inspection import (
    class_table,
    headline,
    pair_table,
    sample_table,
    shown_names,
    worst_classes,
)
from pskd.report.page import Gallery, Image, Part, Section, Text, page

_SHOWN = 40  # of each list, or as many as are printed if those are more


def inspection_page(findings: Findings, top: int) -> str:
    """Self-contained HTML; top: so many of each list were printed."""
    shown = max(top, _SHOWN)
    errors = "By confident learning, the least p(label) / p(likeliest other class) first."
    lists = [
        ("Probable label errors", errors, findings.errors.ids),
        ("Hardest samples", "The lowest probability of the label first.", findings.hardest),
    ]
    if findings.before_epoch is not None:
        when = f"epoch {findings.before_epoch + 1}"
        lists += [
            ("Forgotten", f"Right in {when}, wrong now.", findings.forgotten),
            ("Learned", f"Wrong in {when}, right now.", findings.learned),
        ]
    sections = [Section(title, _gallery(findings, text, ids, shown)) for title, text, ids in lists]
    pairs = "How probable another class is on average to the samples of a label, and how many of "
    pairs += "them are taken for it."
    sections += [
        Section("Confused classes", [Text(pairs), pair_table(findings, shown)]),
        Section("Classes", _classes(findings, shown)),
    ]
    lead: list[Part] = [Text(line) for line in headline(findings)]
    lead += [Text(note, notice=True) for note in findings.notes]
    below = "Below an image: its label, and the most probable other class, with the past "
    lead.append(Text(below + "prediction's probability of each."))
    name = folder.shown(findings.run.absolute().name)
    return page(f"{name}: what past predictions say of the data", sections, lead)


def _gallery(findings: Findings, text: str, ids: Ids, shown: int) -> list[Part]:
    if not len(ids):
        return [Text("None.")]
    first = ids[:shown]
    images, lost = [], []
    for sample in first.tolist():
        content = picture(findings.catalog, sample)
        if content is None:
            lost.append(sample)
        else:
            lines = _lines(findings, sample)
            images.append(Image(content, f"sample {sample}, {lines[0]}", lines))
    more = f" The first {len(first)} of {len(ids):,}." if len(ids) > len(first) else ""
    parts: list[Part] = [Text(text + more)]
    if lost:
        told = "images are" if len(lost) > 1 else "image is"
        parts.append(Text(f"{len(lost)} {told} gone, or cannot be decoded:", notice=True))
        lost_ids = first[[sample in lost for sample in first.tolist()]]
        parts.append(sample_table(findings, lost_ids))
    return [*parts, Gallery(images, SIDE)] if images else parts


def _lines(findings: Findings, sample: int) -> list[str]:
    """Below an image."""
    names, now = shown_names(findings), findings.now
    label, other = findings.labels_N[sample], now.other_class_N[sample]
    return [
        f"{names[label]} {now.own_N[sample]:.3f}",
        f"{names[other]}? {now.other_N[sample]:.3f}",
        f"sample {sample}",
    ]


def _classes(findings: Findings, shown: int) -> list[Part]:
    table, count = class_table(findings, worst_classes(findings, shown)), len(findings.count_C)
    if len(table.rows) == count:
        return [Text("The highest error first."), table]
    return [Text(f"The {len(table.rows)} of {count} with the highest error."), table]
