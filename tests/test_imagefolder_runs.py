"""Real launches on a folder of JPEGs: the same bits after any kill, bad images, one index."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pskd.checkpoint import Position
from pskd.data.index import NAME, places
from pskd.order import Plan
from pskd.store import open_generation
from tests import forked
from tests.decoding import PLAIN, batches, damage, load
from tests.forked import ForkedJob
from tests.imagefolder_jobs import EPOCHS, flags_on, make_splits
from tests.launches import (
    Job,
    assert_same_result,
    kill,
    metrics,
    processes_of,
    result,
    status,
    train,
    wait_for_no_process,
)
from tests.reading import changed
from tests.refusals import assert_refused
from tests.system import needs_root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("photos"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache directory, for this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """A run of two ranks that nobody disturbs; it also builds the index."""
    assert not (folder / "train" / NAME).exists()
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    job = train(run_dir, *flags_on(folder, "--data.threads=1", "--data.prefetch=3"))
    assert job.process.returncode == 0, job.output()
    return job


def abandoned_memory():
    """Files in shared memory that no living process has mapped; other jobs may use theirs.

    Not those of joblib, which keeps some unmapped: training does not use it.
    """
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += maps.read_text()
        except OSError:  # it has ended
            continue
    files = [path for path in Path("/dev/shm").iterdir() if "loky" not in path.name]
    return {path.name for path in files if str(path) not in mapped}


@pytest.fixture
def nothing_left(tmp_path):
    """Afterwards: no process of the run, no file in shared memory."""
    before = abandoned_memory()
    yield
    wait_for_no_process(tmp_path / "run")
    deadline = time.monotonic() + 10
    while left := abandoned_memory() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def position(run_dir):
    """Of the newest checkpoint, or None."""
    latest = run_dir / "checkpoints" / "latest"
    return Position.of(latest.read_text()) if latest.exists() else None


def kill_inside_an_epoch(job, whom="all"):
    """SIGKILL once an epoch has been begun, left and another one begun."""
    job.wait_until(lambda: (at := position(job.run_dir)) is not None and at >= (1, 1))
    victims = job.workers()
    if whom == "launcher":
        victims = []
    elif whom == "one":
        victims = victims[1:]
    else:
        job.process.send_signal(signal.SIGKILL)
    kill(victims)
    if whom == "launcher":
        job.process.send_signal(signal.SIGKILL)
    job.wait()
    wait_for_no_process(job.run_dir)
    assert status(job.run_dir)["state"] != "complete", "too late: it was complete"
    assert len(metrics(job.run_dir)) < EPOCHS


def assert_same_run(run_dir, reference):
    assert_same_result(run_dir, reference, EPOCHS)
    assert result(run_dir)["images_not_decoded"] == result(reference)["images_not_decoded"]
    assert status(run_dir)["state"] == "complete"


def last_rows(run_dir):
    return open_generation(run_dir / "store" / f"gen-{EPOCHS - 1:06d}")


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_builds_the_index_and_trains(undisturbed, folder):
    for split in ("train", "val"):
        assert (folder / split / NAME).is_file()
    assert result(undisturbed.run_dir)["images_not_decoded"] == []
    rows = last_rows(undisturbed.run_dir)[range(61)]
    assert torch.allclose(rows.sum(dim=1), torch.ones(61), atol=1e-3)
    losses = [line["train_loss"] for line in metrics(undisturbed.run_dir)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_killed_inside_an_epoch_it_ends_with_the_same_bits(
    undisturbed, folder, tmp_path, nothing_left
):
    run_dir = tmp_path / "run"
    kill_inside_an_epoch(Job(run_dir, *flags_on(folder, "--data.threads=1", "--data.prefetch=3")))
    # Other threads, and fewer batches ahead.
    again = train(run_dir, "--data.threads=2", "--data.prefetch=1")
    assert again.process.returncode == 0, again.output()
    assert "resuming" in again.output()
    assert "looking at the images" not in again.output()
    assert_same_run(run_dir, undisturbed.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "one"])
def test_whoever_is_killed_nothing_is_left_and_the_bits_are_the_same(
    undisturbed, folder, tmp_path, nothing_left, whom
):
    run_dir = tmp_path / "run"
    kill_inside_an_epoch(Job(run_dir, *flags_on(folder)), whom)
    if whom == "one":
        assert status(run_dir)["state"] == "failed"
    wait_for_no_process(run_dir)
    again = train(run_dir)
    assert again.process.returncode == 0, again.output()
    assert_same_run(run_dir, undisturbed.run_dir)


@pytest.mark.slow
def test_begun_on_two_ranks_and_ended_on_one(folder, tmp_path, nothing_left):
    run_dir = tmp_path / "run"
    job = Job(run_dir, *flags_on(folder))
    job.wait_for_epochs(1)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() != 0
    assert status(run_dir)["state"] == "stopped", job.output()
    wait_for_no_process(run_dir)
    again = train(run_dir, processes=None)
    assert again.process.returncode == 0, again.output()
    assert "world was 2, now 1" in again.output()
    assert [line["epoch"] for line in metrics(run_dir)] == list(range(EPOCHS))
    rows = last_rows(run_dir)[range(61)]
    assert torch.allclose(rows.sum(dim=1), torch.ones(61), atol=1e-3)


@pytest.mark.slow
def test_interrupted_it_stops_and_refuses_to_go_on_with_other_images(tmp_path, nothing_left):
    root, run_dir = make_splits(tmp_path / "photos"), tmp_path / "run"
    job = Job(run_dir, *flags_on(root), processes=None)
    job.wait_for_epochs(1)
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 75, job.output()
    wait_for_no_process(run_dir)
    extra = root / "train" / "class001" / "another.JPEG"
    extra.write_bytes((root / "train/class001/image00001.JPEG").read_bytes())
    refused = train(run_dir, processes=None)
    assert_refused(refused, "the run was trained on other samples", "fingerprint")
    extra.unlink()
    again = train(run_dir, processes=None)
    assert again.process.returncode == 0, again.output()
    assert status(run_dir)["state"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_two_ranks_that_are_asked_to_stop_leave_nothing(folder, tmp_path, nothing_left, how):
    job = Job(tmp_path / "run", *flags_on(folder, "--data.prefetch=4", "--train.epochs=60"))
    job.wait_for_epochs(1)
    job.process.send_signal(how)
    assert job.wait() != 0
    assert status(tmp_path / "run")["state"] == "stopped", job.output()


# --- images that cannot be decoded ---------------------------------------------------------------


def outcomes(catalog, ids):
    """(epoch, id) -> whether the window of that epoch decodes, as this process finds it."""
    found = {}
    plan = Plan(len(catalog.train), 24)
    for micro, batch in batches(
        catalog, changed(PLAIN, on_bad_image="substitute"), plan=plan, epochs=EPOCHS
    ):
        for row, sample in enumerate(micro.ids_B.tolist()):
            if sample in ids:
                found[micro.epoch, sample] = row not in batch.absent
    return found


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A folder, indexed, then damaged: (root, what decodes when)."""
    root = make_splits(tmp_path_factory.mktemp("damaged"))
    catalog = load(root)
    cut, empty = (2, 17, 22, 42, 57), 33  # of 61: not too many
    for sample in cut:
        path = Path(catalog.train.path(sample))
        path.write_bytes(path.read_bytes()[:-200])  # the lower part of the image
    damage(Path(catalog.train.path(empty)), "empty")
    return root, outcomes(catalog, {*cut, empty})


def test_substituted_images_are_named_counted_and_not_remembered(damaged, tmp_path, nothing_left):
    root, decodes = damaged
    flags = flags_on(root, "--data.on_bad_image=substitute", "--checkpoint.keep=40")
    reference = forked.train(tmp_path / "reference", *flags)
    assert reference.process.returncode == 0, reference.output()
    bad = sorted({sample for (_, sample), fine in decodes.items() if not fine})
    assert result(tmp_path / "reference")["images_not_decoded"] == bad
    table = last_rows(tmp_path / "reference")
    carried = 0
    for sample in sorted({sample for _, sample in decodes}):
        when = [epoch for epoch in range(EPOCHS) if decodes[epoch, sample]]
        if not when:
            with pytest.raises(KeyError, match=str(sample)):
                table[[sample]]
            continue
        own = open_generation(tmp_path / "reference" / "store" / f"gen-{when[-1]:06d}")
        assert torch.equal(table[[sample]], own[[sample]])
        carried += when[-1] < EPOCHS - 1
    assert carried > 0  # an older row was carried forward at least once
    assert not all(decodes[epoch, 33] for epoch in range(EPOCHS))
    rest = np.setdiff1d(np.arange(61), bad)
    assert torch.allclose(table[rest].sum(dim=1), torch.ones(len(rest)), atol=1e-3)
    assert "cannot be decoded, in epoch 1, step" in reference.output()
    assert reference.output().count("a grey image of weight 0 takes its place") == sum(
        not fine for fine in decodes.values()
    )


@pytest.mark.slow
def test_killed_and_resumed_the_substitutes_are_the_same(damaged, tmp_path, nothing_left):
    root, _ = damaged
    flags = flags_on(root, "--data.on_bad_image=substitute")
    reference = train(tmp_path / "reference", *flags)
    assert reference.process.returncode == 0, reference.output()
    run_dir = tmp_path / "run"
    kill_inside_an_epoch(Job(run_dir, *flags))
    again = train(run_dir, "--data.threads=2", "--data.prefetch=1")
    assert again.process.returncode == 0, again.output()
    assert_same_run(run_dir, tmp_path / "reference")


def test_a_bad_image_stops_both_ranks_and_is_said_once(tmp_path, nothing_left):
    root, run_dir = make_splits(tmp_path / "photos"), tmp_path / "run"
    catalog = load(root)
    damage(Path(catalog.train.path(33)), "half")
    # About all of each image: so its damage as well, in epoch 0.
    job = train(run_dir, *flags_on(root, "--data.crop_scale=[1, 1]"))
    named = f"image {catalog.train.path(33)} (sample 33) cannot be decoded, in epoch 1, step "
    assert_refused(job, named, "--drop-bad", run_failed=True)
    assert not processes_of(run_dir)


def test_bad_images_are_mended_and_the_run_goes_on_to_the_same_bits(tmp_path, nothing_left):
    root, run_dir = make_splits(tmp_path / "photos"), tmp_path / "run"
    catalog = load(root)
    flags = flags_on(
        root, "--data.crop_scale=[1, 1]", "--train.epochs=2", "--schedule.milestones=[1]"
    )
    reference = forked.train(tmp_path / "reference", *flags, processes=None)
    assert reference.process.returncode == 0, reference.output()
    for path, named in (
        (Path(catalog.train.path(33)), "image {} (sample 33) cannot be decoded, in epoch 1, step"),
        (Path(catalog.validation.path(14)), "validation image {} (sample 14) cannot be decoded"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        job = forked.train(run_dir, *flags, processes=None)
        assert_refused(job, named.format(path), "Mend the file and start again", run_failed=True)
        wait_for_no_process(run_dir)
        path.write_bytes(b"")  # in place or by a new file, before or after: all the same
        path.unlink()
        path.write_bytes(whole)
    again = forked.train(run_dir, *flags, processes=None)
    assert again.process.returncode == 0, again.output()
    assert result(run_dir)["weights_sha256"] == result(reference.run_dir)["weights_sha256"]


@pytest.mark.slow
def test_a_run_that_stopped_at_a_bad_image_goes_on_without_it(tmp_path, nothing_left):
    root, run_dir = make_splits(tmp_path / "photos"), tmp_path / "run"
    catalog = load(root)
    damage(Path(catalog.train.path(33)), "half")
    flags = flags_on(
        root, "--data.crop_scale=[1, 1]", "--train.epochs=2", "--schedule.milestones=[1]"
    )
    job = forked.train(run_dir, *flags, processes=None)
    assert_refused(job, "Or set data.on_bad_image substitute: the run goes on", run_failed=True)
    wait_for_no_process(run_dir)
    again = forked.train(run_dir, *flags, "--data.on_bad_image=substitute", processes=None)
    assert again.process.returncode == 0, again.output()
    assert result(run_dir)["images_not_decoded"] == [33]


@pytest.mark.slow
def test_images_that_go_away_stop_the_run_and_it_goes_on_when_they_are_back(tmp_path, nothing_left):
    root, run_dir = make_splits(tmp_path / "photos"), tmp_path / "run"
    flags = flags_on(root, "--data.on_bad_image=substitute")
    job = ForkedJob(run_dir, *flags)
    job.wait_for_epochs(1)
    (root / "train").rename(root / "away")
    job.wait()
    assert_refused(
        job, "cannot be read: No such file", "mounted?) and start again", run_failed=True
    )
    assert len(metrics(run_dir)) < EPOCHS
    wait_for_no_process(run_dir)
    (root / "away").rename(root / "train")
    again = forked.train(run_dir, *flags)
    assert again.process.returncode == 0, again.output()
    assert result(run_dir)["images_not_decoded"] == []


@pytest.mark.slow
def test_a_bad_validation_image_stops_both_ranks(tmp_path, nothing_left):
    root = make_splits(tmp_path / "photos")
    catalog = load(root)
    damage(Path(catalog.validation.path(14)), "half")
    job = train(tmp_path / "run", *flags_on(root))
    path = catalog.validation.path(14)
    assert_refused(job, f"validation image {path} (sample 14)", run_failed=True)


# --- the index -----------------------------------------------------------------------------------


@needs_root
def test_the_index_of_a_read_only_folder_goes_to_the_cache(tmp_path, cache):
    root = make_splits(tmp_path / "photos")
    subprocess.run(["mount", "--bind", root, root], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", root], check=True)
        flags = ("--data.limit=40", "--data.held_out=12", "--train.epochs=1")
        job = train(
            tmp_path / "run", *flags_on(root, *flags, "--schedule.milestones=[]"), processes=None
        )
        assert job.process.returncode == 0, job.output()
        beside, elsewhere = places(root / "train")
        assert not beside.exists()
        assert elsewhere.is_file()
        assert elsewhere.is_relative_to(cache)
    finally:
        subprocess.run(["umount", root], check=True)
    # 61 images: 12 held out, 40 of the others trained, and the split in val/ not even indexed.
    assert not places(root / "val")[1].exists()
    rows = open_generation(tmp_path / "run" / "store" / "gen-000000")[range(40)]
    assert rows.shape == (40, 3)
    with pytest.raises(KeyError):
        open_generation(tmp_path / "run" / "store" / "gen-000000")[[40]]


LOADER = """
import logging, sys, time
from pathlib import Path
from pskd.data import imagefolder
logging.basicConfig(level="INFO", format="%(message)s")
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
root = Path(sys.argv[1])
catalog = imagefolder.load(root, index_path=None, val_index_path=None, held_out=0, limit=0)
print(catalog.fingerprint, len(catalog.train), len(catalog.validation))
"""


def test_of_many_ranks_one_builds_the_index(tmp_path):
    root, go = make_splits(tmp_path / "photos"), tmp_path / "go"
    command = [sys.executable, "-c", LOADER, str(root), str(go)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, **pipes) for _ in range(4)]
    time.sleep(2)  # let all import; without it the test is weaker, not wrong
    go.touch()
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, said
    assert len({out for out, _ in said}) == 1
    for split in ("train", "val"):
        lines = [e for _, e in said if f"looking at the images of {root / split}" in e]
        assert len(lines) == 1
