"""PS-KD's variants over epochs: alpha's schedules, averaged rows, last epoch's model as teacher."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pskd.methods import registry
from pskd.methods.interface import Past
from pskd.methods.pskd import PSKD, PSKDByModel, alpha_at
from pskd.methods.sections import PSKDSection
from tests.formulas import cross_entropy, onehot, softmax
from tests.linear_network import Moving, batch_of, picture_batch

untimed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


# --- alpha over epochs ------------------------------------------------------------------------


@untimed
@given(epochs=st.integers(1, 500), alpha_T=st.floats(0, 1))
def test_every_schedule_ends_at_exactly_alpha_T_and_never_falls(epochs, alpha_T):
    for schedule in ("linear", "constant", "cosine"):
        alphas = [alpha_at(epoch, epochs, alpha_T, schedule) for epoch in range(epochs)]
        assert alphas[-1] == alpha_T
        assert alphas == sorted(alphas)
        assert all(0 <= alpha <= alpha_T for alpha in alphas)


@untimed
@given(epochs=st.integers(1, 500), alpha_T=st.floats(0.01, 1), data=st.data())
def test_the_schedules_are_their_formulas(epochs, alpha_T, data):
    epoch = data.draw(st.integers(0, epochs - 1))
    t = (epoch + 1) / epochs
    assert alpha_at(epoch, epochs, alpha_T, "constant") == alpha_T
    half_cosine = alpha_T * math.sin(math.pi * t / 2) ** 2
    assert alpha_at(epoch, epochs, alpha_T, "cosine") == pytest.approx(half_cosine, rel=1e-9)
    assert alpha_at(epoch, epochs, alpha_T, "linear") == alpha_at(epoch, epochs, alpha_T)


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
def test_the_method_follows_the_schedule_of_its_section(schedule):
    for teacher in ("table", "model"):
        method = registry.create(
            PSKDSection(alpha_T=0.6, schedule=schedule, teacher=teacher), Moving(2, 3)
        )
        for epoch in range(4):
            constants = method.begin_epoch(epoch, 4)
            assert constants == {"alpha": alpha_at(epoch, 4, 0.6, schedule)}


# --- averaging over epochs ----------------------------------------------------------------------


def random_logits(rng, b, c, scale=3):
    return torch.tensor(rng.normal(0, scale, (b, c)), dtype=torch.float32, requires_grad=True)


@untimed
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 8),
    c=st.integers(2, 6),
    kept=st.sampled_from([0.0, 0.3, 0.5, 0.99]),
)
def test_averaging_keeps_a_share_of_the_older_row(seed, n, c, kept):
    """Over epochs, in which samples are left out at random, against a dictionary."""
    rng = np.random.default_rng(seed)
    epochs, labels_N = 5, rng.integers(0, c, n)
    method = PSKD(PSKDSection(alpha_T=0.7, averaging=kept))
    past, rows_NC, present_N = {}, torch.zeros(n, c), torch.zeros(n, dtype=torch.bool)
    for epoch in range(epochs):
        alpha = method.begin_epoch(epoch, epochs)["alpha"]
        ids = rng.permutation(n)[: rng.integers(1, n + 1)]
        logits, labels = random_logits(rng, len(ids), c), labels_N[ids]
        output = method(
            lambda _, z=logits: z, batch_of(ids, labels), Past(rows_NC[ids], present_N[ids])
        )
        z, hard_BC = logits.detach().numpy(), onehot(labels, c)
        old = [past.get(i, hard) for i, hard in zip(ids.tolist(), hard_BC, strict=True)]
        t_BC = (1 - alpha) * hard_BC + alpha * np.array(old)
        np.testing.assert_allclose(
            output.loss_B.detach(), cross_entropy(z, t_BC), rtol=1e-5, atol=1e-5
        )
        for i, p_C in zip(ids.tolist(), softmax(z), strict=True):
            past[i] = kept * past[i] + (1 - kept) * p_C if i in past else p_C
        remembered = output.remember_BC
        assert not remembered.requires_grad
        np.testing.assert_allclose(remembered, [past[i] for i in ids.tolist()], atol=2e-6)
        np.testing.assert_allclose(remembered.sum(dim=1), 1, atol=1e-5)
        rows_NC[ids], present_N[ids] = remembered, True


# --- last epoch's model as the teacher ----------------------------------------------------------


def assert_taught_by(method, network, batch, alpha, weights):
    """The target is (1 - alpha) onehot + alpha softmax of a linear teacher of these weights."""
    output = method(network.forward, batch, None)
    assert output.remember_BC is None
    x = batch.images_BCHW.flatten(1).double().numpy()
    w, bias = (t.double().numpy() for t in weights)
    hard_BC = onehot(batch.labels_B, len(w))
    t_BC = (1 - alpha) * hard_BC + alpha * softmax(x @ w.T + bias)
    z = network.forward(batch.images_BCHW).detach().double().numpy()
    np.testing.assert_allclose(output.loss_B.detach(), cross_entropy(z, t_BC), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(output.loss_B.sum(), list(network.model.parameters()))
    np.testing.assert_allclose(gradients[0], (softmax(z) - t_BC).T @ x, rtol=1e-4, atol=1e-4)


def frozen(network):
    return [p.detach().clone() for p in network.model.parameters()]


def test_the_first_epoch_has_no_teacher_and_later_ones_last_epochs_model():
    rng, network = np.random.default_rng(3), Moving(12, 5)
    section = PSKDSection(alpha_T=0.9, teacher="model")
    assert not section.keeps_predictions
    method = PSKDByModel(section, network)
    last = frozen(network)
    for epoch in range(4):
        alpha = method.begin_epoch(epoch, 4)["alpha"]
        assert network.snapshots == epoch  # none in epoch 0
        for _ in range(3):  # the student moves, the teacher does not
            batch = picture_batch(rng, 6, 5)
            assert_taught_by(method, network, batch, alpha if epoch else 0.0, last)
            network.move()
        last = frozen(network)


def test_the_teacher_is_taken_once_an_epoch_also_across_a_resume():
    rng, network = np.random.default_rng(4), Moving(12, 5)
    section = PSKDSection(alpha_T=0.9, teacher="model")
    method = PSKDByModel(section, network)
    assert method.state_dict() == {"epoch": 0, "teacher": None}
    method.begin_epoch(0, 3)
    network.move()
    method.begin_epoch(1, 3)
    teacher = frozen(network)
    method.begin_epoch(1, 3)
    assert network.snapshots == 1
    network.move()
    state = copy.deepcopy(method.state_dict())

    network.snapshots = 0
    resumed = PSKDByModel(section, network)
    resumed.load_state_dict(state)
    alpha = resumed.begin_epoch(1, 3)["alpha"]
    assert network.snapshots == 0
    assert_taught_by(resumed, network, picture_batch(rng, 4, 5), alpha, teacher)
    resumed.begin_epoch(2, 3)
    assert network.snapshots == 1


def test_resumed_within_the_first_epoch_there_is_still_no_teacher():
    rng, network = np.random.default_rng(5), Moving(12, 5)
    method = PSKDByModel(PSKDSection(teacher="model"), network)
    method.begin_epoch(0, 3)
    resumed = PSKDByModel(PSKDSection(teacher="model"), network)
    resumed.load_state_dict(method.state_dict())
    resumed.begin_epoch(0, 3)
    assert network.snapshots == 0
    assert_taught_by(resumed, network, picture_batch(rng, 4, 5), 0.0, frozen(network))
