"""One record per sample, and measures that no order, sharding or thread changes by a bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from pskd import metrics
from pskd.metrics import Accumulator, Records, measures, per_sample, summarize
from tests.records import make, samples, untimed


def take(records, index):
    return Records.unpack(records.pack()[index])


def bits(result):
    return {key: None if value is None else value.hex() for key, value in result.items()}


def reference_row(logits, label):
    top = max(logits)
    exps = [math.exp(z - top) for z in logits]
    order = sorted(range(len(logits)), key=lambda c: (-logits[c], c))
    nll = math.log(sum(exps)) + top - logits[label]
    return max(exps) / sum(exps), nll, order.index(label)


def from_samples(drawn):
    confidence, rank, nll = zip(*drawn, strict=True)
    return make(confidence, rank, nll)


# --- one record per sample


@given(st.data(), st.integers(1, 8), st.integers(0, 12))
@untimed
def test_per_sample_equals_the_naive_reference(data, num_classes, n):
    # A coarse grid makes equal logits frequent.
    logit = st.integers(-8, 8).map(lambda v: v / 2)
    row = st.tuples(
        st.lists(logit, min_size=num_classes, max_size=num_classes),
        st.integers(0, num_classes - 1),
    )
    rows = data.draw(st.lists(row, min_size=n, max_size=n))
    logits = torch.tensor([r for r, _ in rows], dtype=torch.float32).reshape(n, num_classes)
    records = per_sample(logits, torch.tensor([y for _, y in rows], dtype=torch.int32))
    assert len(records) == n
    assert records.confidence_N.dtype == records.nll_N.dtype == torch.float64
    for i, (row_logits, label) in enumerate(rows):
        confidence, nll, rank = reference_row(row_logits, label)
        assert records.confidence_N[i].item() == pytest.approx(confidence, rel=1e-14)
        assert records.nll_N[i].item() == pytest.approx(nll, rel=1e-13, abs=1e-14)
        assert records.rank_N[i].item() == rank
        assert records.label_N[i].item() == label
        best = max(range(num_classes), key=lambda c: (row_logits[c], -c))
        assert records.prediction_N[i].item() == best


def test_equal_logits_rank_by_class_index():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0]]).repeat(4, 1)
    records = per_sample(logits, torch.arange(4))
    assert records.rank_N.tolist() == [3, 0, 1, 2]
    assert records.prediction_N.tolist() == [1, 1, 1, 1]


def test_a_sample_is_right_exactly_if_its_rank_is_0(many):
    records = per_sample(*many)
    assert torch.equal(records.prediction_N == records.label_N, records.rank_N == 0)


def test_blocks_of_rows_change_no_bit(many, monkeypatch):
    whole = per_sample(*many).pack()
    for values in (1, 10, 999, 123_456):
        monkeypatch.setattr(metrics, "_BLOCK_VALUES", values)
        rows = slice(0, 50_000 if values > 10_000 else 500)
        assert torch.equal(per_sample(many[0][rows], many[1][rows]).pack(), whole[rows])


def test_the_arrays_of_the_records_have_fixed_types(many):
    records = per_sample(many[0][:9], many[1][:9])
    arrays = records.arrays()
    types = {name: array.dtype.name for name, array in arrays.items()}
    whole, real = "int32", "float64"
    assert types == {
        "label": whole, "prediction": whole, "confidence": real, "nll": real, "rank": whole
    }  # fmt: skip
    assert arrays["label"].tolist() == many[1][:9].tolist()
    assert arrays["nll"].tolist() == records.nll_N.tolist()


def test_measures_equal_those_of_scikit_learn(many):
    """Top-k and NLL by its own code; the ECE of two classes from its calibration curve."""
    logits, labels = many[0][:5000].double(), many[1][:5000].numpy()
    scores, classes = logits.softmax(dim=1).numpy(), np.arange(10)
    # No ties: it breaks them otherwise.
    scores += np.random.default_rng(0).uniform(0, 1e-9, scores.shape)
    scores /= scores.sum(axis=1, keepdims=True)
    found = summarize(np.log(scores), labels)
    for k, name in ((1, "top1_error"), (5, "top5_error")):
        right = top_k_accuracy_score(labels, scores, k=k, labels=classes)
        assert found[name] == pytest.approx(100 * (1 - right), abs=1e-9)
    assert found["nll"] == pytest.approx(log_loss(labels, scores, labels=classes), rel=1e-9)
    right = scores.argmax(axis=1) == labels
    for bins in (10, 15):
        confidence = scores.max(axis=1)
        edges = np.linspace(0, 1, bins + 1)
        place = np.digitize(confidence, edges[1:-1], right=True)
        mean_right, mean_confidence = calibration_curve(right, confidence, n_bins=bins)
        share = np.bincount(place)[np.bincount(place) > 0] / len(right)
        expected = 100 * (share * np.abs(mean_right - mean_confidence)).sum()
        assert summarize(np.log(scores), labels, bins)["ece"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("classes", [2, 5, 10])
def test_measures_equal_those_of_torchmetrics(classes, bins):
    """It computes in float32, and has a bin of its own for a confidence of exactly 1: none here."""
    generator = torch.Generator().manual_seed(classes)
    logits = 2 * torch.randn(5000, classes, generator=generator)
    labels = torch.randint(classes, (5000,), generator=generator)
    found = summarize(logits, labels, bins)
    ece = MulticlassCalibrationError(classes, n_bins=bins, norm="l1", validate_args=False)
    assert found["ece"] == pytest.approx(100 * ece(logits.softmax(dim=1), labels).item(), abs=1e-3)
    for k, name in ((1, "top1_error"), (5, "top5_error")):
        if k <= classes and classes >= 5:
            right = MulticlassAccuracy(classes, top_k=k, average="micro")(logits, labels)
            assert found[name] == pytest.approx(100 * (1 - right.item()), abs=1e-4)


def test_confusion_and_error_of_each_class_follow_from_the_records(many):
    logits, labels = many[0][:2000].numpy(), many[1][:2000].numpy()
    arrays = per_sample(*map(torch.from_numpy, (logits, labels))).arrays()
    expected = confusion_matrix(labels, logits.argmax(axis=1), labels=np.arange(10))
    found = np.zeros((10, 10), int)
    np.add.at(found, (arrays["label"], arrays["prediction"]), 1)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize(("right", "error"), [(True, 0.0), (False, 100.0)])
@pytest.mark.parametrize("n", [1, 40])
def test_two_classes_all_right_or_all_wrong(right, error, n):
    logits = torch.tensor([[2.0, -1.0]]).repeat(n, 1)
    labels = torch.full((n,), 0 if right else 1)
    found = summarize(logits, labels)
    confidence = 1 / (1 + math.exp(-3.0))
    assert (found["top1_error"], found["top5_error"]) == (error, None)
    ece = 100 * (1 - confidence if right else confidence)
    assert found["ece"] == pytest.approx(ece, rel=1e-13)
    assert found["aurc"] == pytest.approx(10 * error, rel=1e-13)
    assert found["eaurc"] == pytest.approx(0.0, abs=1e-9)
    assert found["nll"] == pytest.approx(-math.log(confidence if right else 1 - confidence))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_computed_in_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(50, 11, generator=generator)).to(dtype)
    labels = torch.randint(11, (50,), generator=generator)
    rows = [reference_row(z, y) for z, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    records = per_sample(logits, labels)
    np.testing.assert_allclose(records.pack()[:, :3].numpy(), rows, rtol=1e-13, atol=1e-13)
    mean_nll = sum(nll for _, nll, _ in rows) / len(rows)
    assert summarize(logits, labels)["nll"] == pytest.approx(mean_nll, rel=1e-13)


def test_records_carry_no_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    assert not per_sample(logits, torch.zeros(3, dtype=torch.int64)).pack().requires_grad


def test_evaluation_path_reads_no_tensor_value():
    """A meta tensor has no values: any .item(), bool() or data-dependent shape would raise."""
    accumulator = Accumulator()
    for size in (4, 3):
        labels = torch.zeros(size, dtype=torch.int64, device="meta")
        accumulator.update(torch.empty(size, 10, dtype=torch.bfloat16, device="meta"), labels)
    assert accumulator.records().pack().shape == (7, 5)


# --- order and sharding


@given(samples, st.randoms(use_true_random=False))
@untimed
def test_measures_ignore_the_order_bitwise(drawn, random):
    shuffled = random.sample(drawn, len(drawn))
    assert bits(measures(from_samples(shuffled), 10)) == bits(measures(from_samples(drawn), 10))


@pytest.fixture(scope="module")
def many():
    """50 000 samples (an ImageNet validation set); every fourth confidence is one of ten values."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(50_000, 10, generator=generator)
    logits[::4] = torch.randint(2, (12_500, 10), generator=generator).float()
    return logits, torch.randint(10, (50_000,), generator=generator)


def test_order_of_many_samples_ignored_bitwise(many):
    records = per_sample(*many)
    expected = bits(measures(records, 10))
    for seed in range(3):
        index = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
        assert bits(measures(take(records, index), 10)) == expected


@pytest.mark.parametrize("confidence", [0.1, 0.3, 0.7])
def test_order_inside_one_group_of_ties_ignored_bitwise(confidence):
    """Sorting by confidence cannot order these; only exact sums make their order irrelevant."""
    generator = torch.Generator().manual_seed(2)
    records = make([confidence] * 997, torch.randint(2, (997,), generator=generator).tolist())
    results = []
    for _ in range(20):
        index = torch.randperm(len(records), generator=generator)
        results.append(bits(measures(take(records, index), 10)))
    assert all(result == results[0] for result in results)


def test_thread_count_ignored_bitwise(many):
    """torchrun sets OMP_NUM_THREADS=1 for more than one rank, so threads vary with ranks."""
    records = per_sample(*many)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(bits(measures(records, 10)))
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(untimed, max_examples=50)
def test_any_sharding_gives_the_same_bits(sizes, random):
    generator = torch.Generator().manual_seed(sum(sizes))
    n = sum(sizes) + 1
    logits = (3 * torch.randn(n, 7, generator=generator)).half()
    labels = torch.randint(7, (n,), generator=generator)
    order = torch.randperm(n, generator=generator)
    shards = []
    for index in order.split([*sizes, 1]):
        accumulator = Accumulator()
        for batch in index.split(16) if len(index) else ():
            accumulator.update(logits[batch], labels[batch])
        shards.append(accumulator.records().pack())
    random.shuffle(shards)
    gathered = Records.concatenate([Records.unpack(shard) for shard in shards])
    assert bits(measures(gathered, 7)) == bits(summarize(logits, labels))


@given(samples)
@untimed
def test_pack_loses_nothing(drawn):
    records = from_samples([*drawn, (1.0, 2**24 + 1, math.inf)])
    packed = records.pack()
    assert (packed.shape, packed.dtype) == ((len(records), 5), torch.float64)
    back = Records.unpack(packed)
    assert torch.equal(back.confidence_N, records.confidence_N)
    assert torch.equal(back.nll_N, records.nll_N)
    assert torch.equal(back.rank_N, records.rank_N)
    assert back.rank_N.dtype == back.label_N.dtype == back.prediction_N.dtype == torch.int64
    assert torch.equal(back.label_N, records.label_N)
    assert torch.equal(back.prediction_N, records.prediction_N)


def test_concatenate_keeps_the_order_of_the_parts():
    joined = Records.concatenate([make([0.1], [1], [3.0]), make([0.2, 0.3], [2, 0], [4.0, 5.0])])
    assert joined.pack()[:, :3].tolist() == [[0.1, 3.0, 1.0], [0.2, 4.0, 2.0], [0.3, 5.0, 0.0]]
    assert joined.pack()[:, 3:].tolist() == [[0, 1], [0, 1], [0, 0]]


def test_to_moves_every_field():
    moved = make([0.1], [1]).to("meta")
    assert {column.device.type for column in vars(moved).values()} == {"meta"}


def test_a_rank_without_samples_has_empty_records():
    empty = Accumulator().records()
    assert (len(empty), empty.pack().shape) == (0, (0, 5))
    one = make([0.8], [0])
    assert Records.concatenate([empty, one]).pack().equal(one.pack())


def test_numpy_and_torch_inputs_agree(many):
    logits, labels = many[0][:100], many[1][:100]
    assert bits(summarize(logits.numpy(), labels.numpy())) == bits(summarize(logits, labels))


@pytest.mark.filterwarnings("error")
def test_numpy_views_and_read_only_arrays_are_accepted(many):
    logits, labels = many[0][:100].numpy(), many[1][:100].numpy()
    expected = bits(summarize(logits, labels))
    assert bits(summarize(logits[::-1], labels[::-1])) == expected
    frozen = logits.copy()
    frozen.flags.writeable = False
    assert bits(summarize(frozen, labels)) == expected


def test_summarize_passes_the_number_of_bins():
    logits, labels = np.log([[0.75, 0.25], [0.95, 0.05]]), np.array([0, 1])
    assert summarize(logits, labels)["ece"] == pytest.approx(60.0)
    assert summarize(logits, labels, num_bins=1)["ece"] == pytest.approx(35.0)
