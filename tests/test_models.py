"""Networks by name: sizes counted by hand, blocks computed by hand, initial values, ShakeDrop."""

import math
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.regnet import BlockParams

from pskd.models import (
    MODELS,
    build,
    densenet_cifar,
    pyramidnet,
    resnet_cifar,
    resnext_cifar,
    shakedrop,
    torchvision_names,
)
from pskd.models.shakedrop import ShakeDrop

TORCHVISION = set(torchvision_names.NAMES)
# resnet152 is in a table of the document, too.
OURS = [name for name in MODELS if name not in TORCHVISION] + ["resnet152"]
IMAGENET = {"densenet264", "resnet152"}

# The same families with little to compute.
SMALL = {
    "preact": lambda: build("preact_resnet8_w16", 5),
    "resnet": lambda: resnet_cifar.build(5, blocks=(2, 1)),
    "resnext": lambda: resnext_cifar.build(5, depth=20, cardinality=4, group_width=4),
    "densenet": lambda: densenet_cifar.build(5, growth=4, blocks=(2, 3)),
    "pyramidnet": lambda: pyramidnet.build(5, depth=29, alpha=20),
    "shakedrop": lambda: pyramidnet.build(5, depth=29, alpha=20, last_survival=0.5),
}


@pytest.fixture(scope="module", params=OURS)
def network(request):
    """Every network of ours once, as it starts; the tests below leave its weights alone."""
    torch.manual_seed(0)
    model = build(request.param, 7)
    model.name = request.param
    return model


@pytest.fixture
def on_meta(monkeypatch):
    """Networks without values, which cost no time. One whose control flow reads a value raises."""
    widths = BlockParams.from_init_params.__func__  # regnet computes its widths with tensors

    def from_init_params(cls, **arguments):
        with torch.device("cpu"):
            return widths(cls, **arguments)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(from_init_params))
    with torch.device("meta"):
        yield


def images_for(name, batch=2):
    if name in IMAGENET:
        return torch.randn(batch, 3, 64, 64)
    if name in TORCHVISION:
        return torch.randn(batch, 3, *(299, 299) if name == "inception_v3" else (224, 224))
    return torch.randn(batch, 3, 32, 32)


# Sizes, from the structure of each family.


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2


def preact_parameters(classes: int, widths: tuple[int, ...], blocks: tuple[int, ...]) -> int:
    """Stem conv + BN; per block BN, conv, BN, conv and a 1x1 shortcut where the width grows."""
    total, inputs = conv(3, widths[0], 3) + 2 * widths[0], widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for index in range(count):
            total += 2 * inputs + conv(inputs, width, 3) + 2 * width + conv(width, width, 3)
            total += conv(inputs, width, 1) if stage and not index else 0
            inputs = width
    return total + inputs * classes + classes


def bottleneck_parameters(
    classes: int, stages: list[tuple[int, int, int]], stem_kernel: int, groups: int = 1
) -> int:
    """Stages of (width, outputs, blocks); the first shortcut of each is a 1x1 conv + BN."""
    total, inputs = conv(3, 64, stem_kernel) + 2 * 64, 64
    for width, outputs, count in stages:
        total += conv(inputs, outputs, 1) + 2 * outputs
        for _ in range(count):
            total += conv(inputs, width, 1) + conv(width, width, 3) // groups
            total += conv(width, outputs, 1) + 2 * width + 2 * width + 2 * outputs
            inputs = outputs
    return total + inputs * classes + classes


def densenet_parameters(classes: int, blocks: tuple[int, ...], stem: int) -> int:
    """Growth 32 by BN, 1x1 to 128, BN, 3x3; between blocks BN and 1x1 to half the channels."""
    total, channels = stem, 64
    for block, count in enumerate(blocks):
        if block:
            total += 2 * channels + conv(channels, channels // 2, 1)
            channels //= 2
        for _ in range(count):
            total += 2 * channels + conv(channels, 128, 1) + 2 * 128 + conv(128, 32, 3)
            channels += 32
    return total + 2 * channels + channels * classes + classes


def pyramidnet_parameters(classes: int) -> int:
    """66 bottlenecks, 240 / 66 wider each; a BN before every conv and one after the last."""
    total, inputs = conv(3, 16, 3) + 2 * 16, 16
    for index in range(1, 67):
        width = round(16 + 240 * index / 66)
        total += 2 * inputs + conv(inputs, width, 1) + 2 * width + conv(width, width, 3)
        total += 2 * width + conv(width, 4 * width, 1) + 2 * 4 * width
        inputs = 4 * width
    return total + 2 * inputs + inputs * classes + classes


RESNET101 = [(64, 256, 3), (128, 512, 4), (256, 1024, 23), (512, 2048, 3)]
RESNET152 = [(64, 256, 3), (128, 512, 8), (256, 1024, 36), (512, 2048, 3)]
RESNEXT29 = [(512, 256, 3), (1024, 512, 3), (2048, 1024, 3)]
COUNTS = {
    "preact_resnet18": lambda n: preact_parameters(n, (64, 128, 256, 512), (2, 2, 2, 2)),
    "preact_resnet14_w24": lambda n: preact_parameters(n, (24, 48, 96), (2, 2, 2)),
    "preact_resnet8_w16": lambda n: preact_parameters(n, (16, 32, 64), (1, 1, 1)),
    "resnet101_cifar": lambda n: bottleneck_parameters(n, RESNET101, 3),
    "densenet121_cifar": lambda n: densenet_parameters(n, (6, 12, 24, 16), conv(3, 64, 3)),
    "resnext29_8x64d": lambda n: bottleneck_parameters(n, RESNEXT29, 3, groups=8),
    "pyramidnet200_a240": pyramidnet_parameters,
    "pyramidnet200_a240_shakedrop": pyramidnet_parameters,
    "densenet264": lambda n: densenet_parameters(n, (6, 12, 64, 48), conv(3, 64, 7) + 2 * 64),
    "resnet152": lambda n: bottleneck_parameters(n, RESNET152, 7),
}
# With 100 and 1000 classes. From the public code, where it has the network: all but densenet264,
# which is torchvision's class.
PUBLISHED = {
    "preact_resnet18": (11_217_444, 11_679_144),
    "resnet101_cifar": (42_697_380, 44_541_480),
    "densenet121_cifar": (7_048_548, 7_971_048),
    "resnext29_8x64d": (34_518_948, 35_441_448),
    "pyramidnet200_a240": (26_844_952, 27_767_452),
    "pyramidnet200_a240_shakedrop": (26_844_952, 27_767_452),
    "densenet264": (30_917_604, 33_337_704),
    "resnet152": (58_348_708, 60_192_808),
}


def test_number_of_parameters(network):
    assert sum(p.numel() for p in network.parameters()) == COUNTS[network.name](7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_counts_by_hand_are_those_of_the_public_code(name):
    assert (COUNTS[name](100), COUNTS[name](1000)) == PUBLISHED[name]


FINAL_SIZES = {
    "preact_resnet18": 4,
    "preact_resnet14_w24": 4,
    "preact_resnet8_w16": 8,
    "resnet101_cifar": 4,
    "densenet121_cifar": 4,
    "resnext29_8x64d": 8,
    "pyramidnet200_a240": 8,
    "pyramidnet200_a240_shakedrop": 8,
}


@pytest.mark.parametrize("name", FINAL_SIZES)
def test_the_final_feature_map_is_as_small_as_the_stages_say(on_meta, name):
    model = build(name, 7)
    seen = []
    body = model.layers if name.startswith("densenet") else model.blocks
    body.register_forward_hook(lambda _, __, out: seen.append(out.shape[2:]))
    assert model(images_for(name)).shape == (2, 7)  # in training, where no value may be read
    assert seen == [(FINAL_SIZES[name],) * 2]


def test_logits_and_gradients(network):
    """Of every parameter, finite and not all zero."""
    logits = network.train()(images_for(network.name))
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([1, 5])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    network.zero_grad(set_to_none=True)


@torch.no_grad()
def test_channels_last_gives_the_same_logits(network):
    """In float64: a BatchNorm over few values magnifies the last bits of float32."""
    network.double().train()
    images = images_for(network.name).double()
    torch.manual_seed(2)
    logits = network(images)
    network.to(memory_format=torch.channels_last)
    torch.manual_seed(2)
    again = network(images.contiguous(memory_format=torch.channels_last))
    network.float().to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(logits, again, rtol=0, atol=1e-10)


# Initial values.

NORMAL = {  # normal with variance 2 / fan; the others start as torch's layers do
    "resnext29_8x64d": "outputs",
    "pyramidnet200_a240": "outputs",
    "pyramidnet200_a240_shakedrop": "outputs",
    "resnet152": "outputs",
    "densenet264": "inputs",
}


def assert_spread(weight, std, peak):
    """Standard deviation and largest value, five standard errors around `std` at most."""
    count = weight.numel()
    assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * count)
    assert abs(weight.mean().item()) < 5 * std / math.sqrt(count)
    assert (weight.abs().max().item() > 2 * std) == (peak == "normal")  # uniform: sqrt(3) std


def test_initial_values_are_those_of_the_public_code(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert (module.eps, module.momentum) == (1e-5, 0.1)
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            kernel = module.kernel_size[0] ** 2
            fan = {
                "inputs": module.weight.shape[1] * kernel,
                "outputs": module.out_channels * kernel,  # of all groups, as published
            }
            if network.name in NORMAL:
                std = math.sqrt(2 / fan[NORMAL[network.name]])
                assert_spread(module.weight, std, "normal")
            else:
                assert_spread(module.weight, 1 / math.sqrt(3 * fan["inputs"]), "uniform")
        if isinstance(module, nn.Linear):
            if network.name == "resnext29_8x64d":
                assert_spread(module.weight, math.sqrt(2 / module.in_features), "normal")
                assert (module.bias == 0).all()
            else:
                assert_spread(module.weight, 1 / math.sqrt(3 * module.in_features), "uniform")
                # torchvision's DenseNet sets the bias to zero
                assert module.bias.any() == (network.name != "densenet264")


def test_initialisation_is_torchs_default_and_follows_the_seed():
    torch.manual_seed(1)
    first = build("preact_resnet8_w16", 5)
    torch.manual_seed(1)
    again = build("preact_resnet8_w16", 5)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    bound = (16 * 9) ** -0.5  # kaiming_uniform with a = sqrt(5)
    weights = first.blocks[0].conv1.weight
    assert weights.abs().max() <= bound
    assert weights.abs().max() > 0.95 * bound


def test_the_keys_of_preact_resnets_stay():
    """Weights of finished runs are read by them."""
    keys = {"conv1.weight", "linear.weight", "linear.bias"}
    norms = ["bn1", *(f"blocks.{block}.bn{i}" for block in range(3) for i in (1, 2))]
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys |= {f"{norm}.{tensor}" for norm in norms for tensor in tensors}
    keys |= {f"blocks.{block}.conv{i}.weight" for block in range(3) for i in (1, 2)}
    keys |= {f"blocks.{block}.shortcut.weight" for block in (1, 2)}
    assert build("preact_resnet8_w16", 5).state_dict().keys() == keys


def test_shakedrop_changes_neither_keys_nor_initial_weights():
    torch.manual_seed(3)
    plain = SMALL["pyramidnet"]().state_dict()
    torch.manual_seed(3)
    shaken = SMALL["shakedrop"]().state_dict()
    assert plain.keys() == shaken.keys()
    assert all(torch.equal(plain[key], shaken[key]) for key in plain)


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


# Precision, layout, compilation.


@pytest.mark.parametrize("family", SMALL)
def test_bf16_autocast_in_training(family):
    torch.manual_seed(0)
    model = SMALL[family]().to(memory_format=torch.channels_last)
    seen = []
    blocks = model.layers if family == "densenet" else model.blocks
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out))
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)
    exact = model(images)
    seen.clear()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()
    for out in seen:
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous(memory_format=torch.channels_last)
    F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 3])).backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.slow
def test_each_whole_network_trains_under_bf16_autocast(network):
    """Logits near those of float32, finite gradients: as deep and wide as it is published."""
    images = images_for(network.name)
    torch.manual_seed(1)
    exact = network(images).detach()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    assert logits.dtype == torch.bfloat16
    near = F.cosine_similarity(logits.float().flatten(), exact.flatten(), dim=0)
    assert near > 0.9, near  # 0.93 to 1: the deeper, the further
    loss = F.cross_entropy(logits.float(), torch.arange(len(images)))
    for gradient in torch.autograd.grad(loss, list(network.parameters())):
        assert gradient.isfinite().all()


@pytest.mark.slow
def test_each_whole_network_is_one_graph(network):
    """torch.compile captures it without a break; what the backend makes of it, toy nets show."""
    images = images_for(network.name)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    exact = network(images)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(images), exact, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("shaken", [False, True])
def test_compiled_networks_train_and_evaluate(shaken):
    torch.manual_seed(0)
    model = build("preact_resnet8_w16", 5)
    if shaken:
        model = pyramidnet.build(5, depth=11, alpha=20, last_survival=0.5)
    images = torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True)

    def gradients():
        torch.manual_seed(1)
        return torch.autograd.grad(compiled(images).square().sum(), list(model.parameters()))

    for first, again in zip(gradients(), gradients(), strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, again)  # the draws follow the seed here, too
    model.eval()
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


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


# torchvision.


def test_torchvisions_names_are_all_of_its_classifiers():
    listed = torchvision.models.list_models(module=torchvision.models)
    assert sorted(torchvision_names.NAMES) == sorted(listed)


def forward_and_backward(name):
    model = build(name, 7)
    logits = model(images_for(name))
    assert type(logits) is torch.Tensor  # no auxiliary heads
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s"),
        *("googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2"),
        *("mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d"),
        *("shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32"),
        "wide_resnet50_2",
    ],
)
def test_one_of_each_family_of_torchvision(on_meta, monkeypatch, name):
    def download(*_, **__):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    forward_and_backward(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision_names.NAMES)
def test_every_network_of_torchvision(on_meta, name):
    forward_and_backward(name)


def test_resnet152_has_its_stride_on_the_3x3_convolution(on_meta):
    model = build("resnet152", 7)
    firsts = [model.layer2[0], model.layer3[0], model.layer4[0]]
    assert [(b.conv1.stride, b.conv2.stride) for b in firsts] == [((1, 1), (2, 2))] * 3
    assert [len(layer) for layer in (model.layer1, model.layer2)] == [3, 8]


# The registry.


def test_names_are_known_without_importing_torch():
    code = "import sys, pskd.models; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        build("resnet19", 10)
