"""Random windows and colours of encoded images: pure, in range, distributed as torchvision's."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from pskd import draws
from pskd.data import colour
from pskd.data.views import PEER

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
UNLIKELY = 1e-4  # seeds are fixed, so a pass is a pass


def windows(ids, widths, heights, *, seed=0, epoch=0, scale=SCALE, ratio=RATIO, view=""):
    """`draws.windows`; one size for all ids if a number is given."""
    ids = np.asarray(ids)
    widths, heights = (
        np.broadcast_to(side, ids.shape).astype(np.int32) for side in (widths, heights)
    )
    return draws.windows(seed, epoch, ids, widths, heights, scale=scale, ratio=ratio, view=view)


def torchvisions(width, height, count, scale=SCALE, ratio=RATIO):
    """Windows as torchvision draws them for one image."""
    blank = torch.empty(1, 1, 1).expand(3, height, width)
    torch.manual_seed(0)
    drawn = [RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(count)]
    return np.array(drawn)


ranges = st.tuples(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0)).map(lambda pair: tuple(sorted(pair)))
ratios = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(lambda pair: tuple(sorted(pair)))
sides = st.integers(1, 20_000) | st.integers(1, 20)


# --- windows ---------------------------------------------------------------------------------


@untimed
@given(
    width=sides,
    height=sides,
    scale=st.just(SCALE) | ranges,
    ratio=st.just(RATIO) | ratios,
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 300),
    view=st.sampled_from(["", PEER]),
)
def test_windows_lie_inside_and_have_an_allowed_area_and_ratio(
    width, height, scale, ratio, seed, epoch, view
):
    found = windows(
        range(20), width, height, seed=seed, epoch=epoch, scale=scale, ratio=ratio, view=view
    )
    assert found.dtype == np.int32
    y, x, h, w = found.astype(np.float64).T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (y + h <= height).all()
    assert (x + w <= width).all()
    # A side was rounded: some real window within half a pixel of it is allowed.
    area, slack = width * height, 1e-9
    allowed = (
        ((w - 0.5) * (h - 0.5) <= scale[1] * area * (1 + slack))
        & ((w + 0.5) * (h + 0.5) >= scale[0] * area * (1 - slack))
        & ((w + 0.5) >= ratio[0] * (h - 0.5) * (1 - slack))
        & ((w - 0.5) <= ratio[1] * (h + 0.5) * (1 + slack))
    )
    central = (found == central_window(width, height, ratio)).all(axis=1)
    assert (allowed | central).all()


def central_window(width, height, ratio):
    """torchvision's last resort, in Python's integers; at least one pixel."""
    w, h = width, height
    if width / height < ratio[0]:
        h = max(round(width / ratio[0]), 1)
    elif width / height > ratio[1]:
        w = max(round(height * ratio[1]), 1)
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(
    ("width", "height", "scale", "ratio"),
    [
        (1, 1000, (0.5, 1.0), RATIO),
        (1000, 1, (0.5, 1.0), RATIO),
        (6, 1000, (0.2, 1.0), RATIO),
        (999, 6, (0.2, 1.0), RATIO),  # an odd rest is rounded down
        (20_000, 7, (0.08, 1.0), RATIO),
        (5, 3, (1.0, 1.0), (1.0, 1.0)),
        (3, 6, (1.0, 1.0), (1.0, 1.0)),
        (4, 3, (1.0, 1.0), (3.0, 4.0)),  # taller than allowed
        (300, 200, (1.0, 1.0), (3.0, 4.0)),
        (300, 200, (1.0, 1.0), (0.1, 0.2)),
        (1, 1, (0.01, 0.02), RATIO),
    ],
)
def test_what_no_window_fits_gets_torchvisions_central_one(width, height, scale, ratio):
    expected = torchvisions(width, height, 20, scale, ratio)
    assert (expected == expected[0]).all()  # nothing random is left
    assert (windows(range(200), width, height, scale=scale, ratio=ratio) == expected[0]).all()


def test_a_whole_image_of_an_allowed_ratio_is_its_own_last_resort():
    # 10 x 9 at scale 1: 9 or 10 pixels wide by rounding, or, if it does not fit, all of it.
    found = windows(range(500), 10, 9, scale=(1.0, 1.0))
    assert [0, 0, 9, 10] in found.tolist()


@pytest.mark.parametrize(
    ("width", "height", "scale", "ratio"),
    [
        (500, 375, SCALE, RATIO),
        (375, 500, (0.25, 1.0), (0.5, 2.0)),
        (100, 30, SCALE, RATIO),  # many tries do not fit, some images get the central window
        (17, 23, SCALE, RATIO),
    ],
)
def test_windows_are_distributed_as_torchvisions(width, height, scale, ratio):
    count = 8000
    ours = windows(range(count), width, height, scale=scale, ratio=ratio)
    theirs = torchvisions(width, height, count, scale, ratio)
    for number, name in enumerate(["y", "x", "height", "width"]):
        test = stats.ks_2samp(ours[:, number], theirs[:, number])
        assert test.pvalue > UNLIKELY, name
    for name, value in {
        "area": lambda w: w[:, 2] * w[:, 3],
        "ratio": lambda w: w[:, 3] / w[:, 2],
        "bottom": lambda w: height - w[:, 0] - w[:, 2],
        "right": lambda w: width - w[:, 1] - w[:, 3],
    }.items():
        assert stats.ks_2samp(value(ours), value(theirs)).pvalue > UNLIKELY, name
    # Together, and not only each for itself; 5 standard errors of the difference.
    limit = 5 * np.sqrt(2 / count)
    assert np.abs(np.corrcoef(ours.T) - np.corrcoef(theirs.T)).max() < limit
    central = central_window(width, height, ratio)
    shares = [(w == central).all(axis=1).mean() for w in (ours, theirs)]
    assert abs(shares[0] - shares[1]) < 5 * np.sqrt(2 * max(*shares, 1 / count) / count)


def scalar_window(uniforms, width, height, scale, ratio):
    """The first of ten tries that fits, one number at a time; and how many it took."""
    for attempt in range(10):
        u_area, u_ratio, u_y, u_x = uniforms[4 * attempt : 4 * attempt + 4]
        area = width * height * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * u_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(u_y * (height - h + 1)), int(u_x * (width - w + 1)), h, w], attempt + 1
    return central_window(width, height, ratio), 11


@pytest.mark.parametrize(("width", "height"), [(500, 375), (100, 30), (25, 100), (7, 5)])
@pytest.mark.parametrize("view", ["", PEER])
def test_a_window_is_the_first_of_ten_tries_that_fits(width, height, view):
    ids = np.arange(3000)
    uniforms = draws.uniforms(0, 0, ids, f"{view}crop", 40).tolist()
    expected, tries = zip(
        *(scalar_window(row, width, height, SCALE, RATIO) for row in uniforms), strict=True
    )
    assert windows(ids, width, height, view=view).tolist() == list(expected)
    if max(width, height) > 3 * min(width, height):
        assert set(tries) == set(range(1, 12))


def test_windows_and_flips_are_frozen():
    ids = np.array([0, 1, 2, 77, 1_281_166])
    widths, heights = [500, 375, 20_000, 6, 33], [375, 500, 12, 1000, 33]
    assert windows(ids, widths, heights, seed=3, epoch=2).tolist() == FROZEN_WINDOWS
    assert windows(ids, widths, heights, seed=3, epoch=2, view=PEER).tolist() == FROZEN_PEER_WINDOWS
    flips = draws.flips(3, 2, np.arange(16), PEER)
    assert "".join(str(int(flip)) for flip in flips) == FROZEN_PEER_FLIPS


FROZEN_WINDOWS = [
    [114, 44, 259, 230],
    [32, 40, 396, 335],
    [0, 9992, 12, 16],
    [496, 0, 8, 6],
    [6, 4, 20, 26],
]
FROZEN_PEER_WINDOWS = [
    [0, 15, 374, 423],
    [37, 12, 223, 292],
    [0, 9992, 12, 16],
    [496, 0, 8, 6],
    [2, 8, 27, 20],
]
FROZEN_PEER_FLIPS = "0001111110100110"


@untimed
@given(
    ids=st.lists(st.integers(0, 199), min_size=1, max_size=30),
    epoch=st.integers(0, 5),
    view=st.sampled_from(["", PEER]),
)
def test_a_window_depends_on_its_id_and_size_and_not_on_the_batch(ids, epoch, view):
    ids, everyone = np.array(ids), np.arange(200)
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(1, 60, 200), rng.integers(1, 60, 200)
    whole = windows(everyone, widths, heights, epoch=epoch, view=view)
    part = windows(ids, widths[ids], heights[ids], epoch=epoch, view=view)
    assert np.array_equal(part, whole[ids])
    assert np.array_equal(
        draws.normals(0, epoch, ids, f"{view}lighting", 3),
        draws.normals(0, epoch, everyone, f"{view}lighting", 3)[ids],
    )
    assert np.array_equal(
        draws.flips(0, epoch, ids, view), draws.flips(0, epoch, everyone, view)[ids]
    )
    assert np.array_equal(
        colour.maps(0, epoch, ids, view), colour.maps(0, epoch, everyone, view)[ids]
    )


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"view": PEER}, {"view": "peer"}])
def test_windows_of_another_epoch_seed_or_view_are_others(other):
    ids = np.arange(4000)
    first, second = windows(ids, 500, 375), windows(ids, 500, 375, **other)
    assert (first == second).all(axis=1).mean() < 0.01
    for a in first.T:
        for b in second.T:
            assert stats.pearsonr(a, b).pvalue > UNLIKELY


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}, {"view": PEER}])
def test_flips_of_another_epoch_seed_or_view_are_others(other):
    key = {"seed": 0, "epoch": 0, "view": ""}
    ids = np.arange(20_000)
    first, second = (draws.flips(k["seed"], k["epoch"], ids, k["view"]) for k in (key, key | other))
    assert stats.binomtest(int((first == second).sum()), len(ids)).pvalue > UNLIKELY
    assert stats.binomtest(int(second.sum()), len(ids)).pvalue > UNLIKELY


def test_windows_and_flips_of_a_sample_are_independent():
    ids = np.arange(20_000)
    flips = draws.flips(0, 0, ids)
    for column in windows(ids, 500, 375).T:
        assert stats.pearsonr(column, flips).pvalue > UNLIKELY


# --- normal draws ----------------------------------------------------------------------------


def test_normal_draws_are_standard_normal_and_independent():
    normals = draws.normals(0, 0, np.arange(20_000), "lighting", 3)
    assert normals.dtype == np.float64
    for column in normals.T:
        assert stats.kstest(column, "norm").pvalue > UNLIKELY
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert stats.pearsonr(normals[:, a], normals[:, b]).pvalue > UNLIKELY
        assert stats.pearsonr(normals[:, a] ** 2, normals[:, b] ** 2).pvalue > UNLIKELY


def test_normal_draws_are_frozen():
    drawn = draws.normals(3, 2, np.array([0, 5]), "lighting", 3)
    np.testing.assert_allclose(drawn, FROZEN_NORMALS, rtol=1e-12)


FROZEN_NORMALS = [
    [0.854028775871366, 1.1230472007567174, 0.43357663465870977],
    [0.9448275205449935, 0.5811463629624282, -0.4678633459543067],
]


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_the_most_extreme_hashes_give_finite_normal_draws(monkeypatch, bits):
    monkeypatch.setattr(draws, "hash64", lambda *_: np.full((1, 2), bits, dtype=np.uint64))
    assert np.isfinite(draws.normals(0, 0, np.array([0]), "lighting", 1)).all()


# --- colours ---------------------------------------------------------------------------------

GREY = np.array([0.299, 0.587, 0.114])


def toned(image, operation, weight):
    """One step of the public code, in float64: a linear interpolation, nothing clipped."""
    grey = np.broadcast_to((GREY[:, None, None] * image).sum(axis=0), image.shape)
    target = {
        "brightness": np.zeros_like(image),
        "contrast": np.full_like(image, grey.mean()),
        "saturation": grey,
    }[operation]
    return (1 - weight) * image + weight * target


def drawn_colours(seed, epoch, ids, view=""):
    """Weights by operation and lighting, as they were drawn."""
    uniforms = draws.uniforms(seed, epoch, ids, f"{view}jitter", 3)
    weights = 0.4 * (2 * uniforms - 1)
    return weights, 0.1 * draws.normals(seed, epoch, ids, f"{view}lighting", 3)


OPERATIONS = ("brightness", "contrast", "saturation")


def reference(image, weights, lighting, order):
    """The public code's transform of one float64 image (3, H, W) in [0, 1], step by step."""
    for step in order:
        image = toned(image, OPERATIONS[step], weights[step])
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    light = (vectors * lighting[None, :] * values[None, :]).sum(axis=1)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return (image + light[:, None, None] - mean[:, None, None]) / std[:, None, None]


def random_images(count, height=9, width=14):
    """Tinted noise in [0, 1]: the channels have means of their own."""
    rng = np.random.default_rng(1)
    tint = rng.random((count, 3, 1, 1))
    return (0.7 * tint + 0.3 * rng.random((count, 3, height, width))).astype(np.float32)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("view", ["", PEER])
def test_colours_equal_the_public_code_in_float64_in_any_order(order, view):
    # Without clipping the three steps commute, so the order that was drawn cannot matter.
    ids, images = np.arange(40, 104), random_images(64)
    found = colour.apply(torch.from_numpy(colour.maps(5, 3, ids, view)), torch.from_numpy(images))
    assert found.dtype == torch.float32
    assert found.shape == images.shape
    for image, out, weights, light in zip(
        images, found.numpy(), *drawn_colours(5, 3, ids, view), strict=True
    ):
        expected = reference(image.astype(np.float64), weights, light, order)
        assert np.abs(out - expected).max() < 1e-5


def recovered(maps):
    """Weights and lighting of each sample, from its map alone."""
    std, mean = np.array([0.229, 0.224, 0.225]), np.array([0.485, 0.456, 0.406])
    whole = maps.astype(np.float64) * std[:, None]
    m, c, t = whole[:, :, :3], whole[:, :, 3:6], whole[:, :, 6] + mean
    ones = np.ones(3)
    coloured = np.array([0.587, -0.299, 0.0])  # its grey value is 0
    keeps = ((m + c) @ ones)[:, 0]  # of a uniformly grey image: brightness alone
    keeps_contrast = (m @ ones)[:, 0]
    keeps_colour = (m @ coloured)[:, 0] / coloured[0]
    weights = 1 - np.stack([keeps, keeps_contrast / keeps, keeps_colour / keeps_contrast], axis=1)
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    lighting = np.linalg.solve(vectors * np.array([0.2175, 0.0188, 0.0045]), t.T).T
    return weights, lighting


def test_every_weight_of_the_colours_is_uniform_and_every_light_normal():
    weights, lighting = recovered(colour.maps(0, 0, np.arange(8000)))
    for column in weights.T:
        assert np.abs(column).max() < 0.4 + 1e-5
        assert stats.kstest(column, stats.uniform(-0.4, 0.8).cdf).pvalue > UNLIKELY
    for column in lighting.T:
        assert stats.kstest(column, stats.norm(0, 0.1).cdf).pvalue > UNLIKELY
    correlations = np.corrcoef(np.concatenate([weights, lighting], axis=1).T) - np.eye(6)
    assert np.abs(correlations).max() < 5 / np.sqrt(8000)


def test_colours_of_another_epoch_or_view_are_others():
    ids = np.arange(2000)
    first = np.concatenate(recovered(colour.maps(0, 0, ids)), axis=1)
    for epoch, view in ((1, ""), (0, PEER)):
        second = np.concatenate(recovered(colour.maps(0, epoch, ids, view)), axis=1)
        for a, b in zip(first.T, second.T, strict=True):
            assert stats.pearsonr(a, b).pvalue > UNLIKELY


def test_colours_of_a_channels_last_image_are_the_same():
    maps = torch.from_numpy(colour.maps(0, 0, np.arange(6)))
    images = torch.from_numpy(random_images(6))
    expected = colour.apply(maps, images)
    found = colour.apply(maps, images.to(memory_format=torch.channels_last))
    assert found.is_contiguous()
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def matmul():
    """The switches of products on a GPU, as they were afterwards."""
    switches = torch.backends.cuda.matmul
    before = switches.allow_tf32
    yield switches
    switches.allow_tf32 = before


@pytest.mark.parametrize("allowed", [False, True])
def test_colours_are_exact_where_the_network_may_use_tf32(monkeypatch, matmul, allowed):
    """And it may again afterwards. On a CPU the switch shows, but changes no bit."""
    baddbmm, during = torch.baddbmm, []

    def watched(*args):
        during.append(matmul.allow_tf32)
        return baddbmm(*args)

    maps, images = torch.from_numpy(colour.maps(1, 0, np.arange(4))), torch.rand(4, 3, 5, 5)
    expected = colour.apply(maps, images)
    monkeypatch.setattr(torch, "baddbmm", watched)
    matmul.allow_tf32 = allowed
    assert torch.equal(colour.apply(maps, images), expected)
    assert during == [False, False]
    assert matmul.allow_tf32 is allowed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.gpu
def test_colours_on_a_gpu_that_may_use_tf32_are_those_of_the_cpu(matmul):
    matmul.allow_tf32 = True
    maps, images = torch.from_numpy(colour.maps(1, 0, np.arange(16))), torch.rand(16, 3, 64, 64)
    found = colour.apply(maps.cuda(), images.cuda()).cpu()
    torch.testing.assert_close(found, colour.apply(maps, images), rtol=1e-5, atol=1e-5)


def test_colours_leave_the_images_they_are_given():
    maps = torch.from_numpy(colour.maps(0, 0, np.arange(6)))
    images = torch.from_numpy(random_images(6))
    before = images.clone()
    colour.apply(maps, images)
    assert torch.equal(images, before)
