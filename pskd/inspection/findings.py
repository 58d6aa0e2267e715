"""What is found in a run's past predictions, as arrays: hard samples, errors, flips, confusion.

Letters: N samples of the training split, C classes, K listed samples.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pskd.inspection import label_errors
from pskd.inspection.label_errors import LabelErrors
from pskd.inspection.scan import Judged, judge
from pskd.inspection.source import Source
from pskd.loading import AnyCatalog
from pskd.order import Ids


class ClassFigures(NamedTuple):
    """Of the samples of a label: mean p of the label and of the prediction, share of wrong ones.

    These are 0 to 1, and NaN for a class without samples.
    """

    label: int
    samples: int
    p_label: float
    p_predicted: float
    error: float
    label_errors: int


@dataclass(frozen=True)
class Findings:
    """epoch, before_epoch: 0-based; the latter and `before` are None if one generation is there.

    hardest: ids by rising probability of their label. forgotten: right in the epoch before and
    wrong now, the greatest fall of that probability first; learned: the reverse, the greatest
    rise first. count_C: samples with a row of each label, int64. predicted_CC: how many of each
    label are taken for each class, int64. notes: what to keep in mind.
    """

    run: Path
    catalog: AnyCatalog
    epoch: int
    before_epoch: int | None
    labels_N: npt.NDArray[np.int64]
    now: Judged
    before: Judged | None
    errors: LabelErrors
    hardest: Ids
    forgotten: Ids
    learned: Ids
    count_C: npt.NDArray[np.int64]
    predicted_CC: npt.NDArray[np.int64]
    notes: list[str]

    @property
    def skipped(self) -> int:
        """Samples without a row."""
        return int((~self.now.present_N).sum())

    @property
    def judged(self) -> int:
        """Samples with a row."""
        return int(self.now.present_N.sum())

    @property
    def error(self) -> float:
        """Share of the samples with a row whose prediction is not their label."""
        right = int(self.predicted_CC.diagonal().sum())
        return 1 - right / max(self.judged, 1)

    def by_class(self) -> list[ClassFigures]:
        """One for each class, in their order."""
        classes, now = len(self.count_C), self.now
        present = now.present_N
        labels = self.labels_N[present]
        sums = np.bincount(labels, weights=now.confidence_N[present], minlength=classes)
        suspects_C = np.bincount(self.labels_N[self.errors.ids], minlength=classes)
        with np.errstate(invalid="ignore", divide="ignore"):
            confidence_C = sums / self.count_C
            error_C = 1 - self.predicted_CC.diagonal() / self.count_C
        columns = (
            np.arange(classes),
            self.count_C,
            now.mean_CC.diagonal(),
            confidence_C,
            error_C,
            suspects_C,
        )
        lines = zip(*(column.tolist() for column in columns), strict=True)
        return [ClassFigures(*line) for line in lines]

    def confused(self, top: int) -> list[tuple[int, int, float, int, float]]:
        """(label, other class, mean p of it, samples taken for it, their share), by the first p."""
        mean_CC = np.nan_to_num(self.now.mean_CC)  # a copy
        np.fill_diagonal(mean_CC, 0)
        classes = len(mean_CC)
        flat = np.argsort(-mean_CC, axis=None, kind="stable")[: min(top, classes * (classes - 1))]
        found = []
        for label, other in zip(*np.divmod(flat, classes), strict=True):
            taken = int(self.predicted_CC[label, other])
            share = taken / max(int(self.count_C[label]), 1)
            found.append((int(label), int(other), float(mean_CC[label, other]), taken, share))
        return found


def find(source: Source) -> Findings:
    """Read the generations, each once and in blocks, and look."""
    labels_N = source.catalog.train.labels_N
    classes = source.catalog.num_classes
    now = judge(source.last.rows, labels_N)
    before = None if source.before is None else judge(source.before.rows, labels_N)
    present = np.flatnonzero(now.present_N)
    hardest = present[np.argsort(now.own_N[present], kind="stable")]
    forgotten, learned = _flips(before, now, labels_N)
    cells = labels_N[present] * classes + now.predicted_N[present]
    return Findings(
        run=source.run,
        catalog=source.catalog,
        epoch=source.last.epoch,
        before_epoch=None if source.before is None else source.before.epoch,
        labels_N=labels_N,
        now=now,
        before=before,
        errors=label_errors.find(source.last.rows, now, labels_N),
        hardest=hardest,
        forgotten=forgotten,
        learned=learned,
        count_C=np.bincount(labels_N[present], minlength=classes),
        predicted_CC=np.bincount(cells, minlength=classes**2).reshape(classes, classes),
        notes=_notes(source),
    )


def _flips(before: Judged | None, now: Judged, labels_N: npt.NDArray[np.int64]) -> tuple[Ids, Ids]:
    if before is None:
        none = np.empty(0, np.int64)
        return none, none
    both_N = before.present_N & now.present_N
    was_N, is_N = before.predicted_N == labels_N, now.predicted_N == labels_N
    rise_N = now.own_N - before.own_N
    forgotten = np.flatnonzero(both_N & was_N & ~is_N)
    learned = np.flatnonzero(both_N & ~was_N & is_N)
    return (
        forgotten[np.argsort(rise_N[forgotten], kind="stable")],
        learned[np.argsort(-rise_N[learned], kind="stable")],
    )


def _notes(source: Source) -> list[str]:
    config, last, before = source.config, source.last, source.before
    notes = [
        "Each row is a prediction for the augmented image, made in training before the step that "
        "learnt from it. Earlier epochs have learnt from the same label: a network that memorises "
        "its labels hides their errors, and one that still errs much takes right labels for wrong."
    ]
    if config.mixing.name != "none":
        notes.append(
            f"The run trained with mixing.name {config.mixing.name}: rows are predictions for "
            "mixed images of which at least half is the sample's own; where less was, the row is "
            "older than the epoch."
        )
    if config.erasing.name != "none":
        notes.append(
            f"The run trained with erasing.name {config.erasing.name}: rows are predictions for "
            "images with a part erased."
        )
    averaging = getattr(config.method, "averaging", 0.0)
    if averaging:
        notes.append(
            f"The run trained with method.averaging {averaging}: rows are averages over epochs."
        )
    encoding = config.store.encoding
    if encoding.startswith("top"):
        notes.append(
            f"store.encoding {encoding} keeps the largest classes only: smaller probabilities "
            "are guesses."
        )
    if last.epoch + 1 < source.trained:
        notes.append(
            f"{source.trained} epochs are trained, but of the last one no predictions are there: "
            f"these are of epoch {last.epoch + 1}."
        )
    if source.lost is not None:
        notes.append(f"Nothing is known of flips. {source.lost}")
    elif before is None:
        notes.append("Only one epoch is on disk, so nothing is known of flips.")
    elif before.epoch != last.epoch - 1:
        notes.append(f"Flips are between epochs {before.epoch + 1} and {last.epoch + 1}.")
    return notes
