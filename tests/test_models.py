"""Networks by name: sizes counted by hand, initial values, precision, layout, torchvision's."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from pskd.models import MODELS, build, pyramidnet, torchvision_names
from pskd.models.probe import check_takes
from tests.small_networks import SMALL

TORCHVISION = set(torchvision_names.NAMES)
# resnet152 is in a table of the document, too.
OURS = [name for name in MODELS if name not in TORCHVISION] + ["resnet152"]
IMAGENET = {"densenet264", "resnet152"}


@pytest.fixture(scope="module", params=OURS)
def network(request):
    """Every network of ours once, as it starts; the tests below leave its weights alone."""
    torch.manual_seed(0)
    model = build(request.param, 7)
    model.name = request.param
    return model


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
    captured = compiled(images)
    if "shakedrop" in network.name:  # compiled code draws in another order, the same each time
        torch.manual_seed(1)
        assert torch.equal(compiled(images), captured)
        network.eval()
        exact, captured = network(images), compiled(images)
        network.train()
    torch.testing.assert_close(captured, exact, rtol=1e-4, atol=1e-4)
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


def test_a_network_is_tried_where_it_lies():
    """On a GPU, for example; here on the device that only computes shapes."""
    network = build("preact_resnet8_w16", num_classes=10).to("meta")
    check_takes(network, "preact_resnet8_w16", [(8, 8)], "--data.image_size")
