"""Every loss and every target against formulas written out in float64 numpy, values and gradients.

Logits range from ordinary to extreme: +-1e4, all equal, two classes, one sample. `test_methods.py`
has the published PS-KD over epochs, `test_pskd_variants.py` has its variants, and
`test_mixed_losses.py` mixed samples.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pskd.methods import cskd, label_smoothing, tfkd
from pskd.methods.pskd import RefinedCrossEntropy, soft_cross_entropy_per_sample, soft_targets
from pskd.store.registry import create_encoding
from tests.formulas import cross_entropy, kl, made_by_hand, onehot, smoothed, softmax, tensor

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


def test_soft_targets_state_the_same_as_the_refined_cross_entropy():
    rng = np.random.default_rng(6)
    z, labels = tensor(rng.normal(size=(4, 3))), torch.tensor([0, 2, 1, 1])
    past = tensor(rng.dirichlet(np.ones(3), 4))
    for alpha in (0.0, 0.4, 1.0):
        weight = torch.full((4,), alpha, dtype=torch.float64)
        loss_B, _ = RefinedCrossEntropy.apply(z, labels[:, None], 1 - weight[:, None], past, weight)
        stated_B = soft_cross_entropy_per_sample(z, soft_targets(labels, past, alpha))
        torch.testing.assert_close(loss_B, stated_B)
