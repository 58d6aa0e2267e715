"""Real processes decode a folder together: what each sample looks like does not depend on them."""

import hashlib
from pathlib import Path

import pytest

from pskd import command_line, loading
from pskd.order import Walk
from tests.photos import make_folder

EPOCHS = 2


def seen(world, root, threads, prefetch, epoch, step):
    """(epoch, id) -> hash of what the network would see, for this rank, from a step on."""
    flags = [
        "--data.name=imagefolder",
        f"--data.root={root}",
        "--data.image_size=40",
        "--data.validation_resize=44",
        "--data.flip=true",
        "--data.augment=pskd-imagenet",
        f"--data.threads={threads}",
        f"--data.prefetch={prefetch}",
        "--mixing.name=cutmix",
        "--erasing.name=random-erasing",
        "--train.batch_size=16",
        f"--train.epochs={EPOCHS}",
        "--schedule.milestones=[]",
    ]
    config = command_line.load(flags)
    catalog, plan = loading.catalog_and_plan(config, world)
    data = loading.loader(config, world, catalog, peers=True)
    mix = loading.mixer(config)
    walk = Walk(plan, config.train.seed, EPOCHS, world.rank)
    data.begin(walk, epoch, step)
    found = {}
    for micro in walk.start(epoch, step):
        batch = mix(data.train_batch(micro), micro.epoch)
        for i, sample in enumerate(micro.ids_B.tolist()):
            digest = hashlib.sha256(batch.images_BCHW[i].contiguous().numpy().tobytes())
            digest.update(batch.peer_BCHW[i].contiguous().numpy().tobytes())
            other = int(micro.ids_B[batch.mix.partner_B[i]])
            share = float(batch.mix.share_B[i])
            found[micro.epoch, sample] = (digest.hexdigest(), int(batch.labels_B[i]), other, share)
    data.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    make_folder(root / "train", classes=3, per_class=21, median_side=64)
    make_folder(root / "val", classes=3, per_class=2, median_side=64, seed=1)
    return root


def together(pool, ranks, *arguments):
    """Of all ranks: each sample of each epoch was seen by one of them."""
    parts = pool(ranks).run(seen, *arguments)
    merged = {key: value for part in parts for key, value in part.items()}
    assert len(merged) == sum(len(part) for part in parts)
    return merged


def test_images_peers_and_mixtures_are_the_same_on_1_2_and_4_ranks(pool, folder):
    """With other threads and depths of prefetching, to the bit."""
    alone = together(pool, 1, folder, 2, 2, 0, 0)
    assert sorted(alone) == [(e, i) for e in range(EPOCHS) for i in range(63)]
    assert len({digest for digest, *_ in alone.values()}) == len(alone)
    assert together(pool, 2, folder, 1, 3, 0, 0) == alone
    assert together(pool, 4, folder, 1, 1, 0, 0) == alone


def test_after_a_resume_on_other_ranks_the_rest_is_the_same(pool, folder):
    alone = together(pool, 1, folder, 1, 2, 0, 0)
    rest = together(pool, 2, folder, 2, 1, 1, 2)
    assert len(rest) == 63 - 2 * 16
    assert rest == {key: alone[key] for key in rest}
    assert Path(folder, "train", ".pskd-index").exists()
