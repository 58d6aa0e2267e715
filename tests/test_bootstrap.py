"""Bootstrap intervals and fitted temperatures against plain repetitions of what they compute."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from pskd.errors import PskdError
from pskd.evaluation import bootstrap, temperature
from pskd.metrics import MEASURES, Records, measures, per_sample, summarize

untimed = settings(deadline=None, max_examples=40)


def drawn(n, classes=7, seed=0, grid=0):
    """Logits and labels; `grid`: rounded to so many steps, which makes equal confidences."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(n, classes)) * 2, rng.integers(0, classes, n)
    logits[np.arange(n), labels] += rng.exponential(1.0, n)
    if grid:
        logits = np.round(logits * grid) / grid
    return torch.from_numpy(logits), torch.from_numpy(labels)


@given(
    st.integers(1, 40), st.integers(2, 8), st.integers(0, 99), st.integers(1, 3), st.integers(1, 12)
)
@untimed
def test_counted_samples_measure_as_repeated_samples(n, classes, seed, grid, bins):
    """Every measure of every resample, by the measures of the records themselves."""
    records = per_sample(*drawn(n, classes, seed, grid))
    counts_RN = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=3)
    found = bootstrap._Resampled(records, bins).measures(counts_RN.astype(float))
    for row, counts in enumerate(counts_RN):
        repeated = Records.unpack(records.pack()[np.repeat(np.arange(n), counts)])
        expected = measures(repeated, 10, bins)
        for name in MEASURES:
            assert found[name][row] == pytest.approx(expected[name], abs=1e-9), name


def test_intervals_are_percentiles_of_the_resampled_measures():
    records, resamples = per_sample(*drawn(60)), 200
    rng, values = np.random.default_rng(bootstrap.SEED), []
    for _ in range(resamples):
        rows = rng.integers(0, 60, 60)
        values.append(measures(Records.unpack(records.pack()[rows]), 7, 10))
    found = bootstrap.intervals(records, 7, 10, resamples)
    assert list(found) == list(MEASURES)
    whole = measures(records, 7, 10)
    for name in MEASURES:
        of_name = sorted(value[name] for value in values)
        low, high = found[name]
        # Of 200 values, places 199 * 0.025 = 4.975 and 194.025: outward.
        assert (low, high) == pytest.approx((of_name[4], of_name[195]), abs=1e-9)
        assert low < whole[name] < high


def test_intervals_are_the_same_bits_each_time_whatever_the_blocks(monkeypatch):
    records = per_sample(*drawn(50))
    first = bootstrap.intervals(records, 7, 10, 30)
    assert bootstrap.intervals(records, 7, 10, 30) == first
    monkeypatch.setattr(bootstrap, "_BLOCK_VALUES", 100)
    assert bootstrap.intervals(records, 7, 10, 30) == first


def test_an_impossible_sample_makes_bounds_infinite_and_two_classes_have_no_top_5():
    logits = torch.tensor([[0.0, -math.inf], [1.0, 0.0]])
    found = bootstrap.intervals(per_sample(logits, torch.tensor([1, 0])), 2, 10, 100)
    assert found["nll"][1] == math.inf
    assert found["nll"][0] < math.inf
    assert found["top5_error"] is None


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """80 sets of 300 coins of 30 %: 95 % of 80 are 76."""
    rng, hits = np.random.default_rng(5), 0
    for _ in range(80):
        wrong = torch.from_numpy((rng.random(300) < 0.3).astype(np.int64))
        half = torch.full((300,), 0.5, dtype=torch.float64)
        low, high = bootstrap.intervals(Records(half, half, wrong, wrong, wrong * 0), 10, 10, 200)[
            "top1_error"
        ]
        hits += low <= 30 <= high
    assert 70 <= hits <= 80


# --- temperature


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_has_the_least_nll_of_all(factor):
    logits, labels = drawn(500)
    logits = (logits * factor).float()
    found = temperature.fit(logits, labels, "these")

    def nll(log_t):
        return summarize(logits.double() / math.exp(log_t), labels)["nll"]

    least = minimize_scalar(nll, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9})
    assert math.log(found) == pytest.approx(least.x, abs=1e-6)
    assert nll(math.log(found)) <= least.fun + 1e-15


def test_a_temperature_that_was_put_in_is_found(monkeypatch):
    """Labels drawn from softmax(z) itself, so z / 3 needs T = 1/3."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    assert 3 * temperature.fit(logits / 3, labels, "these") == pytest.approx(1, abs=0.03)
    whole = temperature.fit(logits, labels, "these")
    monkeypatch.setattr(temperature, "_BLOCK_VALUES", 999)
    assert temperature.fit(logits, labels, "these") == pytest.approx(whole, rel=1e-11)


def test_a_class_that_is_ruled_out_does_not_disturb_the_fit():
    logits, labels = drawn(200)
    expected = temperature.fit(logits, labels, "these")
    wider = torch.cat([logits, torch.full((200, 1), -math.inf)], dim=1)
    assert temperature.fit(wider, labels, "these") == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        ([[2.0, 1.0], [0.0, 3.0]], [0, 1], "all of them are predicted right"),
        ([[2.0, 1.0], [0.0, 3.0]], [1, 0], "equal chances"),
        ([[0.0, -math.inf], [0.0, 1.0]], [1, 0], "-inf"),
        ([[1.5, 1.5], [0.0, 0.0]], [1, 0], "same for all classes"),
        # Logits of an odd scale.
        ([[2e6, 0.0], [0.0, 1e6]], [0, 0], r"above 2981, where the search ends"),
        ([[2e-6, 0.0], [0.0, 1e-6]], [0, 0], r"below 0.00034, where the search ends"),
    ],
)
def test_where_no_temperature_fits_the_reason_is_named(logits, labels, reason):
    with pytest.raises(PskdError, match=f"2 samples of F.npz: .*{reason}"):
        temperature.fit(torch.tensor(logits), torch.tensor(labels), "F.npz")
