"""Mixup, CutMix, Cutout, Random Erasing: the right distribution, and what becomes of the images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import RandomErasing

from pskd.data.batch import Batch, Mix
from pskd.data.mix import Mixer, cut_boxes, cutout_boxes, erased_boxes, partners, shares
from pskd.data.sections import ErasingSection, MixingSection
from pskd.data.views import PEER
from tests.mixings import CUTMIX, CUTOUT, MIXUP, NO_ERASING, NO_MIXING, RANDOM_ERASING, SEED

IDS = np.arange(20_000)
untimed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


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
