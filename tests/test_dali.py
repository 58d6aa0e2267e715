"""pskd.data.dali: the right pixels of the right samples, on any world, whatever the files are."""

import gc
import multiprocessing
import os
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
from torchvision.transforms import functional as F

from pskd import draws
from pskd.data import colour
from pskd.data.dali import DaliData
from pskd.data.interface import validation_batches
from pskd.data.views import PEER
from pskd.errors import PskdError
from pskd.order import Plan, Walk
from tests.decoding import (
    CPU,
    PLAIN,
    SEED,
    WHOLE,
    assert_near,
    batches,
    damage,
    digest,
    hashes,
    levels,
    load,
    picture,
    trained_by_pil,
    validated,
    validated_by_pil,
)
from tests.photos import BAD_BODIES, BAD_HEADERS, ODD_NAMES, make_folder, make_nasty
from tests.reading import changed

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
from tests.decoding import CPU, PLAIN, SEED, load
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
