"""Mixed samples: each method's loss against formulas written out in float64 numpy."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pskd.data.batch import Mix
from pskd.methods import registry, tfkd
from pskd.methods.interface import Past
from pskd.methods.labels import add_at_labels
from pskd.methods.pskd import RefinedCrossEntropy
from pskd.methods.sections import (
    BaselineSection,
    CSKDSection,
    LabelSmoothingSection,
    PSKDSection,
    TFKDRegSection,
    TFKDSelfSection,
)
from tests.formulas import cross_entropy, kl, made_by_hand, onehot, smoothed, softmax
from tests.linear_network import Moving, picture_batch

few = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])


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
    output = method(network.forward, batch, past if section.keeps_predictions else None)
    expected = expected_loss(name, section, network, batch, past)
    np.testing.assert_allclose(output.loss_B.detach(), expected, rtol=2e-5, atol=2e-5)
    if section.keeps_predictions:
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
        output = method(network.forward, batch, past if section.keeps_predictions else None)
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
