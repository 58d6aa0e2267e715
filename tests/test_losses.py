"""Every loss and every target against formulas written out in float64 numpy, values and gradients.

Logits range from ordinary to extreme: +-1e4, all equal, two classes, one sample. `test_methods.py`
has the published PS-KD over epochs; here are the other methods, the variants, and mixed samples.
"""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pskd.data.batch import Batch, Mix
from pskd.methods import cskd, label_smoothing, registry, tfkd
from pskd.methods.interface import Past
from pskd.methods.labels import add_at_labels
from pskd.methods.pskd import (
    PSKD,
    PSKDByModel,
    RefinedCrossEntropy,
    alpha_at,
    soft_cross_entropy_per_sample,
    soft_targets,
)
from pskd.methods.sections import (
    BaselineSection,
    CSKDSection,
    LabelSmoothingSection,
    PSKDSection,
    TFKDRegSection,
    TFKDSelfSection,
)
from pskd.store.registry import create_encoding

untimed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
few = settings(untimed, max_examples=20)
KINDS = ("ordinary", "large", "equal", "one far above", "far from 0", "tiny")


@st.composite
def problems(draw, kinds=KINDS):
    """(rng, logits float64 (B, C), labels int64 (B,))."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, c = draw(st.integers(1, 6)), draw(st.sampled_from([2, 3, 5, 12]))
    return rng, logits_of(rng, draw(st.sampled_from(kinds)), b, c), rng.integers(0, c, b)


def logits_of(rng, kind, b, c):
    z_BC = rng.normal(0, 3, (b, c))
    match kind:
        case "large":
            return 1e4 * rng.choice([-1.0, 1.0], (b, c))
        case "equal":
            return np.full((b, c), rng.normal())
        case "one far above":
            return z_BC + 1e4 * np.eye(c)[rng.integers(0, c, b)]
        case "far from 0":
            return z_BC - 1e4
        case "tiny":
            return z_BC * 1e-6
    return z_BC


# --- the independent formulas, numpy float64 ------------------------------------------------


def log_softmax(z_BC):
    z_BC = np.asarray(z_BC, np.float64)
    z_BC = z_BC - z_BC.max(axis=1, keepdims=True)
    return z_BC - np.log(np.exp(z_BC).sum(axis=1, keepdims=True))


def softmax(z_BC):
    return np.exp(log_softmax(z_BC))


def onehot(labels, c):
    return np.eye(c)[np.asarray(labels)]


def cross_entropy(z_BC, t_BC):
    """Of each sample."""
    return -(t_BC * log_softmax(z_BC)).sum(axis=1)


def smoothed(hard_BC, eps, convention):
    c = hard_BC.shape[1]
    if convention == "k":
        return (1 - eps) * hard_BC + eps / c
    return (1 - eps) * hard_BC + eps * (1 - hard_BC) / (c - 1)


def kl(q_BC, z_BC, temperature=1.0):
    """KL(q || softmax(z / T)) of each sample; 0 log 0 is 0."""
    log_q_BC = np.log(q_BC, where=q_BC > 0, out=np.zeros_like(q_BC))
    return (q_BC * (log_q_BC - log_softmax(np.asarray(z_BC) / temperature))).sum(axis=1)


def made_by_hand(hard_BC, temperature):
    """TF-KD reg: softmax of 0.99 on the label, the rest shared, over T."""
    c = hard_BC.shape[1]
    return softmax((0.99 * hard_BC + 0.01 / (c - 1) * (1 - hard_BC)) / temperature)


def tensor(values, requires_grad=False):
    return torch.tensor(np.asarray(values), dtype=torch.float64, requires_grad=requires_grad)


def assert_loss(loss, logits, value, gradient_BC):
    """A scalar, its value and its gradient; tolerances follow the size of the logits."""
    size = float(np.abs(logits.detach().numpy()).max())
    assert loss.shape == () and loss.dtype == torch.float64
    scale = 1 + size + abs(value)
    assert loss.item() == pytest.approx(value, rel=1e-11, abs=1e-12 * scale)
    (found_BC,) = torch.autograd.grad(loss, logits)
    # Probabilities at 1e4 carry the rounding of their logits, 1e-12, into the exponent.
    atol = 1e-13 * scale * (1 + np.abs(gradient_BC).max())
    np.testing.assert_allclose(found_BC.numpy(), gradient_BC, rtol=1e-9, atol=atol)


def by_differences(f, z_BC, h=1e-5):
    """Central differences of a scalar function of (B, C)."""
    gradient_BC = np.zeros_like(z_BC)
    for place in np.ndindex(z_BC.shape):
        step_BC = np.zeros_like(z_BC)
        step_BC[place] = h
        gradient_BC[place] = (f(z_BC + step_BC) - f(z_BC - step_BC)) / (2 * h)
    return gradient_BC


# --- label smoothing ------------------------------------------------------------------------


@untimed
@given(problem=problems(), eps=st.floats(0, 0.99), convention=st.sampled_from(["k", "k-1"]))
def test_label_smoothing_is_the_cross_entropy_with_the_smoothed_label(problem, eps, convention):
    _, z, labels = problem
    t_BC = smoothed(onehot(labels, z.shape[1]), eps, convention)
    logits = tensor(z, True)
    loss = label_smoothing.loss(logits, torch.tensor(labels), eps, convention)
    assert_loss(loss, logits, cross_entropy(z, t_BC).mean(), (softmax(z) - t_BC) / len(z))


@untimed
@given(problem=problems(), eps=st.floats(0, 0.99))
def test_label_smoothing_k_is_torchs(problem, eps):
    _, z, labels = problem
    logits, labels = tensor(z, True), torch.tensor(labels)
    ours = label_smoothing.loss(logits, labels, eps)  # "k" is the default
    theirs = nn.CrossEntropyLoss(label_smoothing=eps)(logits, labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-11, abs=1e-11)
    (mine,), (other,) = torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_the_two_conventions_of_label_smoothing_differ_in_the_labels_own_mass():
    z, label = tensor([[1.0, 2.0, 4.0]], True), torch.tensor([2])
    mass = {}
    for convention in ("k", "k-1"):
        loss = label_smoothing.loss(z, label, 0.1, convention)
        (gradient,) = torch.autograd.grad(loss, z)
        mass[convention] = (torch.softmax(z, 1) - gradient).detach()[0].tolist()
    assert mass["k"] == pytest.approx([0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3])
    assert mass["k-1"] == pytest.approx([0.05, 0.05, 0.9])


# --- CS-KD ----------------------------------------------------------------------------------


@untimed
@given(problem=problems(), temperature=st.floats(0.5, 20), kind=st.sampled_from(KINDS))
def test_kd_loss_is_the_scaled_kl_and_only_the_student_learns(problem, temperature, kind):
    rng, z, _ = problem
    y = logits_of(rng, kind, *z.shape)
    q_BC, p_BC = softmax(y / temperature), softmax(z / temperature)
    logits, peer = tensor(z, True), tensor(y, True)
    loss = cskd.kd_loss(logits, peer, temperature)
    gradient_BC = temperature * (p_BC - q_BC) / len(z)
    assert torch.autograd.grad(loss, peer, retain_graph=True, allow_unused=True) == (None,)
    assert_loss(loss, logits, temperature**2 * kl(q_BC, z, temperature).mean(), gradient_BC)


def test_kd_loss_of_equal_outputs_is_zero_and_never_negative():
    z = tensor([[3.0, -1.0, 0.5], [1e4, -1e4, 0.0]])
    assert cskd.kd_loss(z, z, 4.0).item() == 0.0
    assert cskd.kd_loss(z, z.flip(1), 4.0).item() > 0


# --- TF-KD ----------------------------------------------------------------------------------

reductions = st.sampled_from(["mean", "batchmean"])


@untimed
@given(
    problem=problems(),
    alpha=st.floats(0, 1),
    temperature=st.floats(0.5, 40),
    multiplier=st.floats(0, 100),
    reduction=reductions,
)
def test_reg_loss_is_the_equation(problem, alpha, temperature, multiplier, reduction):
    _, z, labels = problem
    c = z.shape[1]
    hard_BC = onehot(labels, c)
    u_BC = made_by_hand(hard_BC, temperature)
    weight = alpha * multiplier / (c if reduction == "mean" else 1)
    value = ((1 - alpha) * cross_entropy(z, hard_BC) + weight * kl(u_BC, z)).mean()
    p_BC = softmax(z)
    gradient_BC = ((1 - alpha) * (p_BC - hard_BC) + weight * (p_BC - u_BC)) / len(z)
    logits = tensor(z, True)
    loss = tfkd.reg_loss(
        logits, torch.tensor(labels), alpha, temperature, multiplier, kl_reduction=reduction
    )
    assert_loss(loss, logits, value, gradient_BC)


@untimed
@given(
    problem=problems(),
    kind=st.sampled_from(KINDS),
    alpha=st.floats(0, 1),
    temperature=st.floats(0.5, 40),
    multiplier=st.floats(0, 100),
    reduction=reductions,
)
def test_self_loss_is_the_equation(problem, kind, alpha, temperature, multiplier, reduction):
    rng, z, labels = problem
    teacher = logits_of(rng, kind, *z.shape)
    c = z.shape[1]
    hard_BC = onehot(labels, c)
    q_BC, p_BC = softmax(teacher / temperature), softmax(z / temperature)
    weight = alpha * multiplier / (c if reduction == "mean" else 1)
    kl_B = temperature**2 * kl(q_BC, z, temperature)
    value = ((1 - alpha) * cross_entropy(z, hard_BC) + weight * kl_B).mean()
    gradient_BC = (1 - alpha) * (softmax(z) - hard_BC) + weight * temperature * (p_BC - q_BC)
    logits = tensor(z, True)
    loss = tfkd.self_loss(
        logits,
        torch.tensor(labels),
        tensor(teacher),
        alpha,
        temperature,
        multiplier,
        kl_reduction=reduction,
    )
    assert_loss(loss, logits, value, gradient_BC / len(z))


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@few
@given(problem=problems(kinds=("ordinary", "equal", "tiny")), temperature=st.floats(1, 20))
def test_mean_is_what_torchs_kl_div_loss_does_by_default(problem, temperature):
    """The published code: nn.KLDivLoss() over B * K (anchors 1.4)."""
    rng, z, labels = problem
    logits, y, teacher = tensor(z), torch.tensor(labels), tensor(rng.normal(0, 3, z.shape))
    hard = nn.CrossEntropyLoss()(logits, y)
    mean = nn.KLDivLoss()
    soft = mean(F.log_softmax(logits / temperature, dim=1), F.softmax(teacher / temperature, dim=1))
    expected = (1 - 0.95) * hard + 0.95 * soft * temperature**2 * 50
    found = tfkd.self_loss(logits, y, teacher, 0.95, temperature, 50)  # "mean" is the default
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    c = z.shape[1]
    u = torch.full_like(logits, 0.01 / (c - 1))
    u[torch.arange(len(y)), y] = 0.99
    soft = mean(F.log_softmax(logits, dim=1), F.softmax(u / temperature, dim=1))
    found = tfkd.reg_loss(logits, y, 0.1, temperature, 100)
    torch.testing.assert_close(found, 0.9 * hard + 0.1 * soft * 100, rtol=1e-9, atol=1e-11)


def test_batchmean_is_as_many_times_the_kl_as_there_are_classes():
    rng = np.random.default_rng(0)
    z, t, y = tensor(rng.normal(size=(4, 7))), tensor(rng.normal(size=(4, 7))), torch.arange(4)
    for loss in (
        lambda r: tfkd.self_loss(z, y, t, 1.0, 6.0, 1.0, r),
        lambda r: tfkd.reg_loss(z, y, 1.0, 20.0, 1.0, r),
    ):
        assert loss("batchmean").item() == pytest.approx(7 * loss("mean").item(), rel=1e-12)


# --- gradients by finite differences: neither torch's autograd nor our algebra ----------------


@few
@given(problem=problems(kinds=("ordinary", "equal", "tiny")))
def test_gradients_are_those_of_finite_differences(problem):
    rng, z, labels = problem
    y, teacher = torch.tensor(labels), tensor(rng.normal(0, 2, z.shape))
    losses = {
        "label smoothing": lambda x: label_smoothing.loss(x, y, 0.2, "k-1"),
        "cs-kd": lambda x: cskd.kd_loss(x, teacher, 4.0),
        "self": lambda x: tfkd.self_loss(x, y, teacher, 0.9, 6.0, 5.0),
        "reg": lambda x: tfkd.reg_loss(x, y, 0.1, 20.0, 10.0),
    }
    for name, loss in losses.items():
        logits = tensor(z, True)
        (found,) = torch.autograd.grad(loss(logits), logits)
        expected = by_differences(lambda x, f=loss: f(tensor(x)).item(), z)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-7, err_msg=name)


# --- the refined cross-entropy ----------------------------------------------------------------


def refined_inputs(rng, z, k):
    """labels (B, K), hard (B, K), past (B, C), weight (B,), as the method might pass them."""
    b, c = z.shape
    weight_B = rng.choice([0.0, 1.0, rng.random()], b)  # absent, alpha 1, in between
    share_B = rng.random(b) if k == 2 else np.ones(b)
    shares_BK = np.stack([share_B, 1 - share_B], 1)[:, :k]
    past_BC = rng.dirichlet(np.full(c, 0.3), b)
    past_BC[weight_B == 0] = 0  # as the store gives absent rows
    return rng.integers(0, c, (b, k)), shares_BK * (1 - weight_B)[:, None], past_BC, weight_B


def targets_of(labels_BK, hard_BK, past_BC, weight_B):
    t_BC = weight_B[:, None] * past_BC
    for labels_B, hard_B in zip(labels_BK.T, hard_BK.T, strict=True):
        t_BC = t_BC + hard_B[:, None] * onehot(labels_B, past_BC.shape[1])
    return t_BC


@untimed
@given(problem=problems(), k=st.sampled_from([1, 2]))
def test_refined_cross_entropy_is_the_soft_cross_entropy(problem, k):
    """Absent rows, alpha 0 and 1, mixed labels; also the softmax."""
    rng, z, _ = problem
    labels, hard, past, weight = refined_inputs(rng, z, k)
    t_BC = targets_of(labels, hard, past, weight)
    logits = tensor(z, True)
    loss_B, probs_BC = RefinedCrossEntropy.apply(
        logits, torch.tensor(labels), tensor(hard), tensor(past), tensor(weight)
    )
    size = 1 + np.abs(z).max()
    np.testing.assert_allclose(
        loss_B.detach(), cross_entropy(z, t_BC), rtol=1e-10, atol=1e-13 * size
    )
    np.testing.assert_allclose(probs_BC, softmax(z), rtol=1e-9, atol=1e-300)
    assert not probs_BC.requires_grad
    outer_B = tensor(rng.normal(size=len(z)))  # of what follows: weights, scale
    (found,) = torch.autograd.grad(loss_B, logits, outer_B)
    expected = (softmax(z) - t_BC) * outer_B.numpy()[:, None]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * (1 + size * 1e-3))
    by_autograd = soft_cross_entropy_per_sample(logits, tensor(t_BC))
    (theirs,) = torch.autograd.grad(by_autograd, logits, outer_B)
    torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-12 * (1 + size * 1e-3))


@few
@given(problem=problems(kinds=("ordinary", "tiny", "equal")), k=st.sampled_from([1, 2]))
def test_refined_cross_entropy_passes_gradcheck(problem, k):
    rng, z, _ = problem
    labels, hard, past, weight = refined_inputs(rng, z, k)
    rest = torch.tensor(labels), tensor(hard), tensor(past), tensor(weight)
    assert torch.autograd.gradcheck(
        lambda x: RefinedCrossEntropy.apply(x, *rest)[0], tensor(z, True)
    )


@untimed
@given(problem=problems(), k=st.sampled_from([1, 2]))
def test_refined_cross_entropy_in_float32_is_off_by_roundings_of_the_logits(problem, k):
    """The sums run over logits as they are: the error is some roundings of the largest of them."""
    rng, z, _ = problem
    z = z.astype(np.float32).astype(np.float64)
    arguments = refined_inputs(rng, z, k)
    t_BC = targets_of(*arguments)
    labels, *others = (torch.tensor(a) for a in arguments)
    logits = torch.tensor(z, dtype=torch.float32, requires_grad=True)
    loss_B, probs_BC = RefinedCrossEntropy.apply(logits, labels, *(o.float() for o in others))
    assert loss_B.dtype == probs_BC.dtype == torch.float32
    eps = np.finfo(np.float32).eps
    error_B = np.abs(loss_B.detach().numpy() - cross_entropy(z, t_BC))
    assert (error_B <= 16 * eps * (1 + np.abs(z).max(axis=1))).all()
    loss_B.sum().backward()
    np.testing.assert_allclose(logits.grad, softmax(z) - t_BC, rtol=0, atol=16 * eps)
    np.testing.assert_allclose(probs_BC, softmax(z), rtol=32 * eps, atol=1e-37)


@pytest.mark.parametrize("encoding", ["float16", "float32", "uint8-log", "top3"])
@pytest.mark.parametrize("kind", ["ordinary", "far from 0", "large"])
def test_rows_as_the_store_gives_them_sum_to_1_closely_enough(encoding, kind):
    """The loss takes that for granted; what a row's sum is off by is multiplied with the logits."""
    rng, form = np.random.default_rng(8), create_encoding(encoding)
    z_BC = logits_of(rng, kind, 256, 100).astype(np.float32)
    probs_BC = torch.tensor(rng.normal(0, 4, z_BC.shape), dtype=torch.float32).softmax(dim=1)
    rows_BR = torch.empty(256, form.row_bytes(100), dtype=torch.uint8)
    form.encode(probs_BC, rows_BR)
    past_BC = form.decode(rows_BR, 100)
    labels_B = torch.tensor(rng.integers(0, 100, 256))
    loss_B, _ = RefinedCrossEntropy.apply(
        torch.tensor(z_BC),
        labels_B[:, None],
        torch.full((256, 1), 0.2),
        past_BC,
        torch.full((256,), 0.8),
    )
    rows = past_BC.double().numpy()
    t_BC = 0.2 * onehot(labels_B, 100) + 0.8 * rows / rows.sum(axis=1, keepdims=True)
    error_B = np.abs(loss_B.numpy() - cross_entropy(z_BC, t_BC))
    assert (error_B <= 16 * np.finfo(np.float32).eps * (1 + np.abs(z_BC).max(axis=1))).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_logit_that_is_not_finite_gives_a_loss_that_is_not(bad):
    """It is by the loss that the trainer notices."""
    logits = torch.tensor([[0.0, bad, 1.0]])
    labels, hard = torch.tensor([[1]]), torch.tensor([[0.5]])
    loss_B, _ = RefinedCrossEntropy.apply(
        logits, labels, hard, torch.full((1, 3), 1 / 3), torch.tensor([0.5])
    )
    assert not torch.isfinite(loss_B).any()


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


def batch_of(ids, labels, images=None, **extra):
    images = torch.zeros(len(ids), 3, 2, 2) if images is None else images
    return Batch(
        torch.as_tensor(ids), images, torch.as_tensor(labels), torch.ones(len(ids)), **extra
    )


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


class Moving:
    """A linear network in training, and what a method may ask of it; counts the snapshots."""

    def __init__(self, features, classes):
        torch.manual_seed(0)
        self.model = nn.Linear(features, classes)
        self.snapshots = 0

    def move(self):
        with torch.no_grad():
            self.model.weight += torch.randn_like(self.model.weight)

    def snapshot(self):
        self.snapshots += 1
        return self.copy()

    def copy(self):
        return copy.deepcopy(self.model).eval().requires_grad_(False)

    def trained(self, path):
        assert path == "teacher.pth"
        torch.manual_seed(9)
        return nn.Linear(*reversed(self.model.weight.shape)).eval().requires_grad_(False)

    def sha256(self, module):
        return str(module.weight.sum().item())

    def infer(self, module, images_BCHW):
        with torch.no_grad():
            return module(images_BCHW.flatten(1))

    def forward(self, images_BCHW):
        return self.model(images_BCHW.flatten(1))


def picture_batch(rng, b, c, **extra):
    images = torch.tensor(rng.normal(size=(b, 3, 2, 2)), dtype=torch.float32)
    return batch_of(range(b), rng.integers(0, c, b), images, **extra)


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
    method = PSKDByModel(PSKDSection(alpha_T=0.9, teacher="model"), network)
    assert not method.needs_store
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


# --- mixed samples --------------------------------------------------------------------------------

MIXED = {
    "baseline": BaselineSection(),
    "label smoothing k": LabelSmoothingSection(eps=0.2),
    "label smoothing k-1": LabelSmoothingSection(eps=0.2, convention="k-1"),
    "cs-kd": CSKDSection(temperature=3.0, weight=0.7),
    "tf-kd self": TFKDSelfSection(teacher="teacher.pth", multiplier=2.0),
    "tf-kd reg": TFKDRegSection(),
    "tf-kd reg batchmean": TFKDRegSection(kl_reduction="batchmean"),
    "ps-kd": PSKDSection(alpha_T=0.8),
    "ps-kd averaged": PSKDSection(alpha_T=0.8, averaging=0.5),
    "ps-kd by model": PSKDSection(alpha_T=0.8, teacher="model"),
}
C = 5


def mixed_batch(rng):
    """Five samples: two pairs that mix in both directions, and one that stays as it is."""
    partner = torch.tensor([1, 0, 3, 2, 4])
    share = torch.tensor([0.3, 0.8, 1.0, 0.5, 1.0])
    peers = torch.tensor(rng.normal(size=(5, 3, 2, 2)), dtype=torch.float32)
    mix = Mix(partner, share, (0,))
    return replace(picture_batch(rng, 5, C), peer_BCHW=peers, mix=mix)


def expected_loss(name, section, network, batch, past):
    """Of each sample, in float64, from what the methods' docstrings say of mixed images."""
    i, j = np.arange(5), batch.mix.partner_B.numpy()
    s_B1 = batch.mix.share_B.double().numpy()[:, None]

    def mixed(a_BC):
        return s_B1 * a_BC[i] + (1 - s_B1) * a_BC[j]

    def logits(images_BCHW, module=network.model):
        with torch.no_grad():
            return copy.deepcopy(module).double()(images_BCHW.double().flatten(1)).numpy()

    z, hard_BC = logits(batch.images_BCHW), onehot(batch.labels_B, C)
    hard_B = cross_entropy(z, mixed(hard_BC))
    match section:
        case BaselineSection():
            return hard_B
        case LabelSmoothingSection():
            return cross_entropy(z, mixed(smoothed(hard_BC, section.eps, section.convention)))
        case CSKDSection():
            q_BC = softmax(logits(batch.peer_BCHW) / 3.0)
            return hard_B + 0.7 * 9.0 * kl(q_BC, z, 3.0)
        case TFKDSelfSection():
            q_BC = softmax(logits(batch.images_BCHW, network.trained("teacher.pth")) / 6.0)
            return 0.05 * hard_B + 0.95 * 2 * 36 * kl(q_BC, z, 6.0) / C
        case TFKDRegSection():
            soft_B = kl(made_by_hand(mixed(hard_BC), 20.0), z)
            return 0.9 * hard_B + 0.1 * 100 * soft_B / (C if "batch" not in name else 1)
    alpha = 0.8 * 2 / 4
    if section.teacher == "model":  # which is the same model here
        return cross_entropy(z, (1 - alpha) * mixed(hard_BC) + alpha * softmax(z))
    rows_BC = past.rows_BC.double().numpy()
    own_BC = np.where(past.present_B.numpy()[:, None], rows_BC, hard_BC)
    return cross_entropy(z, mixed((1 - alpha) * hard_BC + alpha * own_BC))


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("seed", range(4))
def test_the_target_of_a_mixed_image_mixes_those_of_both_samples(name, seed):
    rng, network, section = np.random.default_rng(seed), Moving(12, C), MIXED[name]
    batch = mixed_batch(rng)
    present = torch.tensor([True, False, True, True, seed % 2 == 0])  # one partner has no past
    rows = torch.tensor(rng.dirichlet(np.ones(C), 5), dtype=torch.float32)
    past = Past(rows * present[:, None], present)
    method = registry.create(section, network)
    method.begin_epoch(1, 4)
    output = method(network.forward, batch, past if method.needs_store else None)
    expected = expected_loss(name, section, network, batch, past)
    np.testing.assert_allclose(output.loss_B.detach(), expected, rtol=2e-5, atol=2e-5)
    if method.needs_store:
        with torch.no_grad():
            probs = network.forward(batch.images_BCHW).softmax(dim=1)
        kept = section.averaging * present[:, None]
        wanted = kept * past.rows_BC + (1 - kept) * probs
        torch.testing.assert_close(output.remember_BC, wanted)


@pytest.mark.parametrize("name", MIXED)
def test_a_mix_that_mixes_nothing_changes_nothing(name):
    """Each sample its own partner with a share of 1, against the same batch without a mix."""
    rng, network, section = np.random.default_rng(1), Moving(12, C), MIXED[name]
    mixed = replace(mixed_batch(rng), mix=Mix(torch.arange(5), torch.ones(5), ()))
    past = Past(torch.full((5, C), 1 / C), torch.tensor([True, False, True, True, True]))
    found = []
    for batch in (mixed, replace(mixed, mix=None)):
        method = registry.create(section, network)
        method.begin_epoch(1, 4)
        output = method(network.forward, batch, past if method.needs_store else None)
        gradients = torch.autograd.grad(output.loss_B.sum(), list(network.model.parameters()))
        found.append((output.loss_B.detach(), *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_cskd_gives_the_peers_no_gradient_and_runs_them_through_the_same_network():
    rng = np.random.default_rng(2)
    batch, network, calls = mixed_batch(rng), Moving(12, C), []

    def forward(images_BCHW):
        calls.append((images_BCHW, torch.is_grad_enabled()))
        return network.forward(images_BCHW)

    registry.create(CSKDSection(), network)(forward, batch, None)
    assert [enabled for _, enabled in calls] == [True, False]
    assert calls[0][0] is batch.images_BCHW and calls[1][0] is batch.peer_BCHW


def test_the_teacher_made_for_another_run_is_refused_by_its_weights():
    from pskd.errors import PskdError

    section = TFKDSelfSection(teacher="teacher.pth")
    method = registry.create(section, Moving(12, C))
    method.load_state_dict(method.state_dict())
    with pytest.raises(PskdError, match=r"method\.teacher teacher\.pth holds other weights"):
        method.load_state_dict({"teacher_sha256": "another"})


def test_soft_targets_state_the_same_as_the_refined_cross_entropy():
    rng = np.random.default_rng(6)
    z, labels = tensor(rng.normal(size=(4, 3))), torch.tensor([0, 2, 1, 1])
    past = tensor(rng.dirichlet(np.ones(3), 4))
    for alpha in (0.0, 0.4, 1.0):
        weight = torch.full((4,), alpha, dtype=torch.float64)
        loss_B, _ = RefinedCrossEntropy.apply(z, labels[:, None], 1 - weight[:, None], past, weight)
        stated_B = soft_cross_entropy_per_sample(z, soft_targets(labels, past, alpha))
        torch.testing.assert_close(loss_B, stated_B)


# --- mixed labels of one class ---------------------------------------------------------------


class LabelsAtOnce(TorchDispatchMode):
    """How many labels of a sample each scatter_add_ adds at."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.scatter_add_.default:
            self.seen.append(args[2].shape[1])
        return function(*args, **(kwargs or {}))


def test_no_class_is_added_to_twice_in_one_call():
    """On a GPU the two would come in any order, and equal runs would differ in the last bit."""
    labels = torch.tensor([[3, 3], [1, 2], [0, 0]])
    shares = torch.tensor([[0.3, 0.7], [0.1, 0.9], [0.5, 0.5]])
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    past, weight = torch.full((3, 5), 0.2), torch.full((3,), 0.4)
    with LabelsAtOnce() as at_once:
        tfkd._reg_kl(logits.detach(), labels, shares, 20.0, "mean")
        RefinedCrossEntropy.apply(logits, labels, shares * 0.6, past, weight)[0].sum().backward()
    assert at_once.seen == [1] * 4


@few
@given(seed=st.integers(0, 2**32 - 1), classes=st.sampled_from([1, 2, 5, 100]))
def test_one_label_after_the_other_adds_to_the_same_bits_as_all_at_once(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    sums = torch.randn(64, classes, generator=generator)
    parts = torch.randn(64, 2, generator=generator)
    labels = torch.randint(0, classes, (64, 2), generator=generator)
    expected = sums.scatter_add(1, labels, parts)
    add_at_labels(sums, labels, parts)
    assert torch.equal(sums, expected)
