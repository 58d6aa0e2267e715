"""Real launches on a folder of JPEGs: the same bits after any kill, bad images, one index."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist

from pskd import command_line, loading, world
from pskd.checkpoint import Position
from pskd.data.index import NAME, places
from pskd.order import Plan
from pskd.store import open_generation
from tests import forked
from tests.decoding import PLAIN, SEED, batches, damage, load
from tests.forked import ForkedJob
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
from tests.photos import make_folder
from tests.reading import changed
from tests.refusals import assert_refused, refusal
from tests.system import needs_root

EPOCHS = 6
SIZES = ("--data.image_size=32", "--data.validation_resize=36")
FLAGS = (
    "--data.name=imagefolder",
    *SIZES,
    "--data.flip=true",
    "--model.name=preact_resnet8_w16",
    "--method.name=pskd",
    "--train.batch_size=24",
    f"--train.epochs={EPOCHS}",
    f"--train.seed={SEED}",
    "--schedule.milestones=[3]",
    "--checkpoint.every_steps=1",
    "--run.threads=1",
)


def make_splits(root):
    """61 images to train and 15 to validate, of 3 classes."""
    make_folder(root / "train", classes=3, per_class=20, median_side=56)
    extra = root / "train" / "class002" / "a last one.JPEG"
    extra.write_bytes((root / "train/class002/image00000.JPEG").read_bytes())
    make_folder(root / "val", classes=3, per_class=5, median_side=56, seed=1)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("photos"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache directory, for this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def flags_on(root, *more):
    return (*FLAGS, f"--data.root={root}", *more)


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


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    """A world of this process."""
    before = dict(os.environ)
    assert not before.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    yield world.start(60)
    dist.destroy_process_group()
    os.environ.clear()  # it has set a launcher's variables
    os.environ.update(before)


def samples_of(here, *flags):
    return loading.catalog_and_plan(command_line.load([*FLAGS, *flags]), here)


def test_the_samples_of_a_folder_are_as_configured(alone, folder):
    catalog, plan = samples_of(alone, f"--data.root={folder}")
    assert (plan.n, len(catalog.validation), catalog.num_classes) == (61, 15, 3)
    part, plan = samples_of(alone, f"--data.root={folder}", "--data.held_out=10", "--data.limit=30")
    assert (plan.n, len(part.validation), part.num_classes) == (30, 10, 3)
    held = set(part.validation.rows_N.tolist())
    assert not held & set(part.train.rows_N.tolist())
    assert part.fingerprint != catalog.fingerprint
    # Held out by hash of the id: for every limit alike.
    other, _ = samples_of(alone, f"--data.root={folder}", "--data.held_out=10")
    assert set(other.validation.rows_N.tolist()) == held
    assert len(other.train) == 51


def test_a_folder_must_be_named_and_be_there(alone, tmp_path):
    assert "needs --data.root DIR" in refusal(samples_of, alone)
    missing = f"--data.root={tmp_path / 'nowhere'}"
    assert f"data.root {tmp_path / 'nowhere'} holds no train/" in refusal(
        samples_of, alone, missing
    )
    file = tmp_path / "file"
    file.touch()
    assert "holds no train/" in refusal(samples_of, alone, f"--data.root={file}")


def test_a_folder_without_validation_images_is_refused_unless_some_are_held_out(alone, tmp_path):
    make_folder(tmp_path / "train", classes=2, per_class=20, median_side=24)
    root = f"--data.root={tmp_path}"
    text = refusal(samples_of, alone, root)
    assert "no val/" in text
    assert "data.held_out" in text
    _, plan = samples_of(alone, root, "--data.held_out=8")
    assert plan.n == 32
    # The class folders themselves may be the root.
    _, plan = samples_of(alone, f"--data.root={tmp_path / 'train'}", "--data.held_out=8")
    assert plan.n == 32


def test_a_folder_without_classes_is_refused(alone, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    text = refusal(samples_of, alone, f"--data.root={tmp_path}")
    assert str(tmp_path / "train") in text


def test_a_folder_of_one_class_is_refused(alone, tmp_path):
    make_folder(tmp_path / "train", classes=1, per_class=9, median_side=24)
    text = refusal(samples_of, alone, f"--data.root={tmp_path}", "--data.held_out=3")
    assert "has only the class 'class000': there is nothing to tell apart" in text


def test_classes_that_differ_are_named(alone, tmp_path):
    root = make_splits(tmp_path / "photos")
    (root / "val" / "class002").rename(root / "val" / "zebra")
    text = refusal(samples_of, alone, f"--data.root={root}")
    assert "different classes" in text
    assert "zebra" in text
    assert "class002" in text


@pytest.mark.parametrize(
    ("flag", "says"),
    [("held_out=60", "fewer than 2 of 61"), ("limit=62", "exceeds the 61 samples")],
)
def test_too_few_samples_are_refused(alone, folder, flag, says):
    assert says in refusal(samples_of, alone, f"--data.root={folder}", f"--data.{flag}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_mixed_decoding_without_a_gpu_is_refused(alone, folder):
    flags = (f"--data.root={folder}", "--data.decoder=mixed")
    assert "data.decoder mixed decodes on a GPU" in refusal(samples_of, alone, *flags)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data.crop_padding=4"], "data.crop_padding is 4"),
        (["--data.pad_to=40"], "data.pad_to is 40"),
        (["--data.download=true"], "data.download is True"),
        (["--data.validation_resize=31"], "at least data.image_size 32"),
        (["--data.crop_scale=[0, 1]"], "data.crop_scale"),
        (["--data.crop_scale=[0.5, 1.5]"], "data.crop_scale"),
        (["--data.crop_scale=[0.5]"], "data.crop_scale"),
        (["--data.crop_ratio=[2, 1]"], "data.crop_ratio"),
        (["--data.resize_schedule=[[2, 64], [1, 32]]"], "rising epochs"),
        (["--data.resize_schedule=[[0, 64, 1]]"], "data.resize_schedule"),
        (["--data.resize_schedule=[[-1, 64]]"], "data.resize_schedule"),
        (["--data.hw_decoder_load=1.5"], "data.hw_decoder_load"),
        (["--data.prefetch=0"], "data.prefetch is 0"),
        (["--data.threads=-1"], "data.threads is -1"),
        (["--data.interpolation=nearest"], "data.interpolation"),
        (["--data.on_bad_image=skip"], "data.on_bad_image"),
    ],
)
def test_values_that_a_folder_cannot_have_are_refused(flags, says):
    assert says in refusal(command_line.load, [*FLAGS, "--data.root=somewhere", *flags])


@pytest.mark.parametrize(
    "flag",
    [
        "augment=pskd-imagenet",
        "image_size=64",
        "index_path=x",
        "val_index_path=x",
        "resize_schedule=[[0, 8]]",
        "crop_scale=[0.5, 1]",
        "crop_ratio=[0.5, 1]",
        "validation_resize=300",
        "interpolation=cubic",
        "on_bad_image=substitute",
        "decoder=cpu",
        "hw_decoder_load=0.5",
        "threads=2",
        "prefetch=3",
    ],
)
def test_keys_of_folders_are_refused_for_data_in_memory(flag):
    text = refusal(command_line.load, ["--recipe=digits-pskd", f"--data.{flag}"])
    assert f"data.{flag.split('=')[0]}" in text
    assert "only data.name imagefolder" in text


@pytest.mark.slow
def test_two_ranks_refuse_different_classes_once(tmp_path):
    root = make_splits(tmp_path / "photos")
    (root / "val" / "class002").rename(root / "val" / "zebra")
    assert_refused(train(tmp_path / "run", *flags_on(root)), "different classes", "zebra")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_two_ranks_refuse_mixed_decoding_without_a_gpu(folder, tmp_path):
    job = train(tmp_path / "run", *flags_on(folder, "--data.decoder=mixed"))
    assert_refused(job, "data.decoder mixed decodes on a GPU")
    assert not (tmp_path / "run").exists()
