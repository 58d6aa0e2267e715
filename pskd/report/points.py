"""What the figures draw, as numbers. PURE.

Letters: N samples, C classes, K bins.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pskd.metrics import Records, risk

_WAITS = (("data_wait_s", "data"), ("store_wait_s", "the store"))  # key in metrics.jsonl, what for
_WORTH_SAYING = 1e-3  # of the time of training, at least, are waits that are shown

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class Reliability(NamedTuple):
    """count_K: samples of each bin. accuracy_K, confidence_K: their means; NaN of empty bins."""

    count_K: Counts
    accuracy_K: Floats
    confidence_K: Floats

    @property
    def ece(self) -> float:
        """In percent, up to rounding that of `pskd.metrics`."""
        gap_K = np.abs(self.accuracy_K - self.confidence_K)
        return float(100 * np.nansum(gap_K * self.count_K) / self.count_K.sum())


def bin_of(confidence_N: Floats, num_bins: int) -> Counts:
    """The bin of each sample as the ECE has them: (lo, hi], the first with 0. (N,), from 0."""
    edge_K = np.arange(1, num_bins + 1) / num_bins
    return np.searchsorted(edge_K, np.clip(confidence_N, 0, 1), side="left")


def reliability(records: Records, num_bins: int) -> Reliability:
    """Accuracy against confidence, by bins of confidence."""
    confidence_N = records.confidence_N.numpy()
    bin_N = bin_of(confidence_N, num_bins)
    count_K = np.bincount(bin_N, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        right_K = np.bincount(bin_N, weights=records.rank_N.numpy() == 0, minlength=num_bins)
        sum_K = np.bincount(bin_N, weights=confidence_N, minlength=num_bins)
        return Reliability(count_K, right_K / count_K, sum_K / count_K)


def risk_coverage(records: Records) -> tuple[Floats, Floats, Floats]:
    """(coverage_N, risk_N, optimum_N), fractions; the AURC is the mean risk.

    optimum_N: the least risk with as many errors, all of them covered last.
    """
    wrong_N = records.rank_N > 0
    covered_N = np.arange(1, len(records) + 1)
    right = len(records) - int(wrong_N.sum())
    optimum_N = np.maximum(covered_N - right, 0) / covered_N
    return covered_N / len(records), risk(records.confidence_N, wrong_N).numpy(), optimum_N


def histograms(records: Records, num_bins: int) -> tuple[Counts, Counts]:
    """(right_K, wrong_K): samples of each bin of confidence."""
    bin_N = bin_of(records.confidence_N.numpy(), num_bins)
    right_N = records.rank_N.numpy() == 0
    right_K, wrong_K = (np.bincount(bin_N[of], minlength=num_bins) for of in (right_N, ~right_N))
    return right_K, wrong_K


def class_errors(records: Records, classes: int) -> tuple[Counts, Counts]:
    """(count_C, wrong_C): samples of each true class, and how many of them are not recognised."""
    label_N = records.label_N.numpy()
    wrong_N = records.rank_N.numpy() > 0
    count_C = np.bincount(label_N, minlength=classes)
    return count_C, np.bincount(label_N[wrong_N], minlength=classes)


def waits(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """(key, what for, seconds in all) of the waits of training that are worth saying."""
    trained_s = sum(line.get("train_s", 0.0) for line in lines)
    found = [(key, what, sum(line.get(key, 0.0) for line in lines)) for key, what in _WAITS]
    return [wait for wait in found if wait[2] and wait[2] >= _WORTH_SAYING * trained_s]


def thin(*curves_N: NDArray[Any], most: int = 1000) -> list[NDArray[Any]]:
    """The same points of some curves, at most so many, the first and the last among them."""
    n = len(curves_N[0])
    index = np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))
    return [curve_N[index] for curve_N in curves_N]
