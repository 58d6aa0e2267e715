"""Mixed and erased images and their peers: the same bits on any world, and after a resume."""

import numpy as np
import pytest
import torch
from scipy import stats

from pskd.data import imagefolder
from pskd.data.arrays import ArrayData
from pskd.data.dali import DaliData
from pskd.data.mix import Mixer
from pskd.data.views import SameClass
from pskd.order import Plan, Walk
from tests.mixings import CUTMIX, CUTOUT, MIXUP, NO_ERASING, RANDOM_ERASING, SEED, digits_of
from tests.photos import make_folder
from tests.reading import changed, plain_options

CPU = torch.device("cpu")


# --- the same on any world, and after a resume -------------------------------------------------


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
