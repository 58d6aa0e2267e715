"""Networks by name: shapes, sizes counted by hand, and the public code's PreAct block."""

import pytest
import torch
from torch.nn import functional as F

from pskd.models import MODELS, build


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2


def expected_parameters(widths: tuple[int, ...], blocks: tuple[int, ...], classes: int) -> int:
    """Stem conv + BN; per block BN, conv, BN, conv and a 1x1 shortcut where the width grows."""
    total, inputs = conv(3, widths[0], 3) + 2 * widths[0], widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for index in range(count):
            total += 2 * inputs + conv(inputs, width, 3) + 2 * width + conv(width, width, 3)
            total += conv(inputs, width, 1) if stage and not index else 0
            inputs = width
    return total + inputs * classes + classes


@pytest.mark.parametrize("name", MODELS)
def test_shape_and_number_of_parameters(name):
    model = build(name, 7)
    arguments = MODELS[name][1]
    count = sum(p.numel() for p in model.parameters())
    assert count == expected_parameters(arguments["widths"], arguments["blocks"], 7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_preact_resnet18_is_of_the_size_of_the_public_one():
    assert sum(p.numel() for p in build("preact_resnet18", 100).parameters()) == 11_217_444


@pytest.mark.parametrize("name", MODELS)
def test_the_final_feature_map_is_as_small_as_the_stages_say(name):
    model = build(name, 7).eval()
    seen = []
    model.blocks.register_forward_hook(lambda _, __, out: seen.append(out.shape[-1]))
    model(torch.randn(1, 3, 32, 32))
    stem = MODELS[name][1].get("stem_stride", 1)
    assert seen == [32 // stem // 2 ** (len(MODELS[name][1]["widths"]) - 1)]


def by_hand(model, x):
    """The forward pass of the public code, from its facts: see the module's docstring."""

    def bn(x, layer):
        return F.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=1e-5
        )

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
    x = F.avg_pool2d(x, x.shape[-1]).flatten(1)  # no BN-ReLU before it
    return F.linear(x, model.linear.weight, model.linear.bias)


def test_blocks_compute_what_the_public_code_computes():
    torch.manual_seed(0)
    model = build("preact_resnet8_w16", 5).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model.train()
    model(images)  # running statistics that are not those of the start
    model.eval()
    torch.testing.assert_close(model(images), by_hand(model, images))


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


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        build("resnet19", 10)
