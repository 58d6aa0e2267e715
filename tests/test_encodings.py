"""Row encodings: what each keeps of a row of probabilities, what it loses, and what it refuses.

Letters: B rows, C classes, R bytes of an encoded row, K largest classes.
"""

import math
import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from pskd.errors import PskdError
from pskd.methods.pskd import soft_targets
from pskd.store import open_generation
from pskd.store.format import stride_of
from pskd.store.registry import ENCODINGS, check_encoding, create_encoding
from tests.lone_store import new_store

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

LOSSLESS, ALL = "float32", ["float32", "float16", "uint8-log", "top1", "top5"]
NATS, HALF_STEP = 16, 8 / 255  # of uint8-log


@st.composite
def rows(draw, most_classes=300):
    """Softmax rows from flat to confident, and extreme ones; C from 2 on."""
    classes = draw(st.sampled_from([2, 3, 10, 255]) | st.integers(2, most_classes))
    seed, scale = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.3, 3.0, 30.0, 300.0]))
    generator = torch.Generator().manual_seed(seed)
    probs_BC = torch.softmax(scale * torch.randn(5, classes, generator=generator), dim=1)
    probs_BC[0] = torch.eye(classes)[seed % classes]
    probs_BC[1] = 1 / classes
    probs_BC[2] = 1e-30
    probs_BC[2, seed % classes] = 1 - 1e-30 * (classes - 1)
    return probs_BC


def encode(encoding, probs_BC):
    """The bytes, written into a chunk as the store does: rows of whole units of 16 bytes."""
    width = encoding.row_bytes(probs_BC.shape[1])
    units_BS = torch.full((len(probs_BC), stride_of(width)), 7, dtype=torch.uint8)
    encoding.encode(probs_BC, units_BS[:, :width])
    assert (units_BS[:, width:] == 7).all(), "not a byte beyond the row"
    return units_BS[:, :width].contiguous()


def round_trip(name, probs_BC):
    encoding = create_encoding(name)
    classes = probs_BC.shape[1]
    decoded_BC = encoding.decode(encode(encoding, probs_BC), classes)
    assert decoded_BC.dtype == torch.float32
    assert decoded_BC.shape == probs_BC.shape
    return decoded_BC


def assert_distributions(probs_BC):
    assert torch.isfinite(probs_BC).all()
    assert (probs_BC >= 0).all()
    assert (probs_BC.double().sum(dim=1) - 1).abs().max() < 1e-6


def fits(name, classes):
    return not name.startswith("top") or int(name[3:]) < classes


class TestEveryEncoding:
    @pytest.mark.parametrize("name", ALL)
    @given(probs_BC=rows())
    @settings(untimed, max_examples=60)
    def test_rows_stay_distributions_with_the_same_largest_class(self, name, probs_BC):
        assume(fits(name, probs_BC.shape[1]))
        before_BC = probs_BC.clone()
        decoded_BC = round_trip(name, probs_BC)
        assert torch.equal(probs_BC, before_BC), "the caller's rows are not touched"
        assert_distributions(decoded_BC)
        # Of equal largest classes any may come first: the exact maximum is a maximum after it.
        best_B1 = probs_BC.argmax(dim=1, keepdim=True)
        behind_B1 = decoded_BC.amax(dim=1, keepdim=True) - decoded_BC.gather(1, best_B1)
        # A flat row's rest may come out above the rounded values of the k.
        assert (behind_B1 <= (5e-4 if name.startswith("top") else 0)).all()

    @pytest.mark.parametrize("name", ALL)
    def test_rows_are_independent_of_their_neighbours(self, name):
        probs_BC = torch.softmax(8 * torch.randn(7, 33), dim=1)
        together_BC = round_trip(name, probs_BC)
        for row, probs_C in enumerate(probs_BC):
            assert torch.equal(round_trip(name, probs_C[None])[0], together_BC[row])

    @pytest.mark.parametrize("name", ALL)
    def test_decoding_twice_gives_the_same_and_leaves_the_bytes(self, name):
        """Carried forward, a row is decoded many times; it must not drift."""
        encoding, probs_BC = create_encoding(name), torch.softmax(4 * torch.randn(7, 33), dim=1)
        bytes_BR = encode(encoding, probs_BC)
        kept_BR = bytes_BR.clone()
        first_BC = encoding.decode(bytes_BR, 33)
        assert torch.equal(encoding.decode(bytes_BR, 33), first_BC)
        assert torch.equal(bytes_BR, kept_BR)

    @pytest.mark.parametrize("name", ALL)
    def test_strides_do_not_matter(self, name):
        """Rows out of a transposed or a wider tensor, and bytes out of a wider buffer."""
        encoding, probs_BC = create_encoding(name), torch.softmax(4 * torch.randn(6, 9), dim=1)
        bytes_BR = encode(encoding, probs_BC)
        wide = torch.zeros(6, 20)
        wide[:, 3:12] = probs_BC
        for view in (probs_BC.t().contiguous().t(), wide[:, 3:12], wide.flip(0).flip(0)[:, 3:12]):
            assert torch.equal(encode(encoding, view), bytes_BR)
        wide_bytes = torch.full((6, bytes_BR.shape[1] + 16), 7, dtype=torch.uint8)
        wide_bytes[:, : bytes_BR.shape[1]] = bytes_BR
        decoded_BC = encoding.decode(wide_bytes[:, : bytes_BR.shape[1]], 9)
        assert torch.equal(decoded_BC, encoding.decode(bytes_BR, 9))

    @pytest.mark.parametrize("name", ALL)
    def test_no_rows_are_no_bytes(self, name):
        encoding = create_encoding(name)
        none_BR = encode(encoding, torch.empty(0, 16))
        assert none_BR.shape == (0, encoding.row_bytes(16))
        assert encoding.decode(none_BR, 16).shape == (0, 16)


class TestFloats:
    @given(probs_BC=rows())
    @settings(untimed, max_examples=60)
    def test_float32_is_exact(self, probs_BC):
        assert torch.equal(round_trip("float32", probs_BC), probs_BC)

    @given(probs_BC=rows())
    @settings(untimed, max_examples=60)
    def test_float16_is_within_half_a_unit_of_the_last_place(self, probs_BC):
        """11 bits, and below 2^-14 steps of 2^-24; renormalising adds the error of the sum."""
        decoded_BC = round_trip("float16", probs_BC)
        half_unit_BC = torch.clamp(probs_BC.double() * 2**-11, min=2**-25)
        of_sum_B1 = half_unit_BC.sum(dim=1, keepdim=True) + 1e-6
        bound_BC = half_unit_BC + probs_BC * of_sum_B1 * 1.01
        assert ((decoded_BC.double() - probs_BC.double()).abs() <= bound_BC + 1e-9).all()
        assert (decoded_BC - probs_BC).abs().max() <= 5e-4

    def test_a_softmax_is_off_by_less_than_the_documented_error(self):
        probs_BC = torch.softmax(6 * torch.randn(500, 100), dim=1)
        assert (round_trip("float16", probs_BC) - probs_BC).abs().max() <= 2.5e-4

    def test_sizes(self):
        assert create_encoding("float32").row_bytes(1000) == 4000
        assert create_encoding("float16").row_bytes(1000) == 2000


class TestUint8Log:
    @given(probs_BC=rows())
    @settings(untimed, max_examples=100)
    @example(probs_BC=torch.tensor([[0.0, 1.0]]))
    @example(probs_BC=torch.tensor([[0.5, 0.5]]))
    def test_each_class_is_off_by_half_a_step_or_is_zero(self, probs_BC):
        """Relative to the row's largest, which the scale of the row cancels out of."""
        decoded_BC = round_trip("uint8-log", probs_BC).double()
        nats_BC = (probs_BC.double() / probs_BC.double().amax(dim=1, keepdim=True)).log()
        ratio_BC = decoded_BC / decoded_BC.amax(dim=1, keepdim=True)
        # The last half step rounds to zero as well; float32 logarithms are good to 1e-5 nats here.
        kept_BC, gone_BC = nats_BC > -NATS + HALF_STEP + 1e-4, nats_BC < -NATS + HALF_STEP - 1e-4
        off_BC = (ratio_BC.log() - nats_BC).abs()[kept_BC]
        assert (off_BC <= HALF_STEP + 1e-4).all()
        assert (ratio_BC[gone_BC] == 0).all()

    def test_after_renormalising_too_a_class_is_off_by_a_few_percent(self):
        probs_BC = torch.softmax(3 * torch.randn(200, 1000), dim=1)
        near_BC = probs_BC > math.exp(-NATS + 0.1) * probs_BC.amax(dim=1, keepdim=True)
        factor_BC = (round_trip("uint8-log", probs_BC) / probs_BC)[near_BC]
        assert factor_BC.max() <= math.exp(2 * HALF_STEP) * 1.001
        assert factor_BC.min() >= math.exp(-2 * HALF_STEP) / 1.001
        assert (factor_BC.mean() - 1).abs() < 0.002, "no bias"

    def test_every_level_comes_back(self):
        """256 classes, one at each of the 255 levels and one below them all."""
        levels = torch.arange(256, dtype=torch.float64)
        probs_C = ((levels - 255) * NATS / 255).exp()
        probs_C[0] = 0
        probs_C /= probs_C.sum()
        encoded = encode(create_encoding("uint8-log"), probs_C.float()[None])
        assert encoded[0].tolist() == list(range(256))
        decoded_BC = round_trip("uint8-log", probs_C.float()[None])
        assert torch.allclose(decoded_BC[0].double(), probs_C, rtol=1e-5, atol=0)

    def test_size(self):
        assert create_encoding("uint8-log").row_bytes(1000) == 1000


class TestTopK:
    @given(probs_BC=rows(), k=st.integers(1, 40))
    @settings(untimed, max_examples=100)
    def test_the_largest_are_kept_and_the_rest_is_spread_evenly(self, probs_BC, k):
        classes = probs_BC.shape[1]
        k = min(k, classes - 1)
        encoding = create_encoding(f"top{k}")
        bytes_BR = encode(encoding, probs_BC)
        decoded_BC = encoding.decode(bytes_BR, classes)
        index_BK = bytes_BR[:, 2 * k :].contiguous().view(torch.uint16).long()
        for probs_C, decoded_C, index_K in zip(probs_BC, decoded_BC, index_BK, strict=True):
            assert len(index_K.unique()) == k
            kept_C = torch.zeros(classes, dtype=torch.bool)
            kept_C[index_K] = True
            # Which of several equal classes is kept does not matter, that none larger is lost does.
            assert probs_C[kept_C].min() >= probs_C[~kept_C].max()
            assert (decoded_C[kept_C] - probs_C[kept_C]).abs().max() <= 5e-4
            assert len(decoded_C[~kept_C].unique()) == 1
            rest = 1 - probs_C[kept_C].double().sum()
            assert abs(decoded_C[~kept_C].double().sum() - rest) <= 2.5e-4 + k * 2**-25 + 5e-4

    def test_values_have_the_precision_of_float16(self):
        probs_BC = torch.softmax(2 * torch.randn(100, 1000), dim=1)
        largest_BK, index_BK = probs_BC.topk(20, dim=1)
        got_BK = round_trip("top20", probs_BC).gather(1, index_BK)
        assert ((got_BK - largest_BK).abs() <= largest_BK * 2**-11 + 2**-25 + 1e-6).all()

    def test_ties_keep_k_of_the_equal_ones(self):
        probs_BC = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.3, 0.0]])
        decoded_BC = round_trip("top2", probs_BC)
        assert torch.allclose(decoded_BC[0], torch.full((4,), 0.25), atol=1e-6)
        assert sorted(decoded_BC[1].tolist()) == pytest.approx([0.15, 0.15, 0.3, 0.4], abs=2e-4)

    @pytest.mark.parametrize(("classes", "index_bytes"), [(65536, 2), (65537, 4)])
    def test_indices_reach_the_last_class(self, classes, index_bytes):
        """Unsigned 16 bits as far as they reach, else 32."""
        encoding = create_encoding("top2")
        assert encoding.row_bytes(classes) == 2 * (2 + index_bytes)
        probs_BC = torch.zeros(3, classes)
        for row, best in enumerate([classes - 1, 32768, 0]):
            probs_BC[row, best], probs_BC[row, (best + 32767) % classes] = 0.75, 0.25
        assert torch.equal(round_trip("top2", probs_BC), probs_BC)

    @pytest.mark.parametrize("rows_B", [1, 2])
    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_any_k_and_any_number_of_rows_with_wide_indices(self, k, rows_B):
        probs_BC = torch.zeros(rows_B, 70_000)
        probs_BC[:, 69_999] = 1
        assert torch.equal(round_trip(f"top{k}", probs_BC), probs_BC)

    @pytest.mark.parametrize(("k", "classes"), [(10, 10), (11, 10), (20, 2), (1, 1)])
    def test_keeping_all_classes_is_refused(self, k, classes, tmp_path):
        with pytest.raises(PskdError) as caught:
            store(tmp_path, f"top{k}", classes=classes)
        assert f"store.encoding top{k} keeps {k} of {classes} classes" in str(caught.value)
        assert "float16" in str(caught.value)

    def test_keeping_all_but_one_is_exact_to_float16(self):
        probs_BC = torch.softmax(torch.randn(50, 10), dim=1)
        assert (round_trip("top9", probs_BC) - probs_BC).abs().max() <= 1e-3


class TestNames:
    @pytest.mark.parametrize(
        ("name", "suggestion"),
        [
            ("top0", "top"),
            ("top-5", "top"),
            ("top05", "top"),
            ("top", "top"),
            ("int8", "uint8-log"),
            ("uint8", "uint8-log"),
            ("fp16", "float16"),
            ("Float16", "float16"),
            ("bfloat16", "float16"),
        ],
    )
    def test_an_unknown_name_is_refused_with_a_suggestion(self, name, suggestion):
        for use in (check_encoding, create_encoding):
            with pytest.raises(PskdError, match=f"store.encoding '{name}' is unknown") as caught:
                use(name)
            assert f"did you mean '{suggestion}" in str(caught.value)

    @pytest.mark.parametrize("name", ["TOP5", "", "5", "top5 ", "top5.0", "top5\n", "top1e3"])
    def test_what_resembles_nothing_is_refused_with_the_known_ones(self, name):
        with pytest.raises(PskdError) as caught:
            check_encoding(name)
        assert "Known: float16, float32, top20, top50, uint8-log" in str(caught.value)

    @pytest.mark.parametrize("name", ["float16", "float32", "uint8-log", "top1", "top50", "top123"])
    def test_an_encoding_has_the_name_that_it_is_created_by(self, name):
        assert create_encoding(name).name == name


@dataclass(frozen=True)
class Toy:
    """The largest class only, as four bytes."""

    name: str = "toy"

    def row_bytes(self, classes):
        return 4

    def encode(self, probs_BC, out_BR):
        out_BR.view(torch.int32).copy_(probs_BC.argmax(dim=1, keepdim=True))

    def decode(self, bytes_BR, classes):
        best_B1 = bytes_BR.contiguous().view(torch.int32).long()
        return torch.zeros(len(bytes_BR), classes).scatter_(1, best_B1, 1.0)


def store(directory, encoding, classes=6):
    return new_store(directory, n=11, classes=classes, encoding=encoding)


@pytest.fixture
def toy(monkeypatch):
    """An encoding of somebody else's, in a module of theirs."""
    module = ModuleType("somebody_elses")
    module.Toy = Toy
    monkeypatch.setitem(sys.modules, "somebody_elses", module)
    monkeypatch.setitem(ENCODINGS, "toy", ("somebody_elses", "Toy"))


class TestInTheStore:
    def test_an_encoding_of_ones_own_needs_no_change_in_the_package(self, toy, tmp_path):
        check_encoding("toy")
        probs_BC = torch.softmax(torch.randn(11, 6), dim=1)
        want_BC = torch.eye(6)[probs_BC.argmax(dim=1)]
        job = store(tmp_path, "toy")
        job.begin_epoch(0)
        job.remember(np.arange(11), probs_BC)
        job.begin_epoch(1)
        assert torch.equal(job.past(np.arange(11))[0], want_BC)
        job.begin_epoch(2)  # all of them carried forward
        state = job.state_dict()
        job.close()
        assert torch.equal(open_generation(tmp_path / "gen-000001")[range(11)], want_BC)
        again = store(tmp_path, "toy")
        again.load_state_dict(state)
        again.begin_epoch(2)
        assert torch.equal(again.past(np.arange(11))[0], want_BC)
        again.close()

    @pytest.mark.parametrize("name", ALL)
    def test_what_the_store_gives_back_is_the_round_trip(self, name, tmp_path):
        """Also rows whose bytes do not fill a unit of 16, and after being carried forward."""
        probs_BC = torch.softmax(5 * torch.randn(11, 7), dim=1)
        want_BC = round_trip(name, probs_BC)
        job = store(tmp_path, name, classes=7)
        job.begin_epoch(0)
        job.remember(np.arange(8), probs_BC[:8])
        job.remember(np.arange(8, 11), probs_BC[8:])
        for epoch in (1, 2, 3):
            job.begin_epoch(epoch)
            assert torch.equal(job.past(np.arange(11))[0], want_BC)
        job.close()


def gradients(sharpness):
    """PS-KD gradients at C=1000, alpha 0.8, as a function of past rows; and exact past rows.

    The student is the teacher plus noise: low-rank logits plus noise.
    """
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(256, 32, generator=generator) @ torch.randn(
        32, 1000, generator=generator
    )
    noise_BC = torch.randn(256, 1000, generator=generator)
    logits_BC = sharpness * (logits_BC / 32**0.5 + noise_BC / 6)
    labels_B = torch.where(
        torch.rand(256, generator=generator) < 0.7,
        logits_BC.argmax(dim=1),
        torch.randint(1000, (256,), generator=generator),
    )
    past_BC = logits_BC.softmax(dim=1)
    noise_BC = torch.randn(256, 1000, generator=generator)
    student_BC = (logits_BC + sharpness / 10 * noise_BC).softmax(dim=1)

    def gradient(rows_BC):
        return (student_BC - soft_targets(labels_B, rows_BC, 0.8)).double().flatten()

    return past_BC, gradient


# Bounds about twice what was measured: at an entropy of 6.4 nats, that of `flat`, 1-cos of a batch
# was fp16 1e-9, uint8 6e-6, top-5 8e-3, top-20 5e-3, top-50 3e-3.
@pytest.mark.parametrize(
    ("name", "flat", "peaked"),
    [
        ("float32", (1e-12, 0.0), (1e-12, 0.0)),
        ("float16", (3e-9, 1e-4), (5e-8, 5e-4)),
        ("uint8-log", (1.5e-5, 8e-3), (1.5e-4, 0.025)),
        ("top5", (0.018, 0.25), (0.015, 0.25)),
        ("top20", (0.011, 0.2), (3e-4, 0.03)),
        ("top50", (0.007, 0.16), (1e-5, 6e-3)),
    ],
)
def test_the_gradient_is_off_by_no_more_than_was_measured(name, flat, peaked):
    for sharpness, (most_angle, most_relative) in [(1, flat), (6, peaked)]:
        past_BC, gradient = gradients(sharpness)
        exact, got = gradient(past_BC), gradient(round_trip(name, past_BC))
        cosine = torch.dot(exact, got) / exact.norm() / got.norm()
        assert 1 - cosine <= most_angle
        assert (got - exact).norm() / exact.norm() <= most_relative
