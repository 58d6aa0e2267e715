"""pskd.metrics against naive references and hand-computed values, and what it refuses."""

import math
from fractions import Fraction
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pskd.metrics import Accumulator, measures, per_sample, summarize
from tests.records import confidences, make, samples, untimed

KEYS = ["top1_error", "top5_error", "nll", "ece", "aurc", "eaurc"]


def risk_curve_mean(wrong):
    """AURC of one given order, exactly."""
    return sum(Fraction(sum(wrong[:i]), i) for i in range(1, len(wrong) + 1)) / len(wrong)


def reference_ece(confidence, wrong, num_bins):
    total = 0.0
    for k in range(num_bins):
        lo, hi = k / num_bins, (k + 1) / num_bins
        inside = [i for i, c in enumerate(confidence) if lo < c <= hi or (k == 0 and c == 0)]
        if inside:
            accuracy = sum(not wrong[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return 100 * total


def reference_aurc(confidence, wrong):
    """Each coverage by its own loop; the covered part of the tied samples counts pro rata."""
    total = Fraction(0)
    descending = sorted(confidence, reverse=True)
    for i in range(1, len(confidence) + 1):
        last = descending[i - 1]
        above = [w for c, w in zip(confidence, wrong, strict=True) if c > last]
        tied = [w for c, w in zip(confidence, wrong, strict=True) if c == last]
        errors = sum(above) + Fraction(sum(tied) * (i - len(above)), len(tied))
        total += errors / i
    return float(1000 * total / len(confidence))


few_samples = st.lists(
    st.tuples(st.sampled_from([0.3, 0.5, 0.9]), st.booleans()), min_size=1, max_size=6
)


# --- the measures, by hand


def test_hand_computed_without_ties():
    # Risk 0, 1/2, 1/3, 1/4: AURC 13/48. Gaps .1 + .8 + .3 + .4 over 4. Optimum (1/4) / 4.
    result = measures(make([0.7, 0.9, 0.6, 0.8], [0, 0, 0, 5], [0.3, 0.1, 0.4, 0.2]), 10)
    assert list(result) == KEYS
    assert result["top1_error"] == 25.0
    assert result["top5_error"] == 25.0
    assert result["nll"] == pytest.approx(0.25, rel=1e-15)
    assert result["ece"] == pytest.approx(40.0, rel=1e-14)
    assert result["aurc"] == pytest.approx(270.83333333333333, rel=1e-14)
    assert result["eaurc"] == pytest.approx(208.33333333333333, rel=1e-14)


def test_hand_computed_with_ties():
    # Three at .5 with one error: risk 0/1 for .9, then (1/3)/2, (2/3)/3, 1/4 = 1/6 + 2/9 + 1/4.
    result = measures(make([0.5, 0.9, 0.5, 0.5], [0, 0, 4, 0]), 5)
    assert result["aurc"] == pytest.approx(1000 * 23 / 144, rel=1e-14)
    assert result["eaurc"] == pytest.approx(1000 * (23 / 144 - 1 / 16), rel=1e-14)
    # (.4, .5]: accuracy 2/3, confidence 1/2, weight 3/4; (.8, .9]: gap .1, weight 1/4.
    assert result["ece"] == pytest.approx(15.0, rel=1e-14)
    assert (result["top1_error"], result["top5_error"]) == (25.0, 0.0)


def test_hand_computed_from_logits():
    # Softmax (3/4, 1/4): confidence .75; both samples in one bin, accuracy 1/2, gap 1/4.
    logits = np.log(np.array([[3.0, 1.0], [3.0, 1.0]]))
    result = summarize(logits, np.array([0, 1], dtype=np.uint8))
    assert result["top1_error"] == 50.0
    assert result["top5_error"] is None
    assert result["nll"] == pytest.approx((math.log(4 / 3) + math.log(4)) / 2, rel=1e-14)
    assert result["ece"] == pytest.approx(25.0, rel=1e-13)
    assert result["aurc"] == pytest.approx(500.0, rel=1e-14)
    assert result["eaurc"] == pytest.approx(250.0, rel=1e-14)


def test_top5_counts_ranks_from_five_on():
    records = make([0.5] * 4, [0, 4, 5, 9])
    assert measures(records, 10)["top5_error"] == 50.0
    assert measures(records, 10)["top1_error"] == 75.0


@pytest.mark.parametrize(("num_classes", "top5_error"), [(1, None), (4, None), (5, 0.0)])
def test_top5_needs_five_classes(num_classes, top5_error):
    labels = torch.zeros(2, dtype=torch.int64)
    result = summarize(torch.zeros(2, num_classes), labels)
    assert list(result) == KEYS
    assert result["top5_error"] == top5_error


@pytest.mark.parametrize(("rank", "error", "aurc", "ece"), [(0, 0, 0, 20), (7, 100, 1000, 80)])
def test_one_sample(rank, error, aurc, ece):
    result = measures(make([0.8], [rank], [2.0]), 10)
    expected = [error, error, 2.0, ece, aurc, 0.0]
    assert [result[key] for key in KEYS] == pytest.approx(expected, rel=1e-14)


@given(st.lists(confidences, min_size=1, max_size=40))
@untimed
def test_all_correct_and_all_wrong(confidence):
    correct = measures(make(confidence, [0] * len(confidence)), 10)
    assert (correct["top1_error"], correct["aurc"], correct["eaurc"]) == (0.0, 0.0, 0.0)
    wrong = measures(make(confidence, [9] * len(confidence)), 10)
    assert (wrong["top1_error"], wrong["top5_error"]) == (100.0, 100.0)
    assert wrong["aurc"] == pytest.approx(1000.0, rel=1e-14)
    assert wrong["eaurc"] == pytest.approx(0.0, abs=1e-9)
    assert wrong["ece"] == pytest.approx(100 * sum(confidence) / len(confidence), abs=1e-10)


def test_saturated_logits_are_certain():
    logits = torch.tensor([[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]])
    assert per_sample(logits, torch.tensor([0, 0])).confidence_N.tolist() == [1.0, 1.0]
    right = summarize(logits, torch.tensor([0, 1]))
    assert (right["nll"], right["ece"], right["aurc"]) == (0.0, 0.0, 0.0)
    half = summarize(logits, torch.tensor([0, 0]))
    assert (half["nll"], half["ece"], half["aurc"]) == (5000.0, 50.0, 500.0)


def test_impossible_true_class_makes_the_nll_infinite():
    logits = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    result = summarize(logits, torch.tensor([1, 0]))
    assert result["nll"] == math.inf
    assert result["ece"] == pytest.approx(75.0)


# --- the measures against the naive references


@given(samples, st.integers(1, 20))
@untimed
def test_measures_equal_the_naive_references(drawn, num_bins):
    confidence, rank, nll = zip(*drawn, strict=True)
    wrong = [r > 0 for r in rank]
    result = measures(make(confidence, rank, nll), 10, num_bins)
    assert result["top1_error"] == pytest.approx(100 * sum(wrong) / len(wrong))
    assert result["top5_error"] == pytest.approx(100 * sum(r >= 5 for r in rank) / len(rank))
    assert result["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-12)
    assert result["ece"] == pytest.approx(reference_ece(confidence, wrong, num_bins), abs=1e-9)
    assert result["aurc"] == pytest.approx(reference_aurc(confidence, wrong), abs=1e-9)
    assert result["eaurc"] >= -1e-9


@given(few_samples)
@settings(untimed, max_examples=40)
def test_tie_rule_is_the_mean_over_all_orders(drawn):
    confidence, wrong = zip(*drawn, strict=True)
    curves = [
        risk_curve_mean([wrong[i] for i in order])
        for order in permutations(range(len(wrong)))
        if all(confidence[a] >= confidence[b] for a, b in pairwise(order))
    ]
    result = measures(make(confidence, [int(w) for w in wrong]), 10)
    assert result["aurc"] == pytest.approx(float(1000 * sum(curves) / len(curves)), abs=1e-9)


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(untimed, max_examples=40)
def test_eaurc_subtracts_the_least_aurc_of_any_order(wrong, random):
    confidence = random.sample([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], len(wrong))
    least = min(risk_curve_mean(order) for order in permutations(wrong))
    result = measures(make(confidence, [int(w) for w in wrong]), 10)
    assert result["aurc"] - result["eaurc"] == pytest.approx(float(1000 * least), abs=1e-9)


def test_eaurc_is_zero_when_every_error_comes_last():
    assert measures(make([0.9, 0.8, 0.7, 0.6, 0.5], [0, 0, 0, 1, 1]), 10)["eaurc"] == 0.0


# --- ECE edges


@pytest.mark.parametrize("num_bins", [10, 15, 100])
def test_an_edge_belongs_to_the_bin_below_it(num_bins):
    for k in range(1, num_bins):
        edge, middle = k / num_bins, (k - 0.5) / num_bins
        # In one bin the two gaps offset each other; in two bins they add up.
        below = measures(make([edge, middle], [0, 1]), 10, num_bins)["ece"]
        assert below == pytest.approx(50 * abs(edge + middle - 1), abs=1e-9), k
        above = measures(make([edge, math.nextafter(edge, 1)], [0, 1]), 10, num_bins)["ece"]
        assert above == pytest.approx(50.0, abs=1e-9), k


def test_the_ends_of_the_range_are_inside():
    assert measures(make([0.0, 0.05], [0, 1]), 10)["ece"] == pytest.approx(47.5)
    assert measures(make([1.0, 0.95], [0, 1]), 10)["ece"] == pytest.approx(47.5)


def test_confidence_beyond_the_range_is_clamped():
    assert measures(make([1.0 + 1e-9], [1]), 10)["ece"] == 100.0
    assert measures(make([-1e-9], [0]), 10)["ece"] == 100.0


def test_uniform_logits_lie_exactly_on_an_edge():
    labels = torch.tensor([0, 9])
    assert per_sample(torch.zeros(2, 10), labels).confidence_N.tolist() == [0.1, 0.1]
    assert summarize(torch.zeros(2, 10), labels)["ece"] == pytest.approx(40.0)


def test_one_bin_compares_the_means():
    assert measures(make([0.2, 0.6], [0, 1]), 10, num_bins=1)["ece"] == pytest.approx(10.0)


# --- errors


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match=r"there are no samples: evaluate at least one"):
        measures(Accumulator().records(), 10)
    with pytest.raises(ValueError, match=r"there are no samples"):
        summarize(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("num_bins", [0, -3])
def test_num_bins_must_be_positive(num_bins):
    with pytest.raises(ValueError, match=rf"num_bins is {num_bins}: give at least 1"):
        measures(make([0.5], [0]), 10, num_bins)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_illegal_confidence_is_named(value):
    records = make([0.5, value, 0.4, value], [0, 0, 0, 0])
    message = rf"^2 of 4 confidences are illegal, the first {value} at sample 1: check"
    with pytest.raises(ValueError, match=message):
        measures(records, 10)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_illegal_nll_is_named(value):
    records = make([0.5, 0.5, 0.4], [0, 0, 0], [math.inf, 1.0, value])
    with pytest.raises(ValueError, match=rf"^1 of 3 NLLs .*the first {value} at sample 2: check"):
        measures(records, 10)


@pytest.mark.parametrize("row", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_streamed_logits_that_have_no_softmax_are_refused_at_the_end(row):
    accumulator = Accumulator()
    accumulator.update(torch.tensor([[0.0, 1.0], row]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^1 of 2 confidences .*nan at sample 1"):
        measures(accumulator.records(), 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_illegal_logit_is_named(value):
    logits = torch.zeros(4, 3)
    logits[2, 1] = logits[3, 0] = value
    message = rf"^the logits hold 2 NaN or \+inf, the first {value} at sample 2, class 1: check"
    with pytest.raises(ValueError, match=message):
        summarize(logits, torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("label", [-1, 3, 255])
def test_illegal_label_is_named(label):
    with pytest.raises(ValueError, match=rf"^the labels hold {label} at sample 1, not in \[0, 3\)"):
        summarize(torch.zeros(3, 3), torch.tensor([0, label, -7]))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), r"^the logits have shape \(3,\): give \(N, C\)"),
        (torch.zeros(3, 0), torch.zeros(3).long(), r"^the logits have shape \(3, 0\)"),
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), r"^the logits are int64: give fl"),
        (torch.zeros(3, 2), torch.zeros(1).long(), r"^the labels have shape \(1,\) beside 3 rows"),
        (torch.zeros(3, 2), torch.zeros(3, 2).long(), r"^the labels have shape \(3, 2\) beside 3"),
        (torch.zeros(3, 2), torch.zeros(3), r"^the labels are float32: give class"),
        (torch.zeros(3, 2), torch.zeros(3).bool(), r"^the labels are bool: give class"),
    ],
)
def test_wrong_form_is_named_in_both_forms(logits, labels, message):
    for call in (summarize, per_sample, Accumulator().update):
        with pytest.raises(ValueError, match=message):
            call(logits, labels)
