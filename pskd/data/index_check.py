"""Whether an index agrees with the files that it names, and with the index of another split."""

import numpy as np

from pskd.data.folder import as_text, enumerated, shown
from pskd.data.headers import Progress, read_headers
from pskd.data.index import Complaint, Index, arrays_of, command, fingerprint_of
from pskd.errors import PskdError


def verify(
    index: Index, *, workers: int | None = None, progress: Progress | None = None
) -> list[Complaint]:
    """Decode every file and compare it with the index; returns those that differ.

    Raises:
        PskdError: the index itself is damaged.
    """
    if fingerprint_of(index.class_names, arrays_of(index)) != index.fingerprint:
        raise PskdError(
            f"The index of {shown(str(index.root))} is damaged (fingerprint differs). "
            f"Run `{command(index.root, index.labels_from)}`."
        )
    paths = [piece.tobytes() for piece in index.path_bytes(np.arange(len(index)))]
    found = read_headers(paths, decode=True, workers=workers, progress=progress)
    different = dict(found.wrong)
    for what, now_N, then_N in (
        ("bytes", found.bytes_N, index.bytes_N),
        ("pixels wide", found.widths_N, index.widths_N),
        ("pixels high", found.heights_N, index.heights_N),
    ):
        for row in np.flatnonzero(now_N != then_N).tolist():
            different.setdefault(row, f"{now_N[row]} {what}, in the index {then_N[row]}")
    return [(as_text(index.relative(row)), why) for row, why in sorted(different.items())]


def check_same_classes(train: Index, validation: Index) -> None:
    """Refuse two folders whose labels do not mean the same.

    Raises:
        PskdError: names the classes that are in only one of them.
    """
    if train.class_names == validation.class_names:
        return
    alone = []
    for index, other in ((train, validation), (validation, train)):
        names = sorted(set(index.class_names) - set(other.class_names))
        if names:
            alone.append(f"only in {shown(str(index.root))}: {enumerated(names)}")
    if not alone:
        pairs = zip(train.class_names, validation.class_names, strict=True)
        label, (a, b) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
        alone = [f"label {label} is {shown(a)} in the first and {shown(b)} in the second"]
    raise PskdError(
        f"{shown(str(train.root))} and {shown(str(validation.root))} have different classes: "
        f"{'; '.join(alone)}. Give both the same classes."
    )
