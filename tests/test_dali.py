"""pskd.data.dali: the right pixels of the right samples, on any world, whatever the files are."""

import gc
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from pskd import draws
from pskd.data import colour, imagefolder
from pskd.data.dali import DaliData
from pskd.data.graph import make_pipeline
from pskd.data.interface import validation_batches
from pskd.data.views import PEER
from pskd.errors import PskdError
from pskd.order import Plan, Walk
from tests.launches import ROOT
from tests.photos import BAD_BODIES, BAD_HEADERS, ODD_NAMES, make_folder, make_nasty
from tests.reading import changed, plain_options

CPU = torch.device("cpu")
SEED = 7
PLAIN = plain_options(image_size=32, validation_resize=36)
WHOLE = changed(PLAIN, crop_scale=(1.0, 1.0))  # about all of an image: its damage as well
INTERPOLATIONS = {
    "linear": InterpolationMode.BILINEAR,
    "cubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
}


def load(root, **options):
    chosen = {"index_path": None, "val_index_path": None, "held_out": 0, "limit": 0} | options
    return imagefolder.load(root, **chosen)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """105 images of 7 classes to train, 203 others to validate; of about 64 pixels."""
    root = tmp_path_factory.mktemp("photos")
    make_folder(root / "train", classes=7, per_class=15, median_side=64)
    make_folder(root / "val", classes=7, per_class=29, median_side=64, seed=1)
    return load(root)


@pytest.fixture
def small(tmp_path):
    """24 images of 3 classes, for damage. One folder is both splits."""
    files = make_folder(tmp_path / "train", classes=3, per_class=8, median_side=80)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    return load(tmp_path), files


def batches(catalog, options=PLAIN, *, plan=None, rank=0, epochs=2, start=(0, 0), peer=None):
    """(micro, Batch) of one rank from a position to the end of the last epoch."""
    plan = plan or Plan(len(catalog.train), 24)
    plan.check()
    walk = Walk(plan, SEED, epochs, rank)
    data = DaliData(catalog, CPU, SEED, options, peer)
    data.begin(walk, *start)
    count = 0
    for micro in walk.start(*start):
        yield micro, data.train_batch(micro)
        count += 1
    data.close()
    first, step = start
    steps = max(0, plan.steps * (epochs - first) - step)
    assert count == steps * plan.accumulation, "whoever checks each batch has had them all"


def digest(image_CHW):
    return hashlib.sha256(image_CHW.contiguous().numpy().tobytes()).hexdigest()


def hashes(catalog, options=PLAIN, *, plan=None, **how):
    """(epoch, id) -> hash of its image, over all ranks of a plan; each exactly once."""
    plan = plan or Plan(len(catalog.train), 24)
    found = {}
    for rank in range(plan.world):
        for micro, batch in batches(catalog, options, plan=plan, rank=rank, **how):
            assert batch.ids_B.tolist() == micro.ids_B.tolist()
            for sample, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True):
                assert (micro.epoch, sample) not in found
                found[micro.epoch, sample] = digest(image)
    return found


def picture(path):
    """As PIL decodes it; stored pixels, whatever EXIF says."""
    with Image.open(path) as image:
        return image.convert("RGB")


def levels(images_BCHW):
    """Normalised images as float64 (B, H, W, 3) in 0..255."""
    mean, std = (torch.tensor(t, dtype=torch.float64) for t in (colour.MEAN, colour.STD))
    return ((images_BCHW.permute(0, 2, 3, 1).double() * std + mean) * 255).numpy()


def trained_by_pil(split, epoch, ids, options=PLAIN, size=None, view=""):
    """The window that was drawn, resized and flipped by PIL: (B, H, W, 3) in 0..255."""
    size = size or options.section.image_size
    windows = draws.windows(
        SEED,
        epoch,
        ids,
        *split.sizes(ids),
        scale=options.section.crop_scale,
        ratio=options.section.crop_ratio,
        view=view,
    )
    flips = draws.flips(SEED, epoch, ids, view) & options.section.flip
    images = []
    for sample, window, flip in zip(ids.tolist(), windows.tolist(), flips, strict=True):
        image = F.resized_crop(
            picture(split.path(sample)),
            *window,
            [size, size],
            INTERPOLATIONS[options.section.interpolation],
        )
        images.append(np.asarray(F.hflip(image) if flip else image, np.float64))
    return np.stack(images)


def validated_by_pil(split, options=PLAIN):
    """torchvision's Resize and CenterCrop: (N, H, W, 3) in 0..255."""
    images = []
    for sample in range(len(split)):
        image = F.resize(
            picture(split.path(sample)),
            options.section.validation_resize,
            INTERPOLATIONS[options.section.interpolation],
        )
        images.append(np.asarray(F.center_crop(image, options.section.image_size), np.float64))
    return np.stack(images)


def validated(catalog, options=PLAIN, *, rank=0, world=1, batch_size=64):
    """All images and labels of a rank's share."""
    data = DaliData(catalog, CPU, SEED, options)
    parts = [
        (images.clone(), labels.clone())
        for images, labels in validation_batches(data, rank, world, batch_size)
    ]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


# --- one order, one draw: the same bits however they are made ------------------------------------


@pytest.fixture(scope="module")
def expected(catalog):
    """Hashes of two epochs, made by one rank and one thread, one batch ahead."""
    return hashes(catalog, changed(PLAIN, threads=1, prefetch=1))


def test_an_epoch_is_an_exact_cover_and_each_has_its_own_views(expected, catalog):
    everyone = [(epoch, sample) for epoch in range(2) for sample in range(len(catalog.train))]
    assert sorted(expected) == everyone
    assert len(set(expected.values())) == len(everyone)


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_pixels_are_bit_identical_on_any_world(catalog, expected, world, threads, prefetch):
    options = changed(PLAIN, threads=threads, prefetch=prefetch)
    assert hashes(catalog, options, plan=Plan(105, 24, world)) == expected


@pytest.mark.parametrize(
    ("global_batch", "world", "accumulation"), [(105, 1, 1), (2, 1, 1), (35, 1, 3), (40, 3, 2)]
)
def test_pixels_are_bit_identical_in_any_batch(
    catalog, expected, global_batch, world, accumulation
):
    plan = Plan(105, global_batch, world, accumulation, last_batch="drop")
    found = hashes(catalog, changed(PLAIN, prefetch=3), plan=plan)
    assert len(found) == 2 * plan.trained
    assert found.items() <= expected.items()


@pytest.mark.parametrize("start", [(0, 1), (0, 4), (1, 0), (1, 3), (1, 4)])
@pytest.mark.parametrize("world", [1, 2])
def test_pixels_are_bit_identical_from_any_step_on(catalog, expected, start, world):
    plan = Plan(105, 24, world)
    found = hashes(catalog, changed(PLAIN, prefetch=3), plan=plan, start=start)
    assert len(found) == 105 * (2 - start[0]) - 24 * start[1]
    assert found.items() <= expected.items()


def test_a_second_begin_starts_anew(catalog, expected):
    walk = Walk(Plan(105, 24), SEED, 2, 0)
    data = DaliData(catalog, CPU, SEED, PLAIN)
    data.begin(walk, 0, 0)
    data.train_batch(next(walk.start(0, 0)))
    data.begin(walk, 1, 2)
    micro = next(walk.start(1, 2))
    batch = data.train_batch(micro)
    for sample, image in zip(micro.ids_B.tolist(), batch.images_BCHW, strict=True):
        assert digest(image) == expected[1, sample]


def test_the_seed_changes_the_views(catalog, expected):
    walk = Walk(Plan(105, 24), SEED, 1, 0)
    data = DaliData(catalog, CPU, SEED + 1, PLAIN)
    data.begin(walk, 0, 0)
    micro = next(walk.start(0, 0))
    images = data.train_batch(micro).images_BCHW
    same = [
        digest(image) == expected[0, sample]
        for sample, image in zip(micro.ids_B.tolist(), images, strict=True)
    ]
    assert not any(same)


def test_a_batch_is_valid_until_the_next_call(catalog):
    for _, batch in batches(catalog, changed(PLAIN, prefetch=1), epochs=1):
        before = batch.images_BCHW.clone()
        time.sleep(0.05)  # the next ones are decoded meanwhile
        assert torch.equal(batch.images_BCHW, before)


def test_a_batch_carries_labels_and_unit_weights(catalog):
    for micro, batch in batches(catalog, epochs=1):
        assert batch.labels_B.tolist() == catalog.train.labels_N[micro.ids_B].tolist()
        assert batch.weight_B.tolist() == [1.0] * len(micro.ids_B)
        assert batch.images_BCHW.dtype == torch.float32
        assert batch.images_BCHW.shape == (len(micro.ids_B), 3, 32, 32)
        assert batch.images_BCHW.is_contiguous()
        assert batch.labels_B.dtype == torch.int64
        assert batch.peer_BCHW is None
        assert batch.absent == ()


def test_held_out_and_limited_samples_have_the_files_of_their_ids(catalog):
    root = catalog.train.index.root.parent
    part = load(root, held_out=11, limit=50)
    assert (len(part.train), len(part.validation)) == (50, 11)
    _, batch = next(batches(part, plan=Plan(50, 50), epochs=1))
    ids = batch.ids_B.numpy()
    reference = trained_by_pil(part.train, 0, ids)
    assert np.abs(levels(batch.images_BCHW) - reference).mean() < 0.5
    assert batch.labels_B.tolist() == part.train.labels_N[ids].tolist()
    images, labels = validated(part, changed(PLAIN, image_size=36))
    reference = validated_by_pil(part.validation, changed(PLAIN, image_size=36))
    assert labels.tolist() == part.validation.labels_N.tolist()
    assert np.abs(np.median(levels(images) - reference)) < 1


# --- against torchvision -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 photos of about 350 pixels, both splits."""
    root = tmp_path_factory.mktemp("larger")
    make_folder(root / "train", classes=4, per_class=10, median_side=350)
    (root / "val").symlink_to(root / "train")
    return load(root)


def assert_near(found, wanted, inside=2):
    """Equal but for rounding; farther off only on the border, where PIL cuts its filter.

    DALI repeats the outermost pixels instead. In 0..255, as seen: mean 0.15 to 0.19, inside at most
    1 and on the border 18. Of cubic and lanczos PIL clips what overshoots between its two passes:
    inside at most 8 and 16.
    """
    difference = np.abs(found - wanted)
    inner = difference[:, 1:-1, 1:-1]
    print(  # noqa: T201  (the figures, with -s)
        f"mean {difference.mean():.3f}, inside at most {inner.max():.1f}, "
        f"on the border {difference.max():.1f}"
    )
    assert difference.mean(axis=(1, 2, 3)).max() < 0.5  # of the worst image
    assert difference.mean() < 0.25
    assert inner.max() < inside
    assert difference.max() < 24


@pytest.mark.parametrize(
    ("interpolation", "size", "inside"),
    [("linear", 224, 2), ("linear", 64, 2), ("cubic", 96, 12), ("lanczos", 96, 20)],
)
@pytest.mark.parametrize("flip", [False, True])
def test_training_pixels_are_torchvisions(photos, interpolation, size, inside, flip):
    options = changed(PLAIN, image_size=size, validation_resize=256, interpolation=interpolation)
    options = changed(options, flip=flip)
    for micro, batch in batches(photos, options, plan=Plan(40, 40), epochs=2):
        reference = trained_by_pil(photos.train, micro.epoch, micro.ids_B, options)
        assert_near(levels(batch.images_BCHW), reference, inside)


@pytest.fixture(scope="module")
def odd_sizes(tmp_path_factory):
    """Both splits: every rest of the sides modulo 4, landscape and portrait, near and far sizes."""
    root = tmp_path_factory.mktemp("odd")
    folder = root / "train" / "class"
    make_folder(root / "photos", classes=1, per_class=1, median_side=400)
    with Image.open(root / "photos/class000/image00000.JPEG") as photo:
        for width in range(40, 48):
            for height in (*range(40, 48), 57, 101, 300):
                for size in {(width, height), (height, width)}:
                    path = folder / f"{size[0]}x{size[1]}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    photo.resize(size).save(path)
    (root / "val").symlink_to(root / "train")
    return load(root)


@pytest.mark.parametrize(
    ("resize", "size"), [(36, 32), (32, 32), (36, 31), (33, 32), (35, 32), (34, 32), (80, 64)]
)
def test_validation_pixels_are_torchvisions(odd_sizes, resize, size):
    options = changed(PLAIN, validation_resize=resize, image_size=size)
    images, labels = validated(odd_sizes, options)
    assert labels.tolist() == [0] * len(odd_sizes.validation)
    assert_near(levels(images), validated_by_pil(odd_sizes.validation, options))


def test_validation_of_photos_is_torchvisions_256_and_224(photos):
    options = changed(PLAIN, validation_resize=256, image_size=224)
    images, labels = validated(photos, options, batch_size=16)
    assert labels.tolist() == photos.validation.labels_N.tolist()
    assert_near(levels(images), validated_by_pil(photos.validation, options))


# --- validation is counted once ------------------------------------------------------------------


@pytest.fixture(scope="module")
def once(catalog):
    """Hashes of the 203 validation images, one rank and one batch."""
    images, labels = validated(catalog, batch_size=203)
    assert labels.tolist() == catalog.validation.labels_N.tolist()
    found = [digest(image) for image in images]
    assert len(set(found)) == 203
    return found


@pytest.mark.parametrize("batch_size", [1, 7, 32, 67, 68, 256])
@pytest.mark.parametrize("world", [1, 3])
def test_203_images_are_each_validated_once(catalog, once, world, batch_size):
    found, sizes = [], []
    for rank in range(world):
        data = DaliData(catalog, CPU, SEED, changed(PLAIN, prefetch=3))
        for images, labels in validation_batches(data, rank, world, batch_size):
            assert 1 <= len(labels) <= batch_size
            first = len(found)
            found += [digest(image) for image in images]
            assert labels.tolist() == catalog.validation.labels_N[first : len(found)].tolist()
        sizes.append(len(found) - sum(sizes))
    assert found == once
    assert max(sizes) - min(sizes) <= 1


def test_ranks_without_a_sample_validate_nothing(catalog):
    few = load(catalog.train.index.root.parent, held_out=2)
    counts = []
    for rank in range(5):
        data = DaliData(few, CPU, SEED, PLAIN)
        counts.append(sum(len(labels) for _, labels in validation_batches(data, rank, 5, 8)))
    assert sorted(counts) == [0, 0, 0, 1, 1]


def test_validation_between_two_steps_disturbs_neither(catalog, expected, once):
    walk = Walk(Plan(105, 24), SEED, 2, 0)
    data = DaliData(catalog, CPU, SEED, changed(PLAIN, prefetch=3))
    data.begin(walk, 0, 0)
    for micro in walk.start(0, 0):
        batch = data.train_batch(micro)
        found = [digest(image) for image in batch.images_BCHW]
        assert found == [expected[micro.epoch, sample] for sample in micro.ids_B.tolist()]
        if micro.step in (1, 4):
            validation = [
                digest(image)
                for images, _ in validation_batches(data, 0, 1, 50)
                for image in images
            ]
            assert validation == once


# --- peers, sizes, colours, layouts -----------------------------------------------------------


def shifted(epoch, ids_B):
    """A peer for each sample; another one in each epoch."""
    return (ids_B * 11 + 5 + epoch) % 105


def test_peers_are_extra_rows_with_views_of_their_own(catalog, expected):
    own = {}  # (epoch, id) -> its view as a peer
    for micro, batch in batches(catalog, peer=lambda _, ids_B: ids_B):
        for sample, image in zip(micro.ids_B.tolist(), batch.peer_BCHW, strict=True):
            own[micro.epoch, sample] = digest(image)
    assert not set(own.values()) & set(expected.values())
    for world in (1, 2):
        for rank in range(world):
            plan = Plan(105, 24, world)
            for micro, batch in batches(catalog, plan=plan, rank=rank, peer=shifted):
                ids = micro.ids_B.tolist()
                peers = shifted(micro.epoch, micro.ids_B).tolist()
                assert [digest(i) for i in batch.images_BCHW] == [
                    expected[micro.epoch, k] for k in ids
                ]
                assert [digest(i) for i in batch.peer_BCHW] == [own[micro.epoch, k] for k in peers]
                assert batch.labels_B.tolist() == catalog.train.labels_N[ids].tolist()
                assert len(batch.weight_B) == len(ids)


def test_the_view_of_a_peer_is_cut_and_flipped_by_its_own_draws(photos):
    def peer(_, ids_B):
        return 39 - ids_B

    options = changed(PLAIN, image_size=64, validation_resize=64)
    for micro, batch in batches(photos, options, plan=Plan(40, 20), peer=peer):
        reference = trained_by_pil(photos.train, micro.epoch, 39 - micro.ids_B, options, view=PEER)
        assert_near(levels(batch.peer_BCHW), reference)


@pytest.mark.parametrize("prefetch", [1, 4])
def test_training_images_grow_with_the_epoch_and_not_before(photos, prefetch):
    schedule = ((0, 20), (1, 28), (3, 40))
    options = changed(PLAIN, resize_schedule=schedule, prefetch=prefetch)
    sizes = {}
    for micro, batch in batches(photos, options, plan=Plan(40, 16), epochs=4):
        size = batch.images_BCHW.shape[-1]
        assert batch.images_BCHW.shape[-2] == size
        sizes.setdefault(micro.epoch, set()).add(size)
        reference = trained_by_pil(photos.train, micro.epoch, micro.ids_B, options, size)
        assert np.abs(levels(batch.images_BCHW) - reference).mean() < 0.5
    assert sizes == {0: {20}, 1: {28}, 2: {28}, 3: {40}}
    images, _ = validated(photos, options)
    assert images.shape[-2:] == (32, 32)


def test_before_the_schedule_begins_images_have_their_usual_size(photos):
    options = changed(PLAIN, resize_schedule=((1, 24),))
    sizes = [
        batch.images_BCHW.shape[-1]
        for _, batch in batches(photos, options, plan=Plan(40, 40), start=(0, 0), epochs=3)
    ]
    assert sizes == [32, 24, 24]


def test_colours_are_those_of_the_samples_on_the_plain_pixels(catalog):
    mean, std = (torch.tensor(t)[:, None, None] for t in (colour.MEAN, colour.STD))
    coloured = batches(catalog, changed(PLAIN, augment="pskd-imagenet"), peer=shifted)
    plain = batches(catalog, PLAIN, peer=shifted)
    for (micro, found), (_, flat) in zip(coloured, plain, strict=True):
        for ids, view, images, pixels in (
            (micro.ids_B, "", found.images_BCHW, flat.images_BCHW),
            (shifted(micro.epoch, micro.ids_B), PEER, found.peer_BCHW, flat.peer_BCHW),
        ):
            maps = torch.from_numpy(colour.maps(SEED, micro.epoch, ids, view))
            wanted = colour.apply(maps, pixels * std + mean)
            assert torch.allclose(images, wanted, rtol=0, atol=2e-5)
            assert not torch.allclose(images, pixels, atol=0.1)


def test_colours_are_for_training_only(catalog, once):
    images, _ = validated(catalog, changed(PLAIN, augment="pskd-imagenet"))
    assert [digest(image) for image in images] == once


def test_coloured_pixels_are_bit_identical_on_any_world(catalog):
    options = changed(PLAIN, augment="pskd-imagenet")
    reference = hashes(catalog, changed(options, threads=1), plan=Plan(105, 16, 1, 2))
    for plan in (Plan(105, 16, 2), Plan(105, 32, 4), Plan(105, 24), Plan(105, 35, 1, 7)):
        assert hashes(catalog, changed(options, prefetch=3), plan=plan) == reference


@pytest.mark.parametrize("augment", ["standard", "pskd-imagenet"])
def test_channels_last_gives_the_same_values(catalog, augment):
    options = changed(PLAIN, augment=augment)
    usual = batches(catalog, options, peer=shifted, epochs=1)
    last = batches(catalog, changed(options, channels_last=True), peer=shifted, epochs=1)
    for (_, a), (_, b) in zip(usual, last, strict=True):
        for wanted, found in (
            (a.images_BCHW, b.images_BCHW),
            (a.peer_BCHW, b.peer_BCHW),
        ):
            assert found.shape == wanted.shape
            if augment == "standard":
                assert torch.equal(found, wanted)
                assert found.is_contiguous(memory_format=torch.channels_last)
            else:
                assert torch.allclose(found, wanted, rtol=0, atol=2e-5)
    images, _ = validated(catalog, changed(options, channels_last=True))
    assert torch.equal(images, validated(catalog, options)[0])
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_without_flip_nothing_is_mirrored(catalog, expected):
    never = hashes(catalog, changed(PLAIN, flip=False))
    for (epoch, sample), found in never.items():
        mirrored = draws.flips(SEED, epoch, np.array([sample]))[0]
        assert (found == expected[epoch, sample]) == (not mirrored)


# --- images that cannot be decoded ---------------------------------------------------------------


def damage(path, kind):
    """Make an image of no use, after it was indexed."""
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "without its last 200 bytes":
        path.write_bytes(content[:-200])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(bytes(range(256)) * 8)
    elif kind == "header only":
        path.write_bytes(content[:100])
    elif kind == "smaller":
        picture(path).resize((9, 7)).save(path, "JPEG")
    else:
        raise ValueError(kind)


UNDECODABLE = (*BAD_BODIES, *BAD_HEADERS, "header only", "smaller")
GONE = ("missing", "a folder")
DAMAGES = (*UNDECODABLE, *GONE)


def place_of(catalog, plan, sample, epoch=0):
    """(step, row) of a sample in an epoch of one rank."""
    for micro in Walk(plan, SEED, epoch + 1, 0).start(epoch, 0):
        if sample in micro.ids_B:
            return micro.step, micro.ids_B.tolist().index(sample)
    raise AssertionError(sample)


def sample_at(plan, epoch, step, row=0):
    """The id that one rank trains there."""
    return int(next(Walk(plan, SEED, epoch + 1, 0).start(epoch, step)).ids_B[row])


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_image_stops_and_is_named(small, kind):
    catalog, _ = small
    plan = Plan(24, 8)
    bad = sample_at(plan, 1, 1, row=5)
    path = catalog.train.path(bad)
    step_before, _ = place_of(catalog, plan, bad)
    clean = hashes(catalog, WHOLE, plan=plan)
    damage(Path(path), kind)
    seen = {}
    with pytest.raises(PskdError) as caught:
        for micro, batch in batches(catalog, changed(WHOLE, prefetch=3), plan=plan):
            for sample, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True):
                seen[micro.epoch, sample] = digest(image)
    text = str(caught.value)
    assert f"image {path} (sample {bad})" in text
    assert re.search(rf"in epoch 1, step {step_before + 1}\b", text)
    if kind in GONE:
        assert "cannot be read: " in text
        assert f"is {catalog.train.index.root} mounted?" in text
    else:
        assert "--drop-bad --verify`) makes another data set: a new run" in text
        assert "data.on_bad_image substitute: the run goes on" in text
        assert ("9x7 pixels, in its index" in text) == (kind == "smaller")
    # What lies before it was delivered, and right.
    assert len(seen) == 8 * step_before
    assert seen.items() <= clean.items()


def test_a_bad_image_that_is_met_in_a_later_epoch_names_that(small):
    catalog, _ = small
    plan = Plan(24, 8)
    bad = sample_at(plan, 1, 2, row=3)
    walk = Walk(plan, SEED, 2, 0)
    data = DaliData(catalog, CPU, SEED, changed(WHOLE, prefetch=1))
    data.begin(walk, 0, 0)
    with pytest.raises(PskdError, match=rf"\(sample {bad}\) .* in epoch 2, step 3\b"):
        for micro in walk.start(0, 0):
            data.train_batch(micro)
            if (micro.epoch, micro.step) == (1, 0):
                damage(Path(catalog.train.path(bad)), "empty")


@pytest.mark.parametrize("kind", UNDECODABLE)
@pytest.mark.parametrize("augment", ["standard", "pskd-imagenet"])
def test_a_bad_image_is_substituted_and_no_other_sample_notices(small, kind, augment, caplog):
    catalog, _ = small
    plan = Plan(24, 8)
    options = changed(WHOLE, on_bad_image="substitute", prefetch=3, augment=augment)
    clean = hashes(catalog, options, plan=plan)
    bad = sample_at(plan, 0, 1, row=2)
    damage(Path(catalog.train.path(bad)), kind)
    caplog.set_level("ERROR", logger="pskd")
    substituted_run(catalog, options, plan, {bad}, clean)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # once an epoch
    for epoch, line in enumerate(said):
        step, _ = place_of(catalog, plan, bad, epoch)
        assert f"{catalog.train.path(bad)} (sample {bad})" in line
        assert f"in epoch {epoch + 1}, step {step + 1}:" in line


def substituted_run(catalog, options, plan, bad, clean, epochs=2):
    """Train through; `bad` ids are grey rows of weight 0, the others have their `clean` pixels."""
    seen = []
    for micro, batch in batches(catalog, options, plan=plan, epochs=epochs):
        ids = batch.ids_B.tolist()
        assert ids == micro.ids_B.tolist()
        assert batch.labels_B.tolist() == catalog.train.labels_N[ids].tolist()
        rows = [row for row, sample in enumerate(ids) if sample in bad]
        assert batch.absent == tuple(rows)
        assert batch.weight_B.tolist() == [float(sample not in bad) for sample in ids]
        for sample, image in zip(ids, batch.images_BCHW, strict=True):
            seen.append((micro.epoch, sample))
            if sample in bad:
                flat = image.flatten(1)
                assert torch.isfinite(flat).all()
                assert torch.allclose(flat, flat[:, :1].expand_as(flat), atol=1e-5)  # one colour
                if options.section.augment == "standard":
                    assert np.abs(levels(image[None]) - 128).max() < 0.01
            else:
                assert digest(image) == clean[micro.epoch, sample]
    assert sorted(seen) == [(epoch, k) for epoch in range(epochs) for k in range(plan.n)]


WHERE = {
    "first of all": [(0, 0, 0)],
    "last of all": [(1, 2, 7)],
    "last of an epoch and first of the next": [(0, 2, 7), (1, 0, 0)],
    "two in one batch": [(0, 1, 0), (0, 1, 7)],
    "in neighbouring batches": [(0, 0, 3), (0, 1, 4), (0, 2, 5)],
    "a whole batch": [(0, 1, row) for row in range(8)],
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("prefetch", [1, 3])
def test_bad_images_anywhere_are_substituted(small, where, prefetch):
    catalog, _ = small
    plan = Plan(24, 8)
    options = changed(WHOLE, on_bad_image="substitute", prefetch=prefetch)
    clean = hashes(catalog, options, plan=plan)
    bad = {sample_at(plan, *place) for place in WHERE[where]}
    kinds = (*BAD_BODIES, *BAD_HEADERS)
    for number, sample in enumerate(sorted(bad)):
        damage(Path(catalog.train.path(sample)), kinds[number % len(kinds)])
    substituted_run(catalog, options, plan, bad, clean)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2)])
def test_bad_images_are_substituted_on_any_rank_and_micro_batch(small, world, accumulation):
    catalog, _ = small
    options = changed(WHOLE, on_bad_image="substitute", prefetch=3)
    clean = hashes(catalog, options)
    bad = {1, 9, 14, 22}
    for sample in bad:
        damage(Path(catalog.train.path(sample)), "half")
    plan = Plan(24, 8, world, accumulation)
    found = {}
    for rank in range(world):
        for micro, batch in batches(catalog, options, plan=plan, rank=rank):
            for row, sample in enumerate(batch.ids_B.tolist()):
                assert (row in batch.absent) == (sample in bad)
                if sample not in bad:
                    found[micro.epoch, sample] = digest(batch.images_BCHW[row])
    assert found == {key: value for key, value in clean.items() if key[1] not in bad}


def test_a_bad_peer_takes_its_sample_along(small):
    catalog, _ = small
    plan = Plan(24, 8)

    def peer(_, ids_B):
        return (ids_B + 10) % 24

    options = changed(WHOLE, on_bad_image="substitute", prefetch=3)
    clean = [
        (list(map(digest, b.images_BCHW)), list(map(digest, b.peer_BCHW)))
        for _, b in batches(catalog, options, plan=plan, peer=peer)
    ]
    damage(Path(catalog.train.path(3)), "half")
    for number, (micro, batch) in enumerate(batches(catalog, options, plan=plan, peer=peer)):
        ids, peers = micro.ids_B.tolist(), peer(0, micro.ids_B).tolist()
        rows = [r for r in range(8) if 3 in (ids[r], peers[r])]
        assert batch.absent == tuple(rows)
        assert batch.weight_B.tolist() == [float(r not in rows) for r in range(8)]
        assert batch.labels_B.tolist() == catalog.train.labels_N[ids].tolist()
        for r in range(8):
            if ids[r] != 3:
                assert digest(batch.images_BCHW[r]) == clean[number][0][r]
            if peers[r] != 3:
                assert digest(batch.peer_BCHW[r]) == clean[number][1][r]


def test_a_bad_peer_is_named_with_its_own_id(small):
    catalog, _ = small
    path = catalog.train.path(3)
    damage(Path(path), "half")
    with pytest.raises(PskdError) as caught:
        next(batches(catalog, WHOLE, plan=Plan(24, 2), peer=lambda _, ids: ids * 0 + 3))
    assert f"image {path} (sample 3)" in str(caught.value)
    assert "in epoch 1, step 1" in str(caught.value)


def test_an_image_that_goes_bad_after_it_was_decoded_ahead_is_not_missed_later(small):
    catalog, _ = small
    plan = Plan(24, 8)
    options = changed(WHOLE, on_bad_image="substitute", prefetch=3)
    clean = hashes(catalog, options, plan=plan)
    bad = sample_at(plan, 0, 1)
    met = []
    for micro, batch in batches(catalog, options, plan=plan):
        if (micro.epoch, micro.step) == (0, 0):
            time.sleep(0.3)  # the next two are decoded
            damage(Path(catalog.train.path(bad)), "empty")
        for row, sample in enumerate(batch.ids_B.tolist()):
            if row in batch.absent:
                met.append((micro.epoch, sample))
            else:
                assert digest(batch.images_BCHW[row]) == clean[micro.epoch, sample]
    assert met == [(1, bad)]


def test_a_truncated_image_fails_only_where_the_window_meets_the_damage(tmp_path):
    make_folder(tmp_path / "train", classes=2, per_class=4, median_side=200)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    catalog = load(tmp_path)
    for sample in (2, 5):
        damage(Path(catalog.train.path(sample)), "half")
    options = changed(PLAIN, crop_scale=(0.05, 0.3), on_bad_image="substitute")
    outcomes = []
    for chosen, plan in (
        (changed(options, threads=1, prefetch=1), Plan(8, 8)),
        (changed(options, prefetch=3), Plan(8, 2)),
    ):
        found = {}
        for micro, batch in batches(catalog, chosen, plan=plan, epochs=12):
            for row, sample in enumerate(batch.ids_B.tolist()):
                image = batch.images_BCHW[row]
                found[micro.epoch, sample] = None if row in batch.absent else digest(image)
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]
    failed = {key for key, value in outcomes[0].items() if value is None}
    assert {sample for _, sample in failed} == {2, 5}
    assert 0 < len(failed) < 24  # both: some windows lie above the damage


def test_an_image_that_may_not_be_read_is_named(tmp_path):
    make_folder(tmp_path / "train", classes=1, per_class=4, median_side=40)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    command = [sys.executable, "-c", f"import {__name__} as t; t.meet_an_unreadable_image()"]
    if os.geteuid() == 0:  # root reads everything, unless it gives up the right to
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def meet_an_unreadable_image():
    """In a process that may not read every file."""
    catalog = load(Path(os.environ["FOLDER"]))
    path = Path(catalog.train.path(2))
    path.chmod(0)
    with pytest.raises(PermissionError):
        path.read_bytes()
    for options in (WHOLE, changed(WHOLE, on_bad_image="substitute")):
        with pytest.raises(PskdError, match="cannot be read: Permission denied") as caught:
            list(batches(catalog, options, plan=Plan(4, 4)))
        assert str(path) in str(caught.value)


# Validation takes the whole image, of whatever size.
@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "smaller"])
def test_a_bad_validation_image_is_refused_by_its_path(small, kind):
    catalog, _ = small
    path = Path(catalog.validation.path(13))
    damage(path, kind)
    data = DaliData(catalog, CPU, SEED, changed(PLAIN, on_bad_image="substitute", prefetch=3))
    delivered = 0
    with pytest.raises(PskdError) as caught:
        for _, labels in validation_batches(data, 0, 1, 5):
            delivered += len(labels)
    assert delivered == 10
    what = "cannot be read: " if kind in GONE else "cannot be decoded"
    assert f"validation image {path} (sample 13) {what}" in str(caught.value)
    assert "start again, the run goes on" in str(caught.value)


@pytest.mark.parametrize("kind", GONE)
def test_a_file_that_has_gone_stops_even_where_bad_images_are_substituted(small, kind):
    catalog, _ = small
    data = DaliData(catalog, CPU, SEED, changed(WHOLE, on_bad_image="substitute", prefetch=1))
    walk, path = Walk(Plan(24, 8), SEED, 3, 0), Path(catalog.train.path(7))
    damage(path, "half")
    data.begin(walk, 0, 0)
    with pytest.raises(PskdError, match="cannot be read: ") as caught:
        for micro in walk.start(0, 0):
            data.train_batch(micro)
            if (micro.epoch, micro.step) == (1, 2):  # known to be bad, then gone
                damage(path, kind)
    assert f"image {path} (sample 7), in epoch 3" in str(caught.value)


@pytest.mark.parametrize("told", [False, True])
def test_an_image_that_was_bad_before_costs_no_new_pipeline(small, monkeypatch, told):
    catalog, _ = small
    damage(Path(catalog.train.path(7)), "half")
    damage(Path(catalog.train.path(20)), "empty")
    data = DaliData(catalog, CPU, SEED, changed(WHOLE, on_bad_image="substitute"))
    starts = []
    begin = data._start
    monkeypatch.setattr(data, "_start", lambda *where: (starts.append(where), begin(*where)))
    if told:  # by another rank, or by a checkpoint
        data.expect_bad([7, 20])
    walk = Walk(Plan(24, 8), SEED, 4, 0)
    data.begin(walk, 0, 0)
    absent = []
    for micro in walk.start(0, 0):
        batch = data.train_batch(micro)
        absent += [(micro.epoch, batch.ids_B.tolist()[row]) for row in batch.absent]
    assert sorted(absent) == [(epoch, sample) for epoch in range(4) for sample in (7, 20)]
    assert starts[0] == (0, 0, 0, None)
    assert len(starts) in ((1,) if told else (2, 3))  # 2: both in one batch
    assert all(epoch == 0 for epoch, *_ in starts)


def test_an_error_that_no_image_causes_is_not_blamed_on_one(small):
    catalog, _ = small

    def broken(epoch, ids_B):
        if broken.armed:
            raise ValueError("no peer today")
        return ids_B

    broken.armed = False
    walk = Walk(Plan(24, 8), SEED, 2, 0)
    data = DaliData(catalog, CPU, SEED, changed(WHOLE, on_bad_image="substitute"), broken)
    data.begin(walk, 0, 0)
    broken.armed = True
    with pytest.raises(ValueError, match="no peer today"):
        for micro in walk.start(0, 0):
            data.train_batch(micro)


# --- odd images that are fine --------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of nasty files of use, both splits; what -> sample."""
    root = tmp_path_factory.mktemp("nasty")
    files = make_nasty(root / "train" / "class")
    for what in (*BAD_BODIES, *BAD_HEADERS):
        files.pop(what).unlink()
    (root / "val").symlink_to(root / "train")
    catalog = load(root)
    samples = {os.fsencode(catalog.train.path(k)): k for k in range(len(catalog.train))}
    return catalog, {what: samples[os.fsencode(path)] for what, path in files.items()}


def test_every_odd_image_is_there(odd):
    catalog, samples = odd
    assert len(catalog.train) == len(samples) == 8 + len(ODD_NAMES)


def test_windows_of_odd_images_are_those_that_pil_decodes(odd):
    catalog, samples = odd
    # Windows of exactly 64 x 64 pixels: nothing is resized, so nothing may differ.
    plain = {what: k for what, k in samples.items() if what not in ("huge", "1x1")}
    ids = np.array(list(plain.values()))
    width, height = (int(side[0]) for side in catalog.train.sizes(ids))
    part = replace(catalog, train=catalog.train.take(ids))
    options = changed(PLAIN, image_size=64, validation_resize=64, crop_ratio=(1.0, 1.0))
    share = 64 * 64 / (width * height)
    options = changed(options, crop_scale=(share, share))
    for micro, batch in batches(part, options, plan=Plan(len(ids), len(ids)), epochs=3):
        reference = trained_by_pil(part.train, micro.epoch, micro.ids_B, options)
        for k, found, wanted in zip(
            micro.ids_B.tolist(), levels(batch.images_BCHW), reference, strict=True
        ):
            assert np.abs(found - wanted).max() < 0.01, list(plain)[k]


def test_whole_odd_images_are_those_that_pil_decodes(odd):
    catalog, samples = odd
    plain = {what: k for what, k in samples.items() if what not in ("huge", "1x1")}
    ids = np.array(list(plain.values()))
    width, height = (int(side[0]) for side in catalog.train.sizes(ids))
    shorter = min(width, height)
    part = replace(catalog, validation=catalog.validation.take(ids))
    size = shorter - 33  # nothing is resized
    options = changed(PLAIN, validation_resize=shorter, image_size=size)
    images, _ = validated(part, options)
    for k, (what, found) in enumerate(zip(plain, levels(images), strict=True)):
        wanted = np.asarray(F.center_crop(picture(part.validation.path(k)), size), np.float64)
        assert np.abs(found - wanted).max() < 0.01, what


@pytest.mark.parametrize("what", ["huge", "1x1"])
def test_the_largest_and_the_smallest_image(odd, what):
    catalog, samples = odd
    ids = np.array([samples[what], samples["grey"]])
    split = catalog.train.take(ids)
    pixel = np.asarray(picture(split.path(0)), np.float64)[0, 0]  # all of it has one colour
    part = replace(catalog, train=split, validation=split)
    for micro, batch in batches(part, PLAIN, plan=Plan(2, 2)):
        row = micro.ids_B.tolist().index(0)
        assert np.abs(levels(batch.images_BCHW)[row] - pixel).max() < 1.01
    images, _ = validated(part)
    assert np.abs(levels(images)[0] - pixel).max() < 1.01


# --- the graph for a GPU -------------------------------------------------------------------------


def nothing_to_read():
    raise StopIteration


def graph(options, **how):
    chosen = {"device_id": None, "largest": (500, 375), "whole": False} | how
    return make_pipeline(nothing_to_read, options, 4, **chosen)


def serialised(options, **how):
    """What can be had without a GPU: construct, check arguments, serialise."""
    return graph(options, **how).serialize()


MIXED = changed(PLAIN, mixed=True, augment="pskd-imagenet", hw_decoder_load=0.8125)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is built where there is a GPU")
@pytest.mark.parametrize("whole", [False, True])
def test_the_mixed_graph_asks_for_a_gpu_and_for_nothing_else(whole):
    with pytest.raises(RuntimeError, match="requires a CUDA-capable GPU"):
        graph(MIXED, whole=whole).build()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_mixed_graph_is_constructed_and_serialised(whole, channels_last, interpolation):
    options = changed(MIXED, channels_last=channels_last, interpolation=interpolation)
    mixed = serialised(options, whole=whole)
    for name in (
        b"hw_decoder_load",
        b"jpeg_fancy_upsampling",
        b"preallocate_width_hint",
        b"preallocate_height_hint",
        b"adjust_orientation",
        b"mixed",
    ):
        assert name in mixed
    assert np.float32(0.8125).tobytes() in mixed
    cpu = serialised(changed(options, mixed=False), whole=whole)
    assert b"hw_decoder_load" not in cpu
    assert b"mixed" not in cpu
    assert (b"decoders__ImageSlice" in mixed) == (b"decoders__ImageSlice" in cpu) == (not whole)


@pytest.mark.parametrize(
    "wrong", [{"hw_decoder_load": "much"}, {"threads": "all"}, {"interpolation": "nearest"}]
)
def test_wrong_arguments_of_the_mixed_graph_are_refused(wrong):
    with pytest.raises((TypeError, KeyError, RuntimeError, ValueError)) as caught:
        serialised(changed(MIXED, **wrong))
    assert "CUDA" not in str(caught.value)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def on_gpu(catalog, options, *, consume=None, epochs=2):
    """(epoch, id) -> image on the host, decoded on the GPU."""
    device = torch.device("cuda", 0)
    walk = Walk(Plan(len(catalog.train), 8), SEED, epochs, 0)
    data = DaliData(catalog, device, SEED, changed(options, mixed=True))
    data.begin(walk, 0, 0)
    kept = []
    for micro in walk.start(0, 0):
        batch = data.train_batch(micro)
        assert batch.images_BCHW.device == device
        assert batch.labels_B.device == device
        assert batch.weight_B.device == device
        assert batch.labels_B.tolist() == catalog.train.labels_N[micro.ids_B].tolist()
        if consume is not None:
            consume()
        kept.append((micro, batch.images_BCHW * 1))  # read on the stream, after what was queued
    data.close()
    return {
        (micro.epoch, sample): image.cpu()
        for micro, images in kept
        for sample, image in zip(micro.ids_B.tolist(), images, strict=True)
    }


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_pixels_decoded_on_a_gpu_are_the_same_in_two_runs(photos, load):
    options = changed(PLAIN, image_size=224, validation_resize=256, hw_decoder_load=load)
    first, second = (on_gpu(photos, options) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["standard", "pskd-imagenet"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_decoded_on_a_gpu_are_near_those_of_the_cpu(photos, augment, channels_last):
    options = changed(
        PLAIN,
        image_size=224,
        validation_resize=256,
        augment=augment,
        channels_last=channels_last,
    )
    found = on_gpu(photos, options)
    for micro, batch in batches(photos, options, plan=Plan(40, 8)):
        for sample, wanted in zip(micro.ids_B.tolist(), batch.images_BCHW, strict=True):
            difference = (found[micro.epoch, sample] - wanted).abs() * 0.225 * 255
            assert difference.mean() < 1


@gpu
@pytest.mark.gpu
def test_a_late_reader_on_the_gpu_reads_its_own_batch(photos):
    options = changed(PLAIN, image_size=224, validation_resize=256, prefetch=1)
    prompt = on_gpu(photos, options)

    def delay():
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms on the stream, the host goes on

    late = on_gpu(photos, options, consume=delay)
    assert all(torch.equal(late[key], prompt[key]) for key in prompt)


@gpu
@pytest.mark.gpu
def test_a_bad_image_met_by_a_gpu_is_substituted(small):
    catalog, _ = small
    options = changed(WHOLE, on_bad_image="substitute", mixed=True)
    damage(Path(catalog.train.path(4)), "half")
    walk = Walk(Plan(24, 8), SEED, 2, 0)
    data = DaliData(catalog, torch.device("cuda", 0), SEED, options)
    data.begin(walk, 0, 0)
    met = []
    for micro in walk.start(0, 0):
        batch = data.train_batch(micro)
        met += [(micro.epoch, micro.ids_B.tolist()[row]) for row in batch.absent]
    assert met == [(0, 4), (1, 4)]


@gpu
@pytest.mark.gpu
def test_validation_on_a_gpu_counts_each_image_once_and_is_near_the_cpu(catalog):
    device = torch.device("cuda", 0)
    found, labels = [], []
    for rank in range(3):
        data = DaliData(catalog, device, SEED, changed(PLAIN, mixed=True))
        for images, some in validation_batches(data, rank, 3, 32):
            found.append(images.cpu())
            labels += some.tolist()
    assert labels == catalog.validation.labels_N.tolist()
    difference = (torch.cat(found) - validated(catalog)[0]).abs() * 0.225 * 255
    assert difference.mean() < 1


# --- what is left behind -------------------------------------------------------------------------


def shared_memory():
    """Files there that this process has mapped."""
    mapped = Path("/proc/self/maps").read_text()
    return sorted(path.name for path in Path("/dev/shm").iterdir() if str(path) in mapped)


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


def settled(wanted, patience_s=10):
    """The number of threads, once those that were asked to end have ended."""
    deadline = time.monotonic() + patience_s
    while threads() > wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads()


def left_after_close(root):
    """In a process of its own: what a close leaves of threads, children and shared memory."""
    catalog = load(root)
    list(batches(catalog, epochs=1))  # what a process starts once stays
    gc.collect()
    before = settled(0, patience_s=2), threading.active_count(), shared_memory()
    options = changed(PLAIN, threads=5, prefetch=3)
    walk = Walk(Plan(105, 24), SEED, 2, 0)
    data = DaliData(catalog, CPU, SEED, options)
    data.begin(walk, 0, 0)
    data.train_batch(next(walk.start(0, 0)))
    begun = threads()
    abandoned = validation_batches(data, 0, 1, 20)
    next(abandoned)
    most = threads()
    abandoned.close()
    data.close()
    after = settled(before[0]), threading.active_count(), shared_memory()
    return before, begun, most, after, psutil.Process().children(recursive=True)


def test_after_close_no_thread_process_or_shared_memory_is_left(catalog):
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        before, begun, most, after, children = alone.apply(
            left_after_close, (catalog.train.index.root.parent,)
        )
    assert begun >= before[0] + 5
    assert most >= begun + 5
    assert after[0] <= before[0]
    assert after[1:] == before[1:]
    assert children == []


@pytest.mark.slow
def test_pipelines_that_failed_leave_no_thread(small):
    catalog, _ = small
    for sample in (4, 11, 17):
        damage(Path(catalog.train.path(sample)), "half")
    list(batches(catalog, PLAIN, plan=Plan(21, 7), epochs=0))
    before = settled(threads())
    for _ in range(3):
        with pytest.raises(PskdError):
            list(batches(catalog, changed(WHOLE, threads=5), plan=Plan(24, 8)))
        gc.collect()  # the exception holds the frames that hold the pipeline
    assert settled(before) <= before
    options = changed(WHOLE, threads=5, on_bad_image="substitute")
    most = absent = 0
    for _, batch in batches(catalog, options, plan=Plan(24, 8), epochs=4):
        absent += len(batch.absent)
        most = max(most, settled(before + 28))
    assert absent == 12
    # A pipeline of 5 decoding threads, and the one of one row that tries single images.
    assert most <= before + 28, "a rebuilt pipeline stands beside the one it replaces"
    assert settled(before) <= before


MEMORY = """
import sys
from pathlib import Path
import psutil
from pskd.data.dali import DaliData
from pskd.data.interface import validation_batches
from pskd.order import Plan, Walk
from tests.reading import changed
from tests.test_dali import CPU, PLAIN, SEED, load
options = changed(PLAIN, image_size=160, validation_resize=160, prefetch=3)
walk = Walk(Plan(40, 10), SEED, 120, 0)
data = DaliData(load(Path(sys.argv[1])), CPU, SEED, options)
data.begin(walk, 0, 0)
for micro in walk.start(0, 0):
    data.train_batch(micro)
    if micro.step == 3:
        for _ in validation_batches(data, 0, 1, 20):
            pass
        print(psutil.Process().memory_info().rss, flush=True)
"""


@pytest.mark.slow
def test_memory_is_flat_over_epochs(photos):
    root = photos.train.index.root.parent
    command = [sys.executable, "-c", MEMORY, str(root)]  # a process whose heap is its own
    said = subprocess.run(
        command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True
    )
    sizes = [int(line) for line in said.stdout.split()]
    assert len(sizes) == 120
    # Buffers grow to the largest windows first. A batch of images kept in each epoch, of the 4 that
    # are trained, would be 3 MiB: 120 MiB from the middle third to the last.
    growth = np.median(sizes[80:]) - np.median(sizes[40:80])
    assert growth < 24 * 2**20, [size >> 20 for size in sizes]
