"""Mixup, CutMix, Cutout, Random Erasing, peers: the right distribution, the same on any world."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torchvision.transforms import RandomErasing

from pskd import command_line, deepspeed_config
from pskd.checkpoint import Checkpoints
from pskd.data import digits, imagefolder
from pskd.data.arrays import ArrayData
from pskd.data.batch import Batch, Mix
from pskd.data.dali import DaliData
from pskd.data.mix import (
    Mixer,
    cut_boxes,
    cutout_boxes,
    erased_boxes,
    partners,
    shares,
)
from pskd.data.sections import ErasingSection, MixingSection
from pskd.data.views import PEER, SameClass
from pskd.engine import Engine
from pskd.errors import AgreedError
from pskd.history import History
from pskd.methods import registry
from pskd.order import Plan, Walk, epoch_order
from pskd.run_dir import RunDir
from pskd.saver import Saver
from pskd.sites import Sites
from pskd.store import open_generation
from pskd.store.store import Store, StoreOptions
from pskd.trainer import Trainer
from tests.photos import make_folder
from tests.reading import changed, plain_options

CPU = torch.device("cpu")
SEED = 11
IDS = np.arange(20_000)
untimed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
MIXUP, CUTMIX = MixingSection("mixup", 0.4), MixingSection("cutmix", 1.0, 0.9)
CUTOUT, RANDOM_ERASING = (
    ErasingSection("cutout", size=4),
    ErasingSection("random-erasing", probability=0.7),
)
NO_MIXING, NO_ERASING = MixingSection(), ErasingSection()


# --- who mixes with whom --------------------------------------------------------------------


@untimed
@given(count=st.integers(0, 40), data=st.data())
def test_neighbours_are_partners_unless_one_is_absent_or_there_is_none(count, data):
    absent = data.draw(st.sets(st.integers(0, max(count - 1, 0)), max_size=count))
    found = partners(count, tuple(sorted(absent)))
    assert found.dtype == np.int64
    for place in range(count):
        other = place + 1 if place % 2 == 0 else place - 1
        alone = other >= count or bool({place, other} & absent)
        assert found[place] == (place if alone else other)


def random_batch(ids, *, seed=0, size=(8, 8), peers=False, absent=()):
    rng = torch.Generator().manual_seed(seed)
    shape = (len(ids), 3, *size)
    return Batch(
        torch.as_tensor(ids),
        torch.rand(shape, generator=rng) + 1,  # nothing is 0 by itself
        torch.zeros(len(ids), dtype=torch.int64),
        torch.ones(len(ids)),
        torch.rand(shape, generator=rng) + 1 if peers else None,
        absent,
    )


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_an_odd_last_image_and_a_batch_of_one_stay_as_they_are(mixing):
    """A batch of one never comes from a plan (at least two); it is not mixed, and no error."""
    for count in (1, 5):
        batch = random_batch(range(count), peers=True)
        mixed = Mixer(SEED, replace(mixing, probability=1.0), NO_ERASING)(batch, 0)
        assert torch.equal(mixed.images_BCHW[-1], batch.images_BCHW[-1])
        assert torch.equal(mixed.peer_BCHW[-1], batch.peer_BCHW[-1])
        assert mixed.mix.share_B[-1] == 1.0
        assert mixed.mix.partner_B[-1] == count - 1
        assert count - 1 not in mixed.strangers()
        assert not (mixed.images_BCHW[:-1] == batch.images_BCHW[:-1]).all() or count == 1


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_a_pair_of_which_one_is_absent_is_not_mixed(mixing):
    batch = random_batch(range(8), peers=True, absent=(1, 6))
    mixed = Mixer(SEED, replace(mixing, probability=1.0), NO_ERASING)(batch, 0)
    for place in (0, 1, 6, 7):
        assert torch.equal(mixed.images_BCHW[place], batch.images_BCHW[place])
        assert torch.equal(mixed.peer_BCHW[place], batch.peer_BCHW[place])
        assert (mixed.mix.share_B[place], mixed.mix.partner_B[place]) == (1.0, place)
    assert mixed.mix.partner_B[2:6].tolist() == [3, 2, 5, 4]
    assert mixed.strangers() >= {1, 6} and not mixed.strangers() & {0, 7}


def test_strangers_are_the_absent_and_those_who_are_mostly_another():
    batch = random_batch(range(4))
    assert batch.strangers() == set()
    assert replace(batch, absent=(2,)).strangers() == {2}
    mix = Mix(torch.tensor([1, 0, 3, 2]), torch.tensor([0.4, 0.5, 1.0, 1.0]), (0,))
    assert replace(batch, mix=mix).strangers() == {0}
    assert replace(batch, absent=(3,), mix=mix).strangers() == {0, 3}


# --- shares ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 3.0])
def test_the_shares_of_cutmix_are_beta_distributed(alpha):
    share = shares(SEED, 0, IDS, MixingSection("cutmix", alpha))
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_shares_of_mixup_are_those_folded_to_at_least_a_half(alpha):
    share = shares(SEED, 0, IDS, MixingSection("mixup", alpha))
    assert share.min() >= 0.5

    def folded(x):
        return stats.beta(alpha, alpha).cdf(x) - stats.beta(alpha, alpha).cdf(1 - x)

    assert stats.kstest(share, folded).pvalue > 1e-3


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_so_many_images_are_mixed_and_the_others_not_at_all(name, probability):
    share = shares(SEED, 3, IDS, MixingSection(name, 1.0, probability))
    mixed = (share < 1).sum()
    spread = 4 * np.sqrt(len(IDS) * probability * (1 - probability))
    assert abs(mixed - len(IDS) * probability) <= spread
    always = shares(SEED, 3, IDS, MixingSection(name, 1.0))
    np.testing.assert_array_equal(share[share < 1], always[share < 1])


@pytest.mark.parametrize("alpha", [1e-12, 1e-3, 1e3, 1e12])
def test_extreme_alphas_give_shares_and_not_nan(alpha):
    for name in ("mixup", "cutmix"):
        share = shares(SEED, 0, IDS[:2000], MixingSection(name, alpha))
        assert np.isfinite(share).all() and share.min() >= 0 and share.max() <= 1
        middle = abs(share - 0.5)
        assert (middle < 0.1).all() if alpha > 1 else (middle > 0.4).mean() > 0.99


def test_shares_are_drawn_anew_for_each_image_epoch_and_seed():
    mixing = MixingSection("cutmix")
    first = shares(SEED, 0, IDS, mixing)
    for other in (shares(SEED, 1, IDS, mixing), shares(SEED + 1, 0, IDS, mixing)):
        assert (first != other).all()
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / np.sqrt(len(IDS))
    assert abs(np.corrcoef(first[0::2], first[1::2])[0, 1]) < 4 / np.sqrt(len(IDS) / 2)
    np.testing.assert_array_equal(shares(SEED, 0, IDS[::-7], mixing), first[::-7])


# --- boxes ----------------------------------------------------------------------------------

boxes = {"height": st.integers(1, 40), "width": st.integers(1, 40), "seed": st.integers(0, 99)}


def drawn_boxes(kind, seed, height, width):
    ids = IDS[:200]
    share = shares(seed, 0, ids, MixingSection("cutmix"))
    match kind:
        case "cut":
            return cut_boxes(seed, 0, ids, share, height, width)
        case "cutout":
            return cutout_boxes(seed, 0, ids, ErasingSection("cutout", size=16), height, width, "")
    return erased_boxes(seed, 0, ids, ErasingSection("random-erasing"), height, width, "")


@untimed
@given(**boxes, kind=st.sampled_from(["cut", "cutout", "random-erasing"]))
def test_boxes_lie_inside_the_image(height, width, seed, kind):
    top, left, bottom, right = drawn_boxes(kind, seed, height, width).T
    assert ((top >= 0) & (top <= bottom) & (bottom <= height)).all()
    assert ((left >= 0) & (left <= right) & (right <= width)).all()


@untimed
@given(height=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 99))
def test_cutmix_shows_the_partner_in_a_box_and_the_share_counts_its_pixels(height, width, seed):
    batch = random_batch(range(7), seed=seed, size=(height, width))
    mixed = Mixer(seed, MixingSection("cutmix", 1.0), NO_ERASING)(batch, 2)
    partner = batch.images_BCHW[mixed.mix.partner_B]
    for place in range(7):
        image, own = mixed.images_BCHW[place], batch.images_BCHW[place]
        is_own = (image == own).all(dim=0)
        assert torch.equal(image, torch.where(is_own, own, partner[place]))
        share = is_own.sum().item() / (height * width)
        assert mixed.mix.share_B[place].item() == pytest.approx(share, abs=1e-7)
        assert (place in mixed.mix.mostly_other) == (share < 0.5)
        other_y, other_x = torch.nonzero(~is_own, as_tuple=True)
        if len(other_y):  # a full rectangle
            h, w = (int(v.max() - v.min()) + 1 for v in (other_y, other_x))
            assert h * w == len(other_y)


def test_the_box_of_cutmix_has_the_others_share_before_it_is_cut_off():
    """Sides of sqrt(1 - share) of the image's, around a uniform centre (equation 2)."""
    share = shares(SEED, 0, IDS, MixingSection("cutmix"))
    height, width = 60, 100
    top, left, bottom, right = cut_boxes(SEED, 0, IDS, share, height, width).T
    h, w = np.floor(np.sqrt(1 - share) * height), np.floor(np.sqrt(1 - share) * width)
    whole = (top > 0) & (left > 0) & (bottom < height) & (right < width)
    assert 0.1 < whole.mean() < 0.9
    np.testing.assert_array_equal((bottom - top)[whole], h[whole])
    np.testing.assert_array_equal((right - left)[whole], w[whole])
    assert ((bottom - top <= h) & (right - left <= w)).all()
    # Where the centre is: known from the corner that was not cut off.
    y = np.where(top > 0, top + h // 2, bottom - h + h // 2)
    seen = (top > 0) | (bottom < height)
    small = seen & (h < 20)
    assert stats.kstest((y[small] + 0.5) / height, "uniform").pvalue > 1e-3
    # A centre at a border leaves about a quarter to a half: no box is pushed inside.
    assert ((bottom - top)[~whole & (h > 4)] < h[~whole & (h > 4)]).any()


def test_mixup_is_the_weighted_mean_with_the_own_share_first():
    batch = random_batch(range(64), peers=True)
    mixed = Mixer(SEED, MIXUP, NO_ERASING)(batch, 0)
    share = mixed.mix.share_B.double()[:, None, None, None]
    assert mixed.mix.mostly_other == ()
    for before, after in (
        (batch.images_BCHW, mixed.images_BCHW),
        (batch.peer_BCHW, mixed.peer_BCHW),  # alike: by the same partner and share
    ):
        own, other = before.double(), before.double()[mixed.mix.partner_B]
        torch.testing.assert_close(after.double(), share * own + (1 - share) * other)


def test_peers_are_cut_by_the_box_of_their_sample():
    batch = random_batch(range(64), peers=True)
    mixed = Mixer(SEED, CUTMIX, NO_ERASING)(batch, 0)
    inside = (mixed.images_BCHW != batch.images_BCHW).any(dim=1)
    assert torch.equal((mixed.peer_BCHW != batch.peer_BCHW).any(dim=1), inside)
    partner = batch.peer_BCHW[mixed.mix.partner_B]
    expected = torch.where(inside[:, None], partner, batch.peer_BCHW)
    assert torch.equal(mixed.peer_BCHW, expected)


def test_an_image_that_is_not_mixed_keeps_its_bits():
    for name in ("mixup", "cutmix"):
        batch = random_batch(range(200))
        mixed = Mixer(SEED, MixingSection(name, 1.0, 0.5), NO_ERASING)(batch, 0)
        untouched = mixed.mix.share_B == 1
        assert 60 < untouched.sum() < 140
        assert torch.equal(mixed.images_BCHW[untouched], batch.images_BCHW[untouched])


# --- erasing --------------------------------------------------------------------------------


@untimed
@given(seed=st.integers(0, 10**6), size=st.integers(1, 24), erasing=st.sampled_from("cr"))
def test_erased_pixels_are_0_in_one_box_and_the_others_untouched(seed, size, erasing):
    chosen = (
        ErasingSection("cutout", size=size) if erasing == "c" else ErasingSection("random-erasing")
    )
    batch = random_batch(range(6), seed=seed, size=(16, 12))
    erased = Mixer(seed, NO_MIXING, chosen)(batch, 1)
    assert erased.mix is None and erased.strangers() == set()
    for before, after in zip(batch.images_BCHW, erased.images_BCHW, strict=True):
        gone = (after == 0).all(dim=0)
        assert torch.equal(after, torch.where(gone, 0.0, before))
        y, x = torch.nonzero(gone, as_tuple=True)
        if len(y):
            assert (int(y.max() - y.min()) + 1) * (int(x.max() - x.min()) + 1) == len(y)


def test_cutout_is_a_square_around_a_uniform_centre_cut_off_at_the_border():
    top, left, bottom, right = cutout_boxes(
        SEED, 0, IDS, ErasingSection("cutout", size=8), 32, 40, ""
    ).T
    # With an even size every centre gives a different box: [c - 4, c + 4) within the image.
    centre_y = np.where(top > 0, top + 4, bottom - 4)
    centre_x = np.where(left > 0, left + 4, right - 4)
    np.testing.assert_array_equal(bottom, np.minimum(centre_y + 4, 32))
    np.testing.assert_array_equal(right, np.minimum(centre_x + 4, 40))
    for centre, side in ((centre_y, 32), (centre_x, 40)):
        counts = np.bincount(centre, minlength=side)
        assert len(counts) == side
        assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("name", ["cutout", "random-erasing"])
def test_so_many_images_lose_something(name):
    erasing = ErasingSection(name, size=4, probability=0.3)
    find = cutout_boxes if name == "cutout" else erased_boxes
    found = find(SEED, 0, IDS, erasing, 32, 32, "")
    areas = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    spread = 4 * np.sqrt(len(IDS) * 0.3 * 0.7)
    assert abs((areas > 0).sum() - 0.3 * len(IDS)) < spread
    never = find(SEED, 0, IDS[:100], replace(erasing, probability=0.0), 32, 32, "")
    assert ((never[:, 2] - never[:, 0]) * (never[:, 3] - never[:, 1]) == 0).all()


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.02, 1 / 3), (0.3, 3.3)),
        (24, 48, (0.1, 0.9), (0.3, 3.3)),  # many tries do not fit
        (20, 20, (0.3, 1.0), (2.0, 6.0)),  # upright boxes, of which few fit
    ],
)
def test_random_erasing_is_distributed_as_torchvisions(height, width, scale, ratio):
    erasing = ErasingSection("random-erasing", scale=scale, ratio=ratio)
    count = 6000
    ours = erased_boxes(SEED, 0, IDS[:count], erasing, height, width, "")
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    theirs = []
    for _ in range(count):
        y, x, h, w, _ = RandomErasing.get_params(image, scale, list(ratio), [0.0])
        theirs.append((0, 0, 0, 0) if h == height and w == width else (y, x, y + h, x + w))
    theirs = np.array(theirs)

    def features(boxes):
        top, left, bottom, right = boxes.T.astype(float)
        whole = (bottom == top).astype(float)  # nothing was erased
        return {
            "erased": 1 - whole,
            "height": bottom - top,
            "width": right - left,
            "area": (bottom - top) * (right - left),
            "top": top,
            "left": left,
        }

    mine, other = features(ours), features(theirs)
    assert mine["erased"].mean() > 0.1
    for name in mine:
        spread = 4 * np.hypot(mine[name].std(), other[name].std()) / np.sqrt(count)
        assert abs(mine[name].mean() - other[name].mean()) <= spread + 1e-9, name
        if name != "erased":
            assert stats.ks_2samp(mine[name], other[name], method="asymp").pvalue > 1e-3, name


@pytest.mark.parametrize("erasing", [CUTOUT, RANDOM_ERASING], ids=["cutout", "random-erasing"])
def test_each_view_loses_something_else(erasing):
    find = cutout_boxes if erasing.name == "cutout" else erased_boxes
    own, peer = (find(SEED, 0, IDS, erasing, 32, 32, view) for view in ("", PEER))
    assert (own == peer).all(axis=1).mean() < 0.2
    for column in range(4):
        together = np.corrcoef(own[:, column], peer[:, column])[0, 1]
        assert abs(together) < 4 / np.sqrt(len(IDS))


def test_images_are_erased_first_and_then_mixed():
    """A partner's hole comes along, and holes of both are in a mixture."""
    batch = random_batch(range(40), peers=True)
    both = Mixer(SEED, CUTMIX, CUTOUT)(batch, 5)
    erased = Mixer(SEED, NO_MIXING, CUTOUT)(batch, 5)
    expected = Mixer(SEED, CUTMIX, NO_ERASING)(erased, 5)
    assert torch.equal(both.images_BCHW, expected.images_BCHW)
    assert torch.equal(both.peer_BCHW, expected.peer_BCHW)
    assert not torch.equal(erased.images_BCHW == 0, erased.peer_BCHW == 0)


def test_nothing_asked_for_is_nothing_done():
    batch = random_batch(range(6), peers=True)
    assert Mixer(SEED, NO_MIXING, NO_ERASING)(batch, 0) is batch


def test_the_mixer_leaves_its_input_as_it_was():
    """On the CPU the images may lie in DALI's memory, or be read again."""
    batch = random_batch(range(10), peers=True)
    before = batch.images_BCHW.clone(), batch.peer_BCHW.clone()
    for mixing in (MIXUP, CUTMIX):
        Mixer(SEED, mixing, CUTOUT)(batch, 0)
    assert torch.equal(batch.images_BCHW, before[0]) and torch.equal(batch.peer_BCHW, before[1])


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
@pytest.mark.parametrize("erasing", [CUTOUT, RANDOM_ERASING], ids=["cutout", "random-erasing"])
def test_images_in_channels_last_are_mixed_the_same(mixing, erasing):
    batch = random_batch(range(9), size=(12, 10), peers=True)
    last = replace(
        batch,
        images_BCHW=batch.images_BCHW.contiguous(memory_format=torch.channels_last),
        peer_BCHW=batch.peer_BCHW.contiguous(memory_format=torch.channels_last),
    )
    one, other = (Mixer(SEED, mixing, erasing)(b, 1) for b in (batch, last))
    torch.testing.assert_close(one.images_BCHW, other.images_BCHW, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.peer_BCHW, other.peer_BCHW, rtol=1e-6, atol=1e-6)


# --- the same on any world, and after a resume -------------------------------------------------


def digits_of(n):
    catalog = digits.load(None, False)
    return replace(catalog, train=catalog.train.take(np.arange(n)))


def array_data(n, peers=True):
    catalog = digits_of(n)
    peer = SameClass(SEED, catalog.train.labels_N) if peers else None
    return ArrayData(catalog, CPU, SEED, 1, True, peer)


IMAGES = changed(
    plain_options(image_size=24, validation_resize=28, crop_scale=[0.3, 1.0], hw_decoder_load=0.0),
    threads=1,
)


def load_folder(root):
    return imagefolder.load(root, index_path=None, val_index_path=None, held_out=0, limit=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """35 small JPEGs of 5 classes; one folder is both splits."""
    root = tmp_path_factory.mktemp("folder")
    make_folder(root / "train", classes=5, per_class=7, median_side=40)
    (root / "val").symlink_to(root / "train")
    return load_folder(root)


def dali_data(catalog, options=IMAGES):
    return DaliData(catalog, CPU, SEED, options, SameClass(SEED, catalog.train.labels_N))


def seen(make_data, plan, mixer, *, epochs=2, start=(0, 0)):
    """(epoch, id) -> everything a method sees of the sample, over all ranks; each exactly once."""
    plan.check()
    found = {}
    for rank in range(plan.world):
        data = make_data()
        walk = Walk(plan, SEED, epochs, rank)
        data.begin(walk, *start)
        for micro in walk.start(*start):
            batch = mixer(data.train_batch(micro), micro.epoch)
            ids = micro.ids_B
            for place, sample in enumerate(ids.tolist()):
                assert (micro.epoch, sample) not in found
                partner, share = sample, 1.0
                if batch.mix is not None:
                    partner = int(ids[batch.mix.partner_B[place]])
                    share = batch.mix.share_B[place].item()
                found[micro.epoch, sample] = (
                    batch.images_BCHW[place].contiguous().numpy().tobytes(),
                    batch.peer_BCHW[place].contiguous().numpy().tobytes(),
                    batch.labels_B[place].item(),
                    partner,
                    share,
                    place in batch.strangers(),
                )
        data.close()
    return found


WORLDS = [(1, 2), (2, 1), (2, 2), (4, 1)]  # ranks, accumulation
COMBINATIONS = [(MIXUP, CUTOUT), (CUTMIX, RANDOM_ERASING), (CUTMIX, NO_ERASING)]


def name_of(combination):
    return "+".join(part.name for part in combination)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_arrays_are_mixed_to_the_same_bits_on_any_world_and_from_any_step(combination):
    mixer = Mixer(SEED, *combination)
    n, batch = 109, 24  # the last step has 13: an odd one is left over
    alone = seen(lambda: array_data(n), Plan(n, batch), mixer)
    assert len(alone) == 2 * n
    assert sum(partner == key[1] for key, (_, _, _, partner, _, _) in alone.items()) == 2
    for world, accumulation in WORLDS:
        assert seen(lambda: array_data(n), Plan(n, batch, world, accumulation), mixer) == alone
    resumed = seen(lambda: array_data(n), Plan(n, batch, 2), mixer, start=(0, 3))
    assert resumed == {key: alone[key] for key in resumed}
    assert len(resumed) == n + n - 3 * batch


@pytest.mark.parametrize("combination", COMBINATIONS[:2], ids=name_of)
def test_decoded_images_are_mixed_to_the_same_bits_on_any_world_and_from_any_step(
    folder, combination
):
    mixer = Mixer(SEED, *combination)
    n, batch = 35, 12
    alone = seen(lambda: dali_data(folder), Plan(n, batch), mixer)
    assert len(alone) == 2 * n
    for world, accumulation in WORLDS:
        plan = Plan(n, batch, world, accumulation)
        assert seen(lambda: dali_data(folder), plan, mixer) == alone
    resumed = seen(lambda: dali_data(folder), Plan(n, batch, 2), mixer, start=(1, 1))
    assert resumed == {key: alone[key] for key in resumed}
    assert len(resumed) == n - batch


def test_the_threads_of_a_rank_do_not_change_a_bit():
    n = 1024
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            mixer = Mixer(SEED, MIXUP, CUTOUT)
            found.append(seen(lambda: array_data(n), Plan(n, 512), mixer, epochs=1))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_decoded_images_in_channels_last_are_mixed_the_same(folder):
    plan, mixer = Plan(35, 12), Mixer(SEED, CUTMIX, RANDOM_ERASING)
    plain = seen(lambda: dali_data(folder), plan, mixer, epochs=1)
    options = changed(IMAGES, channels_last=True)
    assert seen(lambda: dali_data(folder, options), plan, mixer, epochs=1) == plain


def test_partners_are_neighbours_in_the_global_batch():
    n, batch = 109, 24
    found = seen(lambda: array_data(n), Plan(n, batch, 2), Mixer(SEED, MIXUP, NO_ERASING))
    walk = Walk(Plan(n, batch), SEED, 2, 0)
    for micro in walk.start(0, 0):  # one rank, one micro-batch: the global batch
        ids = micro.ids_B.tolist()
        for place, sample in enumerate(ids):
            other = place ^ 1
            partner = found[micro.epoch, sample][3]
            assert partner == (ids[other] if other < len(ids) else sample)


# --- peers ----------------------------------------------------------------------------------


def test_peers_are_uniform_in_the_class_and_may_be_the_sample_itself():
    labels = np.array([3, 1, 3, 3, 1, 3, 0, 3])  # class 2 has no sample, class 0 one
    choose = SameClass(SEED, labels)
    drawn = np.stack([choose(epoch, np.arange(8)) for epoch in range(6000)])
    assert (labels[drawn] == labels).all()
    assert (drawn[:, 6] == 6).all()  # its own peer
    for sample in range(8):
        mates = np.flatnonzero(labels == labels[sample])
        counts = np.array([(drawn[:, sample] == mate).sum() for mate in mates])
        assert counts.sum() == 6000
        if len(mates) > 1:
            assert stats.chisquare(counts).pvalue > 1e-3
    together = np.corrcoef(drawn[:, 0] == 2, drawn[:, 3] == 2)[0, 1]
    assert abs(together) < 4 / np.sqrt(6000)


def test_a_peer_depends_on_seed_epoch_and_id_alone():
    labels = np.arange(1000) % 7
    choose = SameClass(SEED, labels)
    ids = np.random.default_rng(0).permutation(1000)
    whole = choose(4, ids)
    np.testing.assert_array_equal(SameClass(SEED, labels)(4, ids[100:117]), whole[100:117])
    assert (choose(5, ids) != whole).mean() > 0.9
    assert (SameClass(SEED + 1, labels)(4, ids) != whole).mean() > 0.9


@pytest.mark.parametrize("path", ["arrays", "folder"])
def test_the_image_beside_each_is_its_peers(folder, path):
    """By its pixels: the view that the chosen sample gives as a peer, in both data paths."""
    labels = folder.train.labels_N if path == "folder" else digits_of(35).train.labels_N

    def make(peer):
        if path == "folder":
            return DaliData(folder, CPU, SEED, IMAGES, peer)
        return ArrayData(digits_of(35), CPU, SEED, 1, True, peer)

    def peer_images(peer):
        data, walk = make(peer), Walk(Plan(35, 12), SEED, 2, 0)
        data.begin(walk, 0, 0)
        found = {}
        for micro in walk.start(0, 0):
            batch = data.train_batch(micro)
            for sample, label, image in zip(
                micro.ids_B.tolist(), batch.labels_B.tolist(), batch.peer_BCHW, strict=True
            ):
                assert label == labels[sample]
                found[micro.epoch, sample] = image.contiguous().numpy().tobytes()
        data.close()
        return found

    of_itself = peer_images(lambda _, ids_B: ids_B)
    choose = SameClass(SEED, labels)
    for (epoch, sample), image in peer_images(choose).items():
        (peer,) = choose(epoch, np.array([sample])).tolist()
        assert labels[peer] == labels[sample]
        assert image == of_itself[epoch, peer]
    assert len(set(of_itself.values())) == 70
    data, walk, alike = make(None), Walk(Plan(35, 12), SEED, 2, 0), 0
    data.begin(walk, 0, 0)
    for micro in walk.start(0, 0):
        for sample, image in zip(
            micro.ids_B.tolist(), data.train_batch(micro).images_BCHW, strict=True
        ):
            own = image.contiguous().numpy().tobytes()
            alike += own == of_itself[micro.epoch, sample]
    data.close()
    assert alike < 15  # another cut, or another flip


# --- what the store keeps of mixed and absent samples ----------------------------------------


N = 100
OFTEN_MOSTLY_OTHER = MixingSection("cutmix", 0.1)  # shares near 0 or 1


class Flawed(ArrayData):
    """Some samples cannot be read: they are absent, as an image that DALI cannot decode."""

    unreadable = (5, 17, 40, 41)

    def train_batch(self, micro):
        batch = super().train_batch(micro)
        bad = np.flatnonzero(np.isin(micro.ids_B, self.unreadable)).tolist()
        weight_B = batch.weight_B.clone()
        weight_B[bad] = 0
        return replace(batch, absent=tuple(bad), weight_B=weight_B)


def trainer_of(world, path, mixer, accumulation):
    """PS-KD on the first digits, by a network without BatchNorm; rows are kept exactly."""
    config = command_line.load(["--recipe=digits-pskd", "--train.batch_size=22", "--train.seed=1"])
    catalog = digits_of(N)
    plan = Plan(N, 22, world.size, accumulation)
    plan.check()
    settings = deepspeed_config.complete(
        "fp32", batch=22, world=world.size, accumulation=accumulation, clip_norm=0.0
    )
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    sites = Sites(world, [0] * world.size)
    store = Store(
        Path(path),
        n=N,
        classes=10,
        identity=catalog.fingerprint,
        run="run",
        start=0,
        peers=sites,
        options=StoreOptions("float32"),
        device=world.device,
    )
    engine = Engine(model, config.optimizer, config.engine, settings, world.timeout)
    history = History()
    return Trainer(
        config=config,
        world=world,
        run_dir=RunDir(Path(path)),
        mixer=mixer,
        data=Flawed(catalog, world.device, SEED, 1, False),
        plan=plan,
        num_classes=10,
        engine=engine,
        method=registry.create(config.method, None),
        store=store,
        saver=Saver(config, world, sites, engine, store, Checkpoints(Path(path), 1), history),
        history=history,
        status=None,
    )


def mixed_epochs(world, path, accumulation):
    """Two epochs; the ids that were absent."""
    trainer = trainer_of(world, path, Mixer(1, OFTEN_MOSTLY_OTHER, NO_ERASING), accumulation)
    for epoch in range(2):
        assert trainer.train_epoch(epoch, 0, trainer.method.begin_epoch(epoch, 20))
        trainer.store.begin_epoch(epoch + 1)
    trainer.store.close()
    return sorted(set(trainer.history.absent))


def strangers_of(epoch):
    """Ids of less than half of their image in an epoch, by the documented rule alone."""
    found = set()
    for micro in Walk(Plan(N, 22), 1, epoch + 1, 0).start(epoch, 0):
        ids = micro.ids_B
        absent = np.flatnonzero(np.isin(ids, Flawed.unreadable)).tolist()
        alone = partners(len(ids), tuple(absent)) == np.arange(len(ids))
        share = np.where(alone, 1.0, shares(1, epoch, ids, OFTEN_MOSTLY_OTHER))
        top, left, bottom, right = cut_boxes(1, epoch, ids, share, 8, 8).T
        own = 1 - (bottom - top) * (right - left) / 64
        found |= set(ids[own < 0.5].tolist())
    return found


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 2)])
def test_rows_of_strangers_stay_as_they_were(pool, tmp_path, world, accumulation):
    """Mostly another's image, or absent: no row in the first epoch, the older one afterwards."""
    absent = pool(world).run(mixed_epochs, str(tmp_path), accumulation)
    assert sorted({i for ids in absent for i in ids}) == list(Flawed.unreadable)
    first, second = (strangers_of(epoch) | set(Flawed.unreadable) for epoch in range(2))
    assert len(first) > 10 and len(second - first) > 10 and first & second
    before, after = (open_generation(tmp_path / f"gen-{e:06d}") for e in range(2))
    for sample in range(N):
        if sample in first:
            with pytest.raises(KeyError):
                before[[sample]]
        if sample in first & second:
            with pytest.raises(KeyError):
                after[[sample]]
        elif sample in second:
            np.testing.assert_array_equal(after[[sample]], before[[sample]])
        else:
            row = after[[sample]]
            assert abs(float(row.sum()) - 1) < 1e-5
            if sample not in first:
                assert not np.array_equal(row, before[[sample]])


def all_strangers(world, path):
    """A step of which every sample is a stranger, and then an ordinary one."""
    trainer = trainer_of(world, path, Mixer(0, NO_MIXING, NO_ERASING), 1)
    trainer.store.begin_epoch(0)
    rows_BC = torch.full((4, 10), 0.1)
    trainer._remember(trainer.store, np.array([1, 2, 3, 4]), rows_BC, [0, 1, 2, 3])
    trainer._remember(trainer.store, np.array([6, 7, 8, 9]), rows_BC, [1])
    trainer.store.begin_epoch(1)
    trainer.store.close()


def test_a_step_of_strangers_only_remembers_nothing(pool, tmp_path):
    pool(1).run(all_strangers, str(tmp_path))
    rows = open_generation(tmp_path / "gen-000000")
    assert rows[[6, 8, 9]].shape == (3, 10)
    for sample in (1, 2, 3, 4, 7):
        with pytest.raises(KeyError):
            rows[[sample]]


# --- too many absent samples ------------------------------------------------------------------


def refusal_of_bad_data(world, path, accumulation, bad):
    """What a run says that meets so many bad images, and the samples that were known by then."""
    trainer = trainer_of(world, path, Mixer(0, NO_MIXING, NO_ERASING), accumulation)
    trainer.data.unreadable = bad
    said = None
    try:
        for epoch in range(2):
            trainer.train_epoch(epoch, 0, trainer.method.begin_epoch(epoch, 20))
            trainer.store.begin_epoch(epoch + 1)
            trainer.history.grey = 0
    except AgreedError as error:
        said = str(error)
    trainer.store.close()
    return said


ORDER = epoch_order(1, 0, N).tolist()  # steps of 22 samples


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (ORDER[5:15], None),  # a tenth
        (ORDER[5:9] + ORDER[50:57], "more than 10% of an epoch's images cannot be decoded, up to "
                                    "epoch 1, step 3, the last of them sample "),
        (ORDER[88:100], "none of the 12 images of a step can be decoded, up to epoch 1, step 5"),
    ],
)  # fmt: skip
def test_data_of_which_too_much_is_bad_are_refused_at_the_same_step_by_all(
    pool, tmp_path, bad, says
):
    for world, accumulation in ((1, 1), (2, 2)):
        path = tmp_path / str(world)
        path.mkdir()
        for said in pool(world).run(refusal_of_bad_data, str(path), accumulation, bad):
            assert (said is None) == (says is None), said
            if says is not None:
                assert says in said
                assert "Bring them back and start again" in said
