"""Blocks of the networks: computed by hand, and ShakeDrop."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pskd.models import build, shakedrop
from pskd.models.shakedrop import ShakeDrop
from tests.small_networks import SMALL

# The forward passes by hand, from the facts of the public code.


def bn(x, layer):
    statistics = (None, None) if layer.training else (layer.running_mean, layer.running_var)
    return F.batch_norm(x, *statistics, layer.weight, layer.bias, layer.training, eps=1e-5)


def pooled(x, model):
    return F.linear(x.flatten(2).mean(2), model.linear.weight, model.linear.bias)


def preact_by_hand(model, x):
    x = F.relu(bn(F.conv2d(x, model.conv1.weight, padding=1), model.bn1))
    for block in model.blocks:
        active = F.relu(bn(x, block.bn1))
        stride = block.conv1.stride
        out = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
        out = F.conv2d(F.relu(bn(out, block.bn2)), block.conv2.weight, padding=1)
        shortcut = active  # also where it is the identity: after the activation, not before
        if hasattr(block.shortcut, "weight"):
            shortcut = F.conv2d(active, block.shortcut.weight, stride=stride)
        x = out + shortcut
    return pooled(x, model)  # no BN-ReLU before it


def bottlenecks_by_hand(model, x, strides, groups):
    x = F.relu(bn(F.conv2d(x, model.conv1.weight, padding=1), model.bn1))
    for index, (block, stride) in enumerate(zip(model.blocks, strides, strict=True)):
        out = F.relu(bn(F.conv2d(x, block.conv1.weight), block.bn1))
        out = F.conv2d(out, block.conv2.weight, stride=stride, padding=1, groups=groups)
        out = bn(F.conv2d(F.relu(bn(out, block.bn2)), block.conv3.weight), block.bn3)
        shortcut = x
        if index == 0 or stride == 2:
            convolution, norm = block.shortcut
            shortcut = bn(F.conv2d(x, convolution.weight, stride=stride), norm)
        x = F.relu(out + shortcut)
    return pooled(x, model)


def densenet_by_hand(model, x):
    x = F.conv2d(x, model.conv1.weight, padding=1)  # the stem has no BN-ReLU
    for layer in model.layers:
        if hasattr(layer, "conv"):
            x = F.avg_pool2d(F.conv2d(F.relu(bn(x, layer.bn)), layer.conv.weight), 2)
        else:
            out = F.conv2d(F.relu(bn(x, layer.bn1)), layer.conv1.weight)
            out = F.conv2d(F.relu(bn(out, layer.bn2)), layer.conv2.weight, padding=1)
            x = torch.cat([out, x], 1)  # the new channels first
    return pooled(F.relu(bn(x, model.bn)), model)


def pyramidnet_by_hand(model, x, factors=None):
    """`factors`: those that ShakeDrop drew in training; evaluation multiplies by the survival."""
    x = bn(F.conv2d(x, model.conv1.weight, padding=1), model.bn1)  # no ReLU
    for index, block in enumerate(model.blocks):
        out = F.conv2d(bn(x, block.bn1), block.conv1.weight)
        stride = 2 if index in (3, 6) else 1
        out = F.conv2d(F.relu(bn(out, block.bn2)), block.conv2.weight, stride=stride, padding=1)
        out = bn(F.conv2d(F.relu(bn(out, block.bn3)), block.conv3.weight), block.bn4)
        if factors:
            forth, back = (factor.double() for factor in factors[index])
            out = out * back + (out * (forth - back)).detach()
        elif isinstance(block.shakedrop, ShakeDrop):
            out = out * (1 - 0.5 * (index + 1) / 9)
        shortcut = F.avg_pool2d(x, 2, ceil_mode=True) if stride == 2 else x
        zeros = shortcut.new_zeros(len(x), out.shape[1] - x.shape[1], *out.shape[2:])
        x = out + torch.cat([shortcut, zeros], 1)  # no ReLU
    return pooled(F.relu(bn(x, model.bn2)), model)


BY_HAND = {
    "preact": preact_by_hand,
    "resnet": partial(bottlenecks_by_hand, strides=(1, 1, 2), groups=1),
    "resnext": partial(bottlenecks_by_hand, strides=(1, 1, 2, 1, 2, 1), groups=4),
    "densenet": densenet_by_hand,
    "pyramidnet": pyramidnet_by_hand,
    "shakedrop": pyramidnet_by_hand,
}


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("size", [8, 9])  # an odd size shows how a half is rounded
def test_blocks_compute_what_the_public_code_computes(monkeypatch, family, size):
    torch.manual_seed(0)
    model = SMALL[family]().double()
    for parameter in model.parameters():  # BatchNorms that differ
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    draws, draw = [], shakedrop.draw
    monkeypatch.setattr(shakedrop, "draw", lambda *args: draws.append(draw(*args)) or draws[-1])

    logits = model(images)
    arguments = [draws] if family == "shakedrop" else []
    by_hand = BY_HAND[family](model, images, *arguments)
    torch.testing.assert_close(logits, by_hand)
    direction = torch.randn_like(logits)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(logits, parameters, direction)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(by_hand, parameters, direction), strict=True
    ):
        torch.testing.assert_close(gradient, expected)

    model.eval()  # with running statistics that are not those of the start
    torch.testing.assert_close(model(images), BY_HAND[family](model, images))


def test_the_widths_of_pyramidnet_grow_linearly(on_meta):
    blocks = build("pyramidnet200_a240", 7).blocks
    widths = [block.conv1.out_channels for block in blocks]
    assert widths == [round(16 + 240 * index / 66) for index in range(1, 67)]
    assert (widths[0], widths[-1]) == (20, 256)
    assert [i for i, block in enumerate(blocks) if block.conv2.stride == (2, 2)] == [22, 44]


# ShakeDrop.


def shaken(survival, batch=3):
    """Output and gradient of one pass, divided by input and incoming gradient: (B, 2, 4, 4)."""
    x = torch.rand(batch, 2, 4, 4, dtype=torch.float64) + 1
    x.requires_grad_()
    incoming = torch.rand(batch, 2, 4, 4, dtype=torch.float64) + 1
    out = ShakeDrop(survival).train()(x)
    out.backward(incoming)
    return out.detach() / x.detach(), x.grad / incoming


@pytest.mark.parametrize("survival", [0.5, 0.9])
def test_a_gate_opens_for_the_whole_batch_as_often_as_it_survives(survival):
    torch.manual_seed(0)
    rounds, opened = 3000, 0
    for _ in range(rounds):
        forth, back = shaken(survival)
        is_open = (forth == 1).all()
        assert is_open or (forth != 1).all()
        assert (back == 1).all() == is_open
        opened += is_open.item()
    assert abs(opened / rounds - survival) < 5 * math.sqrt(survival * (1 - survival) / rounds)


def test_a_closed_gate_scales_every_sample_and_its_gradient_on_its_own():
    torch.manual_seed(0)
    forth, back = shaken(0.0, batch=20_000)
    for factor in (forth, back):
        torch.testing.assert_close(factor, factor[:, :1, :1, :1].expand_as(factor))
    alpha, beta = forth[:, 0, 0, 0], back[:, 0, 0, 0]
    for draws, low, high in ((alpha, -1, 1), (beta, 0, 1)):
        assert low <= draws.min() < low + 0.01
        assert high - 0.01 < draws.max() <= high
        std = (high - low) / math.sqrt(12)
        assert abs(draws.mean() - (low + high) / 2) < 5 * std / math.sqrt(20_000)
        assert abs(draws.std() / std - 1) < 0.02
    for a, b in ((alpha, beta), *((d[:-1], d[1:]) for d in (alpha, beta))):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(20_000)


def test_evaluation_multiplies_by_the_mean_of_the_factor():
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    state = torch.get_rng_state()
    assert torch.equal(ShakeDrop(0.75).eval()(x), 0.75 * x)
    assert torch.equal(torch.get_rng_state(), state)
    factors = torch.stack([shakedrop.draw(0.75, 1, x.device)[0] for _ in range(5000)])
    variance = 0.75 + 0.25 / 3 - 0.75**2  # E[f^2] - E[f]^2, alpha^2 being 1/3 in the mean
    assert abs(factors.mean() - 0.75) < 5 * math.sqrt(variance / 5000)


def test_survival_falls_linearly_to_one_half(on_meta):
    blocks = build("pyramidnet200_a240_shakedrop", 7).blocks
    survivals = [block.shakedrop.survival for block in blocks]
    assert survivals == pytest.approx([1 - 0.5 * index / 66 for index in range(1, 67)])
    assert survivals[-1] == 0.5
    steps = [before - after for before, after in pairwise([1.0, *survivals])]
    assert steps == pytest.approx([0.5 / 66] * 66)


def test_blocks_draw_their_own_gates_and_a_seed_gives_them_again():
    torch.manual_seed(0)
    model = SMALL["shakedrop"]()
    images = torch.randn(4, 3, 8, 8)

    def gradients(seed):
        torch.manual_seed(seed)
        return torch.autograd.grad(model(images).square().sum(), list(model.parameters()))

    first, again, other = gradients(1), gradients(1), gradients(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    torch.manual_seed(1)
    gates = [bool((shaken(0.5)[0] == 1).all()) for _ in range(20)]
    assert len(set(gates)) == 2


class NoWaiting(TorchDispatchMode):
    """Fails where a value is read on the host, which on CUDA waits for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ), f"{function} reads a value"
        return function(*args, **kwargs or {})


def test_factors_are_drawn_on_the_device_of_the_images():
    x = torch.empty(2, 3, 4, 4, device="meta", requires_grad=True)
    out = ShakeDrop(0.5).train()(x)
    out.sum().backward()
    assert (out.device.type, x.grad.device.type) == ("meta", "meta")


def test_shakedrop_never_waits_for_the_device():
    model = SMALL["shakedrop"]()
    images = torch.randn(4, 3, 8, 8)
    with NoWaiting():
        model(images).sum().backward()
        with pytest.raises(AssertionError, match="reads a value"):
            images.sum().item()
