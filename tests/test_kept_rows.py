"""Samples that are mostly another's image, or absent: what the store keeps, and how many may be."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pskd import command_line, deepspeed_config
from pskd.checkpoint import Checkpoints
from pskd.data.arrays import ArrayData
from pskd.data.mix import Mixer, cut_boxes, partners, shares
from pskd.data.sections import MixingSection
from pskd.engine import Engine
from pskd.errors import AgreedError
from pskd.exports import Exports
from pskd.history import History
from pskd.methods import registry
from pskd.order import Plan, Walk, epoch_order
from pskd.run_dir import RunDir
from pskd.saver import Saver
from pskd.sites import Sites
from pskd.store import open_generation
from pskd.store.sections import StoreSection
from pskd.store.store import Store
from pskd.trainer import Trainer
from tests.mixings import NO_ERASING, NO_MIXING, SEED, digits_of

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
        ids = tuple(batch.ids_B[bad].tolist())
        return replace(batch, absent=tuple(bad), bad=ids, weight_B=weight_B)


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
        options=StoreSection("float32"),
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
        exports=Exports(config, Path(path), engine, sites, 10),
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
