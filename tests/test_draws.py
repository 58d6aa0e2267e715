"""Augmentation: draws are frozen, uniform, independent, and equal on any world; pixels follow."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pskd import draws
from pskd.data import digits
from pskd.data.arrays import ArrayData
from pskd.data.catalog import Catalog, Split
from pskd.data.interface import validation_batches
from pskd.hashing import hash64
from pskd.order import MicroBatch, Plan, epoch_order

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CPU = torch.device("cpu")
# Critical values of chi squared at 1 in 100,000; the seeds are fixed, so a pass is a pass.
CHI2_LIMIT = {1: 19.6, 8: 37.4, 63: 123.4}


def chi2(counts):
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2).sum() / expected)


def assert_uniform(cells, count):
    counts = np.bincount(np.asarray(cells, dtype=np.int64).ravel(), minlength=count)
    assert len(counts) == count
    assert chi2(counts) < CHI2_LIMIT[count - 1]


# --- uniforms, shifts, flips ---------------------------------------------------------------


def test_draws_are_frozen():
    ids = np.array([0, 5, 1436])
    assert [[x.hex() for x in row] for row in draws.uniforms(3, 2, ids, "crop", 2).tolist()] == [
        ["0x1.07a462fbe97b4p-2", "0x1.2a649f36579a4p-2"],
        ["0x1.f756acacfe269p-1", "0x1.3683cd8721bc2p-1"],
        ["0x1.62f90faecf71cp-3", "0x1.31c464a0f9a32p-1"],
    ]
    assert draws.shifts(3, 2, np.arange(6), 4).tolist() == [
        [2, 2],
        [6, 1],
        [3, 2],
        [2, 4],
        [5, 3],
        [8, 5],
    ]
    assert draws.flips(3, 2, np.arange(10)).tolist() == [bool(int(b)) for b in "1110110000"]


@untimed
@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 300),
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=10),
    padding=st.integers(0, 8),
)
def test_draws_are_the_upper_bits_of_their_stream(seed, epoch, ids, padding):
    ids = np.array(ids)
    bits = hash64(seed, "crop", epoch, ids, 2).tolist()
    uniforms = draws.uniforms(seed, epoch, ids, "crop", 2)
    assert uniforms.dtype == np.float64
    assert uniforms.tolist() == [[(b >> 11) / 2**53 for b in row] for row in bits]
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    sides = 2 * padding + 1
    corners = draws.shifts(seed, epoch, ids, padding)
    assert corners.tolist() == [[(b >> 11) * sides >> 53 for b in row] for row in bits]
    coins = hash64(seed, "flip", epoch, ids, 1)[:, 0].tolist()
    assert draws.flips(seed, epoch, ids).tolist() == [coin < 2**63 for coin in coins]


def test_the_largest_hash_stays_below_one(monkeypatch):
    monkeypatch.setattr(draws, "hash64", lambda *_: np.full((1, 2), 2**64 - 1, dtype=np.uint64))
    assert draws.uniforms(0, 0, np.array([0]), "crop", 2).max() < 1
    assert draws.shifts(0, 0, np.array([0]), 4).tolist() == [[8, 8]]


@pytest.mark.parametrize("stream", ["crop", "flip", "mix"])
@pytest.mark.parametrize("epoch", [0, 299])
def test_uniforms_fill_64_bins_evenly(stream, epoch):
    uniforms = draws.uniforms(0, epoch, np.arange(50_000), stream, 2)
    for column in range(2):
        assert_uniform(uniforms[:, column] * 64, 64)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0, "crop", 0), (0, 0, "crop", 1)),  # two columns
        ((0, 0, "crop", 0), (0, 0, "flip", 0)),  # two streams
        ((0, 0, "crop", 0), (0, 1, "crop", 0)),  # two epochs
        ((0, 0, "crop", 0), (1, 0, "crop", 0)),  # two seeds
        ((1, 0, "crop", 0), (0, 1, "crop", 0)),  # seed and epoch are not added up
    ],
)
def test_draws_with_different_keys_are_independent(first, second):
    ids = np.arange(50_000)
    cells = [
        (draws.uniforms(seed, epoch, ids, stream, 2)[:, column] * 8).astype(np.int64)
        for seed, epoch, stream, column in (first, second)
    ]
    assert_uniform(cells[0] * 8 + cells[1], 64)


def test_draws_of_neighbouring_ids_are_independent():
    cells = (draws.uniforms(0, 0, np.arange(50_000), "crop", 1)[:, 0] * 8).astype(np.int64)
    assert_uniform(cells[0::2] * 8 + cells[1::2], 64)


def test_shifts_and_flips_are_uniform():
    ids = np.arange(50_000)
    for side in range(2):
        assert_uniform(draws.shifts(0, 0, ids, 4)[:, side], 9)
    assert_uniform(draws.flips(0, 0, ids), 2)


@untimed
@given(ids=st.lists(st.integers(0, 499), min_size=1, max_size=30), epoch=st.integers(0, 5))
def test_a_draw_depends_on_its_id_and_not_on_the_batch(ids, epoch):
    ids, everyone = np.array(ids), np.arange(500)
    whole = draws.uniforms(1, epoch, everyone, "crop", 3)
    assert np.array_equal(draws.uniforms(1, epoch, ids, "crop", 3), whole[ids])
    # A further column never shifts another.
    assert np.array_equal(draws.uniforms(1, epoch, ids, "crop", 1), whole[ids, :1])
    shape = {"height": 5, "width": 7, "padding": 2, "flip": True}
    for part, full in zip(
        draws.crop_grid(1, epoch, ids, **shape),
        draws.crop_grid(1, epoch, everyone, **shape),
        strict=True,
    ):
        assert np.array_equal(part, full[ids])


def test_without_crop_and_flip_the_grid_is_the_image():
    y, x = draws.crop_grid(0, 0, np.arange(3), height=2, width=4, padding=0, flip=False)
    assert y.tolist() == [[0, 1]] * 3
    assert x.tolist() == [[0, 1, 2, 3]] * 3


# --- augmented pixels ----------------------------------------------------------------------


def random_catalog(channels, height=5, width=8, train=40, validation=11):
    rng = np.random.default_rng(channels)

    def split(n):
        images = rng.integers(0, 256, (n, height, width, channels), dtype=np.uint8)
        return Split(images, rng.integers(0, 10, n))

    mean = tuple(rng.uniform(0.2, 0.8, channels).tolist())
    std = tuple(rng.uniform(0.1, 0.4, channels).tolist())
    return Catalog("random", tuple("abcdefghij"), mean, std, split(train), split(validation))


def normalised(catalog, image_HWC):
    """float64 (3, H, W) of a uint8 image; grey is repeated."""
    scaled = (image_HWC / 255 - np.array(catalog.mean)) / np.array(catalog.std)
    return np.broadcast_to(scaled, (*image_HWC.shape[:2], 3)).transpose(2, 0, 1)


def naive_augment(image_HWC, corner, padding, mirrored):
    """As torchvision: pad with black, crop, then mirror."""
    height, width = image_HWC.shape[:2]
    padded = np.pad(image_HWC, ((padding, padding), (padding, padding), (0, 0)))
    crop = padded[corner[0] : corner[0] + height, corner[1] : corner[1] + width]
    return crop[:, ::-1] if mirrored else crop


def micro_batch(ids, epoch=0):
    return MicroBatch(epoch=epoch, step=0, micro=0, ids_B=np.asarray(ids), scale=1.0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_flip_and_normalise_equal_a_naive_reference(channels, padding, flip):
    catalog = random_catalog(channels)
    data = ArrayData(catalog, CPU, seed=5, crop_padding=padding, flip=flip)
    ids = np.random.default_rng(0).permutation(len(catalog.train))
    batch = data.train_batch(micro_batch(ids, epoch=3))
    corners = draws.shifts(5, 3, ids, padding)
    mirrored = draws.flips(5, 3, ids) & flip
    assert len(set(mirrored.tolist())) == 1 + flip
    for i, sample in enumerate(ids):
        image = catalog.train.images_NHWC[sample]
        expected = normalised(catalog, naive_augment(image, corners[i], padding, bool(mirrored[i])))
        # One grey level apart is at least 1 / 255 / 0.4 = 0.0098.
        np.testing.assert_allclose(batch.images_BCHW[i].numpy(), expected, rtol=1e-6, atol=2e-6)


def test_a_batch_carries_ids_labels_and_unit_weights():
    catalog = random_catalog(3)
    ids = np.array([7, 3, 3, 39])
    batch = ArrayData(catalog, CPU, 0, 1, True).train_batch(micro_batch(ids))
    assert batch.ids_B.tolist() == ids.tolist()
    assert batch.labels_B.tolist() == catalog.train.labels_N[ids].tolist()
    assert batch.weight_B.tolist() == [1.0] * 4
    assert batch.images_BCHW.dtype == torch.float32
    assert batch.images_BCHW.shape == (4, 3, 5, 8)
    assert torch.equal(batch.images_BCHW[1], batch.images_BCHW[2])


def test_images_are_float32_also_when_the_catalog_computed_its_mean_with_numpy():
    catalog = replace(random_catalog(1), mean=(np.float64(0.3),))  # a float, for any type checker
    batch = ArrayData(catalog, CPU, 0, 0, False).train_batch(micro_batch([0, 1]))
    assert batch.images_BCHW.dtype == torch.float32


def test_a_sample_looks_different_in_another_epoch_or_under_another_seed():
    catalog = random_catalog(3)
    views = [
        ArrayData(catalog, CPU, seed, 4, True).train_batch(micro_batch(range(40), epoch))
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    for other in views[1:]:
        same = (views[0].images_BCHW == other.images_BCHW).flatten(1).all(dim=1)
        assert int(same.sum()) < 5  # 1 in 162 by chance


@pytest.fixture(scope="module")
def catalog():
    return digits.load(None, False)


def image_hashes(data, catalog, world, accumulation, epoch):
    """id -> sha256 of its augmented image, over a whole epoch."""
    plan = Plan(len(catalog.train), 96, world, accumulation)
    plan.check()
    order = epoch_order(0, epoch, plan.n)
    hashes = {}
    for step in range(plan.steps):
        for rank in range(world):
            for micro in plan.micro_batches(order, epoch, step, rank):
                batch = data.train_batch(micro)
                for sample, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True):
                    hashes[sample] = hashlib.sha256(image.numpy().tobytes()).hexdigest()
    return hashes


def test_augmented_pixels_are_bit_identical_on_any_world(catalog):
    data = ArrayData(catalog, CPU, seed=0, crop_padding=1, flip=True)
    expected = image_hashes(data, catalog, world=1, accumulation=1, epoch=2)
    assert sorted(expected) == list(range(len(catalog.train)))
    for world in (1, 2, 3, 4, 8):
        for accumulation in (1, 2):
            fresh = ArrayData(catalog, CPU, seed=0, crop_padding=1, flip=True)
            assert image_hashes(fresh, catalog, world, accumulation, epoch=2) == expected


# --- validation ----------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 256])
@pytest.mark.parametrize("n", [1, 3, 11])
def test_validation_counts_every_sample_once_unaugmented(world, batch_size, n):
    catalog = random_catalog(1, validation=n)
    data = ArrayData(catalog, CPU, seed=0, crop_padding=4, flip=True)
    batches = [
        batch
        for rank in range(world)
        for batch in validation_batches(data, rank, world, batch_size)
    ]
    assert all(1 <= len(labels) <= batch_size for _, labels in batches)
    labels = torch.cat([labels for _, labels in batches])
    assert labels.tolist() == catalog.validation.labels_N.tolist()
    images = torch.cat([images for images, _ in batches]).numpy()
    expected = np.stack([normalised(catalog, image) for image in catalog.validation.images_NHWC])
    np.testing.assert_allclose(images, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_validation_shares_of_the_digits_differ_by_at_most_one(catalog, world):
    data = ArrayData(catalog, CPU, seed=0, crop_padding=0, flip=False)
    shares = [
        sum(len(labels) for _, labels in validation_batches(data, rank, world, 64))
        for rank in range(world)
    ]
    assert sum(shares) == 360
    assert max(shares) - min(shares) <= 1


def test_digits_are_1437_and_360_grey_images_of_ten_classes(catalog):
    assert (len(catalog.train), len(catalog.validation), catalog.num_classes) == (1437, 360, 10)
    assert catalog.train.images_NHWC.shape[1:] == (8, 8, 1)
    assert catalog.train.images_NHWC.dtype == np.uint8
    assert int(catalog.train.images_NHWC.max()) == 255
    scaled = catalog.train.images_NHWC / 255
    assert catalog.mean[0] == pytest.approx(scaled.mean(), abs=5e-4)
    assert catalog.std[0] == pytest.approx(scaled.std(), abs=5e-4)


def test_the_fingerprint_tells_data_sets_with_one_name_apart():
    catalog = random_catalog(1)
    assert catalog.fingerprint == random_catalog(1).fingerprint
    pixels = catalog.train.images_NHWC.copy()
    pixels[0, 0, 0, 0] ^= 1
    labels = catalog.validation.labels_N.copy()
    labels[0] = (labels[0] + 1) % 10
    train, validation = catalog.train, catalog.validation
    for splits in (
        (Split(pixels, train.labels_N), validation),
        (train, Split(validation.images_NHWC, labels)),
    ):
        other = Catalog(catalog.name, catalog.class_names, catalog.mean, catalog.std, *splits)
        assert other.fingerprint != catalog.fingerprint
