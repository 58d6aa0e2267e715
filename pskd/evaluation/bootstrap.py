"""How far the measures of other samples of the same kind might lie: bootstrap intervals.

N samples are drawn from the N records with replacement, R times; the interval of a measure holds
the middle 95 % of its R values (the percentile method: Efron and Tibshirani, 1993, chapter 13). It
says what the choice of the samples changes, and not what another training would. SciPy's bootstrap
would compute AURC from each resample's own sorting; here all resamples share one.

Letters: N samples, R resamples (of a block), G groups of equal confidence, K bins.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pskd.metrics import Records, bin_ends

SEED = 0
_LEVELS = (0.025, 0.975)
_BLOCK_VALUES = 1 << 21  # counts that are held at once: 16 MB

Reals = npt.NDArray[np.float64]
Interval = tuple[float, float]


def intervals(
    records: Records, num_classes: int, num_bins: int, resamples: int
) -> dict[str, Interval | None]:
    """95 % interval of each of `metrics.measures`, in its unit; None where the measure is None.

    The same records in the same order give the same bits: the seed is fixed. The bounds are values
    of resamples, nothing is interpolated, so an infinite NLL is a legal bound.
    """
    rng = np.random.default_rng(SEED)
    resampled = _Resampled(records, num_bins)
    n = len(records)
    rows = max(1, _BLOCK_VALUES // n)
    blocks = []
    for first in range(0, resamples, rows):
        count = min(rows, resamples - first)
        counts_RN = np.stack(
            [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(count)]
        ).astype(np.float64)
        blocks.append(resampled.measures(counts_RN))
    found: dict[str, Interval | None] = {}
    for name in blocks[0]:
        values = np.concatenate([block[name] for block in blocks])
        low = np.quantile(values, _LEVELS[0], method="lower")
        high = np.quantile(values, _LEVELS[1], method="higher")
        found[name] = (float(low), float(high))
    if num_classes < 5:
        found["top5_error"] = None
    return found


class _Resampled:
    """The measures of samples that count several times, or not at all."""

    def __init__(self, records: Records, num_bins: int) -> None:
        """The samples are sorted once, by falling confidence."""
        arrays = records.arrays()
        confidence_N = arrays["confidence"].clip(0, 1)
        # Of equal confidences the order does not matter; it is fixed, as that of the draws is.
        self._order_N = np.argsort(-confidence_N, kind="stable")
        falling_N = confidence_N[self._order_N]
        rank_N, nll_N = arrays["rank"][self._order_N], arrays["nll"][self._order_N]
        self._wrong_N = (rank_N > 0).astype(np.float64)
        self._beyond_5_N = (rank_N >= 5).astype(np.float64)
        self._impossible_N = np.isinf(nll_N).astype(np.float64)
        self._nll_N = np.where(np.isinf(nll_N), 0.0, nll_N)
        self._gap_N = falling_N - (1 - self._wrong_N)
        self._group_starts_G = np.flatnonzero(np.r_[True, falling_N[1:] != falling_N[:-1]])
        n = len(falling_N)
        ends_K = n - np.array(bin_ends(falling_N[::-1].copy(), num_bins))
        edges = np.r_[n, ends_K]  # falling: bin k holds edges[k+1]:edges[k]
        self._bins = [slice(b, a) for a, b in pairwise(edges) if a > b]
        self._harmonic_N = np.r_[0.0, np.cumsum(1 / np.arange(1, n + 1))]

    def measures(self, counts_RN: Reals) -> dict[str, Reals]:
        """As `metrics.measures`, of each row of counts, each (R,)."""
        n = counts_RN.shape[1]
        counts_RN = np.take(counts_RN, self._order_N, axis=1)
        wrong_R = _dot(counts_RN, self._wrong_N)
        nll_R = _dot(counts_RN, self._nll_N)
        if self._impossible_N.any():
            nll_R = np.where(_dot(counts_RN, self._impossible_N) > 0, np.inf, nll_R)
        gaps = [_dot(counts_RN[:, part], self._gap_N[part]) for part in self._bins]
        aurc_R = self._aurc(counts_RN)
        return {
            "top1_error": 100 * wrong_R / n,
            "top5_error": 100 * _dot(counts_RN, self._beyond_5_N) / n,
            "nll": nll_R / n,
            "ece": 100 * np.abs(gaps).sum(axis=0) / n,
            "aurc": 1000 * aurc_R,
            "eaurc": 1000 * (aurc_R - self._optimal_aurc(wrong_R, n)),
        }

    def _aurc(self, counts_RN: Reals) -> Reals:
        """As `metrics._aurc`; the inner sum of a group by harmonic numbers.

        After s samples with e errors, a group of g with c errors adds the sum over k = 1..g of
        (e + c k / g) / (s + k) = (e - c s / g) (H(s + g) - H(s)) + c.
        """
        size_RG = np.add.reduceat(counts_RN, self._group_starts_G, axis=1)
        errors_RG = np.add.reduceat(counts_RN * self._wrong_N, self._group_starts_G, axis=1)
        end_RG = size_RG.cumsum(axis=1)
        start_RG = end_RG - size_RG
        before_RG = errors_RG.cumsum(axis=1) - errors_RG
        harmonic_RG = self._harmonic_N[end_RG.astype(np.int64)]
        rise_RG = np.diff(harmonic_RG, axis=1, prepend=0.0)
        share_RG = np.divide(errors_RG, size_RG, out=np.zeros_like(size_RG), where=size_RG > 0)
        sums_RG = (before_RG - share_RG * start_RG) * rise_RG + errors_RG
        aurc_R: Reals = sums_RG.sum(axis=1) / counts_RN.shape[1]
        return aurc_R

    def _optimal_aurc(self, wrong_R: Reals, n: int) -> Reals:
        """As `metrics._optimal_aurc`, by harmonic numbers."""
        right_R = n - wrong_R
        rise_R = self._harmonic_N[n] - self._harmonic_N[right_R.astype(np.int64)]
        return np.asarray((wrong_R - right_R * rise_R) / n)


def _dot(counts_RN: Reals, value_N: Reals) -> Reals:
    """Products of rows with a vector. By BLAS the bits would depend on the number of threads."""
    return np.asarray(np.einsum("rn,n->r", counts_RN, value_N))
