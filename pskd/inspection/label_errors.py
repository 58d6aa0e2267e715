"""Probable label errors by confident learning (Northcutt, Jiang, Chuang: JAIR 2021, section 3).

A sample x of given label i is *confident* of class j if its probability of j reaches the class's
threshold, the mean probability of their own label over the samples of that label:

    t_j = mean over x of label j of p(j; x)
    j*(x) = argmax over j with p(j; x) >= t_j of p(j; x)
    joint[i, j] = number of x of label i with j*(x) = j

Samples off the diagonal of the joint are probable errors. They are ranked by p(i; x) over the
largest p of another class, the lowest first. The normalised margin, the difference of the two,
ranks worse: it hardly tells a label that is out of the question from one that is only less likely.

cleanlab does this and far more, on probabilities that are held in memory as one array, 5 GB for
ImageNet's. These lines keep a few numbers a sample.

Letters: N samples of the training split, B of a block, C classes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pskd.inspection.scan import Judged, blocks
from pskd.store.generation import Generation


@dataclass(frozen=True)
class LabelErrors:
    """thresholds_C: float64, infinite for a class without samples. joint_CC: int64, as above.

    ids: int64, probable errors, the worst first; suggested: int64, the class of which each is
    confident instead.
    """

    thresholds_C: npt.NDArray[np.float64]
    joint_CC: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    suggested: npt.NDArray[np.int64]

    def estimated(self, count_C: npt.NDArray[np.int64]) -> float:
        """How many labels are wrong: the joint, scaled to the samples of each label, off diagonal.

        count_C: int64, samples of each label.
        """
        confident_C = self.joint_CC.sum(axis=1)
        off_C = confident_C - self.joint_CC.diagonal()
        return float((off_C / np.maximum(confident_C, 1) * count_C).sum())


def find(generation: Generation, judged: Judged, labels_N: npt.NDArray[np.int64]) -> LabelErrors:
    """Of samples that have a row. Rows are read again only where `judged` does not decide."""
    classes = generation.classes
    thresholds_C = _thresholds(judged, labels_N, classes)
    confident_N = _confident(generation, judged, thresholds_C)
    ids = np.flatnonzero(confident_N >= 0)
    cells = labels_N[ids] * classes + confident_N[ids]
    joint_CC = np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    off = ids[confident_N[ids] != labels_N[ids]]
    other = judged.other_N[off]
    ratio = judged.own_N[off] / other  # never by 0: another class reached its threshold
    ranked = off[np.lexsort((off, -other, ratio))]
    return LabelErrors(thresholds_C, joint_CC, ranked, confident_N[ranked])


def _thresholds(
    judged: Judged, labels_N: npt.NDArray[np.int64], classes: int
) -> npt.NDArray[np.float64]:
    present = judged.present_N
    labels = labels_N[present]
    count_C = np.bincount(labels, minlength=classes)
    sum_C = np.bincount(labels, weights=judged.own_N[present], minlength=classes)
    thresholds_C = np.full(classes, np.inf)
    np.divide(sum_C, count_C, out=thresholds_C, where=count_C > 0)
    return thresholds_C


def _confident(
    generation: Generation, judged: Judged, thresholds_C: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """j*(x) of each sample, -1 for none: int64 (N,)."""
    top_N, predicted_N = judged.confidence_N, judged.predicted_N
    reached_N = judged.present_N & (top_N >= thresholds_C[predicted_N])
    confident_N = np.where(reached_N, predicted_N, -1)
    # Where the largest falls short, a smaller one may reach a lower threshold; it is at most what
    # the largest leaves of 1.
    slack = 1e-6
    second_N = np.minimum(top_N, 1 - top_N) + slack
    open_N = judged.present_N & ~reached_N & (second_N >= thresholds_C.min())
    order = generation.in_file_order()
    thresholds = torch.from_numpy(thresholds_C)
    for ids_B, rows_BC in blocks(generation, order[open_N[order]]):
        best_B, class_B = torch.where(rows_BC >= thresholds, rows_BC, -1.0).max(dim=1)
        confident_N[ids_B] = torch.where(best_B >= 0, class_B, -1).numpy()
    return confident_N
