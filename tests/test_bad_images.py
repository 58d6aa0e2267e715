"""pskd.data.dali: images that cannot be decoded, in whatever way and wherever they are met."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pskd.data.dali import DaliData
from pskd.data.interface import validation_batches
from pskd.errors import PskdError
from pskd.order import Plan, Walk
from tests.decoding import (
    CPU,
    DAMAGES,
    GONE,
    PLAIN,
    SEED,
    UNDECODABLE,
    WHOLE,
    batches,
    damage,
    digest,
    hashes,
    levels,
    load,
    place_of,
    sample_at,
)
from tests.launches import ROOT
from tests.photos import BAD_BODIES, BAD_HEADERS, make_folder
from tests.reading import changed


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
        assert batch.bad == ((3,) if rows else ()), "not the sample that it was to be a peer of"
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
