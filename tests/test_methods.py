"""PS-KD and the baseline against an independent float64 model of the equations."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pskd.data.batch import Batch
from pskd.methods import registry
from pskd.methods.baseline import Baseline
from pskd.methods.interface import Past
from pskd.methods.pskd import (
    PSKD,
    alpha_at,
    soft_cross_entropy,
    soft_cross_entropy_per_sample,
    soft_targets,
)
from pskd.methods.sections import METHODS, BaselineSection, PSKDSection

untimed = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
sizes = {"seed": st.integers(0, 2**32 - 1), "b": st.integers(1, 8), "c": st.integers(2, 12)}


# --- the independent model, numpy float64 --------------------------------------------------


def log_softmax(logits_BC):
    z = np.asarray(logits_BC, dtype=np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def softmax(logits_BC):
    return np.exp(log_softmax(logits_BC))


def cross_entropy(logits_BC, targets_BC):
    return -(targets_BC * log_softmax(logits_BC)).sum(axis=1)


class Model:
    """PS-KD with a dictionary for a store: id -> the last prediction."""

    def __init__(self, epochs, alpha_T):
        self.epochs, self.alpha_T, self.past = epochs, alpha_T, {}

    def step(self, epoch, ids, labels, logits_BC):
        """(targets, losses); remembers after the targets are made."""
        alpha = self.alpha_T * (epoch + 1) / self.epochs
        onehot_BC = np.eye(logits_BC.shape[1])[labels]
        rows = [self.past.get(i, hot) for i, hot in zip(ids, onehot_BC, strict=True)]
        targets_BC = (1 - alpha) * onehot_BC + alpha * np.array(rows)
        self.past.update(zip(ids, softmax(logits_BC), strict=True))
        return targets_BC, cross_entropy(logits_BC, targets_BC)


# --- what is tested against it -------------------------------------------------------------


class Table:
    """What the store promises: float32 rows, zeros and False for an id never seen."""

    def __init__(self, n, c):
        self.rows_NC, self.present_N = torch.zeros(n, c), torch.zeros(n, dtype=torch.bool)

    def past(self, ids):
        return Past(self.rows_NC[ids].clone(), self.present_N[ids].clone())

    def remember(self, ids, rows_BC):
        self.rows_NC[ids], self.present_N[ids] = rows_BC, True


def batch_of(ids, labels):
    images = torch.as_tensor(ids, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)
    weights = torch.ones(len(ids))
    return Batch(torch.as_tensor(ids), images, torch.as_tensor(labels), weights)


def forward_to(logits_BC, calls):
    def forward(images_BCHW):
        calls.append(images_BCHW)
        return logits_BC

    return forward


def random_logits(rng, b, c, scale=4):
    return torch.tensor(rng.normal(0, scale, (b, c)), dtype=torch.float32, requires_grad=True)


def assert_cross_entropy(output, logits, labels):
    """Loss and gradient are those of the one-hot label."""
    output.loss_B.mean().backward()
    z, onehot = logits.detach().numpy(), np.eye(logits.shape[1])[labels]
    expected = cross_entropy(z, onehot)
    np.testing.assert_allclose(output.loss_B.detach(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits.grad, (softmax(z) - onehot) / len(z), atol=1e-6)


# --- alpha ---------------------------------------------------------------------------------


@untimed
@given(epochs=st.integers(1, 1000), alpha_T=st.floats(0, 1))
def test_alpha_of_the_last_epoch_is_exactly_alpha_T(epochs, alpha_T):
    assert alpha_at(epochs - 1, epochs, alpha_T) == alpha_T


@untimed
@given(epochs=st.integers(1, 1000), alpha_T=st.floats(0.01, 1), data=st.data())
def test_alpha_rises_linearly_by_epoch(epochs, alpha_T, data):
    epoch = data.draw(st.integers(0, epochs - 1))
    exact = float(Fraction(alpha_T) * (epoch + 1) / epochs)
    assert alpha_at(epoch, epochs, alpha_T) == pytest.approx(exact, rel=1e-15)


def test_alpha_of_the_published_schedule():
    assert alpha_at(0, 300, 0.8) == pytest.approx(0.8 / 300)
    assert alpha_at(149, 300, 0.8) == pytest.approx(0.4)


# --- targets and loss ----------------------------------------------------------------------


@untimed
@given(**sizes, alpha=st.floats(0, 1))
def test_soft_targets_mix_label_and_past_into_a_distribution(seed, b, c, alpha):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, b)
    past_BC = torch.tensor(rng.dirichlet(np.ones(c), b), dtype=torch.float32)
    before = past_BC.clone()
    targets = soft_targets(torch.tensor(labels), past_BC, alpha)
    expected = (1 - alpha) * np.eye(c)[labels] + alpha * before.double().numpy()
    np.testing.assert_allclose(targets.numpy(), expected, atol=3e-7)
    np.testing.assert_allclose(targets.double().sum(dim=1).numpy(), 1, atol=1e-6)
    assert (targets.shape, targets.dtype) == (past_BC.shape, torch.float32)
    assert torch.equal(past_BC, before)  # the rows may be the store's


def test_soft_targets_at_both_ends_are_the_label_and_the_past():
    labels, past = torch.tensor([2, 0]), torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert torch.equal(soft_targets(labels, past, 0.0), torch.eye(3)[labels])
    assert torch.equal(soft_targets(labels, past, 1.0), past)
    assert soft_targets(labels, past.double(), 0.5).dtype == torch.float64


@untimed
@given(**sizes)
def test_soft_cross_entropy_is_the_batch_mean_and_its_gradient_softmax_minus_target(seed, b, c):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, b, c)
    targets = torch.tensor(rng.dirichlet(np.ones(c), b), dtype=torch.float32)
    loss = soft_cross_entropy(logits, targets)
    z, t = logits.detach().numpy(), targets.double().numpy()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(cross_entropy(z, t).mean(), rel=1e-5, abs=1e-6)
    per_sample = soft_cross_entropy_per_sample(logits, targets).detach().numpy()
    np.testing.assert_allclose(per_sample, cross_entropy(z, t), rtol=1e-5, atol=1e-5)
    loss.backward()
    np.testing.assert_allclose(logits.grad.numpy(), (softmax(z) - t) / b, atol=1e-6)


def test_soft_cross_entropy_of_extreme_logits_is_finite():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert soft_cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.5, 0.5]])).item() == 5e3


# --- the PS-KD method ----------------------------------------------------------------------


@untimed
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 10),
    c=st.integers(2, 8),
    epochs=st.integers(1, 5),
    alpha_T=st.floats(0, 1),
)
def test_pskd_over_epochs_equals_the_model(seed, n, c, epochs, alpha_T):
    """Samples are left out at random: they keep the older row, or are new in a later epoch."""
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, c, n)
    method, model, table = PSKD(PSKDSection(alpha_T=alpha_T)), Model(epochs, alpha_T), Table(n, c)
    for epoch in range(epochs):
        constants = method.begin_epoch(epoch, epochs)
        assert constants == {"alpha": alpha_at(epoch, epochs, alpha_T)}
        trained = rng.permutation(n)[: rng.integers(1, n + 1)]
        for ids in np.array_split(trained, min(2, len(trained))):
            logits, calls = random_logits(rng, len(ids), c), []
            batch = batch_of(ids, labels_N[ids])
            output = method(forward_to(logits, calls), batch, table.past(ids))
            assert [call is batch.images_BCHW for call in calls] == [True]  # one forward pass
            output.loss_B.sum().backward()

            z = logits.detach().numpy()
            targets, losses = model.step(epoch, ids.tolist(), labels_N[ids], z)
            np.testing.assert_allclose(output.loss_B.detach(), losses, rtol=1e-5, atol=1e-5)
            # The gradient shows the target: d loss / d z = softmax(z) - t.
            np.testing.assert_allclose(softmax(z) - logits.grad.numpy(), targets, atol=2e-6)
            assert output.remember_BC.dtype == torch.float32
            assert not output.remember_BC.requires_grad
            np.testing.assert_allclose(output.remember_BC, softmax(z), rtol=1e-5, atol=1e-7)
            table.remember(ids, output.remember_BC)


@untimed
@given(**sizes, alpha_T=st.floats(0, 1), epoch=st.integers(0, 4))
def test_a_sample_without_a_past_is_trained_on_its_label(seed, b, c, alpha_T, epoch):
    rng = np.random.default_rng(seed)
    labels, logits = rng.integers(0, c, b), random_logits(rng, b, c)
    method = PSKD(PSKDSection(alpha_T=alpha_T))
    method.begin_epoch(epoch, 5)
    output = method(forward_to(logits, []), batch_of(range(b), labels), Table(b, c).past(range(b)))
    assert_cross_entropy(output, logits, labels)


def test_what_is_remembered_is_the_float32_softmax_also_of_half_precision_logits():
    rng = np.random.default_rng(0)
    method = PSKD(PSKDSection())
    method.begin_epoch(0, 2)
    logits = random_logits(rng, 4, 5).detach().bfloat16().requires_grad_()
    past = Past(torch.zeros(4, 5), torch.zeros(4, dtype=torch.bool))
    output = method(forward_to(logits, []), batch_of(range(4), [0, 1, 2, 3]), past)
    assert output.remember_BC.dtype == torch.float32
    assert output.loss_B.dtype == torch.float32
    expected = softmax(logits.detach().float().numpy())
    np.testing.assert_allclose(output.remember_BC, expected, rtol=1e-5, atol=1e-7)


def test_what_is_remembered_depends_on_neither_alpha_nor_the_past():
    logits = random_logits(np.random.default_rng(1), 3, 4)
    remembered = []
    for epoch, fill in [(0, 0.25), (9, 0.25), (9, 0.0)]:
        method = PSKD(PSKDSection())
        method.begin_epoch(epoch, 10)
        past = Past(torch.full((3, 4), fill), torch.ones(3, dtype=torch.bool))
        remembered.append(method(forward_to(logits, []), batch_of(range(3), [0, 1, 2]), past))
    first, *others = (output.remember_BC for output in remembered)
    assert all(torch.equal(first, other) for other in others)


def test_a_part_of_the_past_is_the_same_samples_of_both():
    past = Past(torch.arange(12.0).reshape(4, 3), torch.tensor([True, False, True, False]))
    part = past.part(slice(1, 3))
    assert part.rows_BC.tolist() == [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
    assert part.present_B.tolist() == [False, True]


# --- the baseline, and the registry --------------------------------------------------------


@untimed
@given(**sizes, epoch=st.integers(0, 3))
def test_baseline_is_the_cross_entropy_of_each_sample_in_every_epoch(seed, b, c, epoch):
    rng = np.random.default_rng(seed)
    labels, logits, calls = rng.integers(0, c, b), random_logits(rng, b, c), []
    method = Baseline(BaselineSection())
    assert method.begin_epoch(epoch, 4) == {}
    output = method(forward_to(logits, calls), batch_of(range(b), labels), None)
    assert_cross_entropy(output, logits, labels)
    assert output.remember_BC is None
    assert len(calls) == 1


class NoTeacher:
    """A network of which nobody wants to know more."""

    def trained(self, path):
        assert path == "somewhere"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_section_has_its_method(name):
    arguments = {"teacher": "somewhere"} if name == "tfkd_self" else {}
    section = METHODS[name](**arguments)
    method = registry.create(section, NoTeacher())
    assert section.keeps_predictions == (name == "pskd")
    assert method.needs_peers == (name == "cskd")


def test_the_method_takes_its_section():
    pskd = registry.create(PSKDSection(alpha_T=0.3), None)
    assert isinstance(pskd, PSKD)
    assert pskd.begin_epoch(1, 2) == {"alpha": 0.3}
    baseline = registry.create(BaselineSection(), None)
    assert isinstance(baseline, Baseline)
