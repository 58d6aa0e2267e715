"""Whole runs of every method with mixing: killed in mid-epoch and resumed, on both data paths.

Most runs here are of two ranks forked from one process that has imported everything, with the
variables that torchrun sets: a launch in a second. Those under "torchrun" are launched by it.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from pskd import command_line
from pskd.errors import PskdError
from pskd.order import Plan
from pskd.store import open_generation
from tests.digits_runs import (
    COMMON,
    DIGITS,
    EMA,
    EPOCHS,
    METHODS,
    Torchrun,
    complete,
    kill_in_mid_epoch,
    last_state,
    refused,
    same,
    state_of,
)
from tests.launches import metrics, result
from tests.photos import make_folder

FOLDER = (  # of 45 images: an odd last batch too
    "--recipe=digits-baseline",
    *COMMON,
    "--data.name=imagefolder",
    "--data.crop_padding=0",
    "--data.image_size=32",
    "--data.validation_resize=36",
    "--data.flip=true",
    "--data.threads=1",
    "--train.batch_size=8",
    "--optimizer.lr=0.05",
)

MIXINGS = {
    "none": (),
    "mixup": ("--mixing.name=mixup", "--mixing.alpha=0.4"),
    "cutmix": ("--mixing.name=cutmix", "--mixing.probability=0.8"),
}
ERASINGS = {
    "nothing": (),
    "cutout": ("--erasing.name=cutout", "--erasing.size=3"),
    "random-erasing": ("--erasing.name=random-erasing", "--erasing.probability=0.5"),
}


# --- teachers, folders -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Weights that differ from the student's; of ten classes."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(state_of(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """45 small JPEGs of 5 classes to train, 20 to validate."""
    root = tmp_path_factory.mktemp("photos")
    make_folder(root / "train", classes=5, per_class=9, median_side=40)
    make_folder(root / "val", classes=5, per_class=4, median_side=40, seed=1)
    return root


def flags_of(method, mixing, erasing, teacher, base=DIGITS):
    flags = (*base, *METHODS[method], *MIXINGS[mixing], *ERASINGS[erasing])
    return (*flags, f"--method.teacher={teacher}") if method == "tfkd_self" else flags


def slowly(*values):
    """A parameter for the slow part only."""
    return pytest.param(*values, marks=pytest.mark.slow)


# --- killed in mid-epoch, and resumed ----------------------------------------------------------


TIMES = {"images_per_s", "train_s", "data_wait_s", "store_wait_s"}


def assert_same_run(run_dir, reference):
    """Weights, their average, the method's state, measures and remembered rows: to the bit."""
    assert result(run_dir)["weights_sha256"] == result(reference)["weights_sha256"]
    one, other = last_state(run_dir), last_state(reference)
    assert same(one["engine"], other["engine"])
    assert same(one["method"], other["method"])
    lines, expected = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(path)]
        for path in (run_dir, reference)
    )
    assert lines == expected and len(lines) == EPOCHS
    name = f"gen-{EPOCHS - 1:06d}"
    assert (run_dir / "store").exists() == (reference / "store").exists()
    if (run_dir / "store").exists():
        mine, theirs = (open_generation(path / "store" / name) for path in (run_dir, reference))
        seen = np.flatnonzero(theirs.present_N)
        np.testing.assert_array_equal(seen, np.flatnonzero(mine.present_N))
        np.testing.assert_array_equal(mine[seen], theirs[seen])


def assert_survives_a_kill(start, tmp_path, flags):
    complete(start, tmp_path / "reference", *flags)
    run_dir = tmp_path / "run"
    position = kill_in_mid_epoch(start, run_dir, *flags)
    output = complete(start, run_dir)  # it brings its own configuration
    assert "resuming" in output
    assert position[1] > 0
    assert_same_run(run_dir, tmp_path / "reference")
    assert all(math.isfinite(line["train_loss"]) for line in metrics(run_dir))


@pytest.mark.parametrize(
    ("method", "mixing", "erasing", "more"),
    [
        ("cskd", "mixup", "cutout", ("--train.accumulation=2",)),
        ("pskd averaged", "cutmix", "random-erasing", ()),
        slowly("pskd by model", "none", "nothing", EMA),
        slowly("tfkd_self", "mixup", "nothing", ()),
        slowly("cskd", "cutmix", "random-erasing", ("--train.accumulation=2",)),
        slowly("pskd by model", "cutmix", "cutout", ("--method.schedule=cosine",)),
        slowly("pskd", "mixup", "random-erasing", ("--method.schedule=constant",)),
        slowly("tfkd_reg", "cutmix", "cutout", ()),
        slowly("label_smoothing", "mixup", "random-erasing", EMA),
    ],
)
def test_killed_in_mid_epoch_and_resumed_it_ends_with_the_same_bits(
    forks, tmp_path, teacher, method, mixing, erasing, more
):
    flags = (*flags_of(method, mixing, erasing, teacher), *more)
    assert_survives_a_kill(forks.start, tmp_path, flags)


@pytest.mark.parametrize(
    ("method", "mixing", "erasing"),
    [("cskd", "cutmix", "random-erasing"), slowly("pskd averaged", "mixup", "cutout")],
)
def test_a_run_on_jpegs_killed_in_mid_epoch_ends_with_the_same_bits(
    forks, tmp_path, photos, method, mixing, erasing
):
    flags = (*flags_of(method, mixing, erasing, None, FOLDER), f"--data.root={photos}")
    assert_survives_a_kill(forks.start, tmp_path, flags)


@pytest.mark.slow
def test_by_torchrun_too(tmp_path):
    """The same as above, by the launcher that people use."""
    flags = (*flags_of("cskd", "mixup", "cutout", None), *EMA)
    assert_survives_a_kill(Torchrun().start, tmp_path, flags)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("mixing", "erasing"), [("mixup", "cutout"), ("cutmix", "random-erasing")])
def test_by_torchrun_every_method_and_mixing(tmp_path, teacher, method, mixing, erasing):
    flags = flags_of(method, mixing, erasing, teacher)
    assert_survives_a_kill(Torchrun().start, tmp_path, flags)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("mixing", "erasing"), [("mixup", "random-erasing"), ("cutmix", "cutout")])
def test_every_method_and_mixing_on_jpegs(forks, tmp_path, photos, method, mixing, erasing):
    path = tmp_path / "teacher.pth"
    torch.save(state_of(classes=5), path)
    flags = (*flags_of(method, mixing, erasing, path, FOLDER), f"--data.root={photos}")
    assert_survives_a_kill(forks.start, tmp_path, flags)


def test_a_class_of_one_sample_is_its_own_peer_and_trains(forks, tmp_path):
    root = tmp_path / "photos"
    make_folder(root / "train", classes=4, per_class=5, median_side=40)
    for file in sorted((root / "train" / "class001").iterdir())[1:]:
        file.unlink()
    (root / "val").symlink_to(root / "train")
    flags = (*FOLDER, "--train.batch_size=4", f"--data.root={root}", *METHODS["cskd"])
    complete(forks.start, tmp_path / "run", *flags)
    assert all(math.isfinite(line["train_loss"]) for line in metrics(tmp_path / "run"))


# --- the learning rate that grows with the batch -----------------------------------------------


@pytest.mark.slow
def test_a_rate_that_is_meant_for_another_batch_grows_with_the_batch(forks, tmp_path):
    flags = (*DIGITS, "--train.epochs=1", "--schedule.milestones=[]")
    complete(forks.start, tmp_path / "a", *flags, "--optimizer.lr=0.2")
    meant = ("--optimizer.lr=0.1", "--optimizer.lr_for_batch=32")
    complete(forks.start, tmp_path / "b", *flags, *meant)
    assert metrics(tmp_path / "a")[0]["lr"] == metrics(tmp_path / "b")[0]["lr"] == 0.2
    one, other = (result(tmp_path / name)["weights_sha256"] for name in "ab")
    assert one == other


@pytest.mark.parametrize(
    ("lr", "meant_for", "batch", "expected"),
    [(0.1, 256, 1024, 0.4), (0.1, 256, 64, 0.025), (0.1, 128, 128, 0.1), (0.1, 0, 64, 0.1)],
)
def test_the_peak_rate_is_in_proportion_to_the_batch(lr, meant_for, batch, expected):
    config = command_line.load(["--recipe=digits-baseline"])
    config = replace(
        config,
        optimizer=replace(config.optimizer, lr=lr, lr_for_batch=meant_for),
        train=replace(config.train, batch_size=batch),
    )
    assert config.peak_lr == pytest.approx(expected, rel=1e-15)


def test_without_it_the_rate_is_exactly_the_one_given():
    config = command_line.load(["--recipe=digits-baseline"])
    for lr in (0.1, 0.05, 0.2, 0.03, 0.07):
        for batch in range(2, 2049):
            changed = replace(
                config,
                optimizer=replace(config.optimizer, lr=lr),
                train=replace(config.train, batch_size=batch),
            )
            assert changed.peak_lr == lr, batch


# --- refusals ------------------------------------------------------------------------------------


def test_sync_batchnorm_needs_gpus(forks, tmp_path):
    message = refused(forks.start, tmp_path / "run", *DIGITS, "--model.sync_batchnorm=true")
    assert message.startswith("model.sync_batchnorm true works on GPUs only")


def test_a_micro_batch_of_one_is_refused_by_the_plan(forks, tmp_path):
    flags = (*DIGITS, "--train.batch_size=2", *MIXINGS["mixup"])
    message = refused(forks.start, tmp_path / "run", *flags)
    assert "a micro-batch of fewer than 2 samples" in message


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--mixing.name=mixup", "--mixing.alpha=0"], "mixing.alpha"),
        (["--mixing.name=mixup", "--mixing.alpha=-1"], "mixing.alpha"),
        (["--mixing.name=mixup", "--mixing.alpha=nan"], "mixing.alpha"),
        (["--mixing.name=cutmix", "--mixing.alpha=inf"], "mixing.alpha"),
        (["--mixing.probability=1.5"], "mixing.probability"),
        (["--mixing.probability=-0.1"], "mixing.probability"),
        (["--mixing.name=cutmixup"], "mixing.name"),
        (["--erasing.name=cutout", "--erasing.size=0"], "erasing.size"),
        (["--erasing.probability=2"], "erasing.probability"),
        (["--erasing.scale=[0.5, 0.2]"], "erasing.scale"),
        (["--erasing.scale=[0.5, 1.2]"], "erasing.scale"),
        (["--erasing.scale=[0, 0.2]"], "erasing.scale"),
        (["--erasing.scale=[0.2]"], "erasing.scale"),
        (["--erasing.ratio=[-1, 2]"], "erasing.ratio"),
        (["--erasing.ratio=[.nan, 2]"], "erasing.ratio"),
        (["--evaluation.weights=ema"], "evaluation.weights"),
        (["--model.ema_decay=1"], "model.ema_decay"),
        (["--optimizer.lr_for_batch=-1"], "optimizer.lr_for_batch"),
        (["--method.name=tfkd_self"], "method.teacher"),
        (["--method.name=tfkd_self", "--method.teacher=x", "--method.alpha=2"], "method.alpha"),
        (["--method.name=tfkd_reg", "--method.kl_reduction=sum"], "method.kl_reduction"),
        (["--method.name=tfkd_reg", "--method.temperature=0"], "method.temperature"),
        (["--method.name=cskd", "--method.weight=-1"], "method.weight"),
        (["--method.name=label_smoothing", "--method.eps=1"], "method.eps"),
        (["--method.name=pskd", "--method.averaging=1"], "method.averaging"),
        (
            ["--method.name=pskd", "--method.teacher=model", "--method.averaging=0.5"],
            "method.averaging",
        ),
        (["--train.batch_size=1"], "train.batch_size"),
    ],
)
def test_impossible_values_are_refused_by_their_key(flags, key):
    with pytest.raises(PskdError) as caught:
        command_line.load(["--recipe=digits-baseline", *flags])
    assert key in str(caught.value)


def test_a_ratio_that_is_not_finite_is_refused():
    with pytest.raises(PskdError, match=r"erasing\.ratio"):
        command_line.load(["--recipe=digits-baseline", "--erasing.ratio=[0.3, .inf]"])


# --- a new run from the checkpoint of another method ----------------------------------------------


@pytest.fixture(scope="module")
def baseline(forks, tmp_path_factory):
    """Of which the checkpoint after the first epoch is there."""
    run_dir = tmp_path_factory.mktemp("baseline") / "run"
    complete(forks.start, run_dir, *DIGITS, "--checkpoint.keep=100")
    return run_dir / "checkpoints" / "000001-00000000"


@pytest.mark.parametrize(
    "method",
    [slowly("label_smoothing"), slowly("cskd"), slowly("tfkd_reg"), slowly("pskd averaged")],
)
def test_a_run_of_another_method_begins_from_a_baseline(forks, tmp_path, baseline, method):
    flags = flags_of(method, "mixup", "nothing", None)
    output = complete(forks.start, tmp_path / "run", *flags, "--resume", baseline)
    assert "method.name was baseline, now" in output


@pytest.mark.parametrize("method", ["tfkd_self", "pskd by model"])
def test_a_run_with_a_teacher_begins_from_a_baseline(forks, tmp_path, baseline, teacher, method):
    flags = flags_of(method, "none", "nothing", teacher)
    output = complete(forks.start, tmp_path / "run", *flags, "--resume", baseline)
    assert "method.name was baseline, now" in output


def test_a_new_run_may_have_another_teacher(forks, tmp_path, teacher):
    flags = (*DIGITS, *METHODS["tfkd_self"], "--train.epochs=2")
    complete(forks.start, tmp_path / "old", *flags, f"--method.teacher={teacher}")
    torch.save(state_of(seed=8), tmp_path / "other.pth")
    old = tmp_path / "old" / "checkpoints" / "000001-00000002"
    flags = (*flags, f"--method.teacher={tmp_path / 'other.pth'}", "--resume", old)
    complete(forks.start, tmp_path / "new", *flags)


@pytest.mark.slow
def test_an_average_may_begin_in_a_new_run(forks, tmp_path, baseline):
    """From the weights that the other run had."""
    complete(forks.start, tmp_path / "run", *DIGITS, *EMA, "--resume", baseline)
    engine = last_state(tmp_path / "run")["engine"]
    assert engine["average"] is not None
    weights = torch.load(baseline / "state.pt", weights_only=True)["engine"]["model"]
    name = next(iter(weights))
    assert not torch.equal(engine["average"][name], weights[name])
    assert not torch.equal(engine["average"][name], engine["model"][name])


def test_the_smallest_plan_has_pairs():
    """So mixing never meets a batch of one in a run."""
    with pytest.raises(PskdError, match="fewer than 2 samples"):
        Plan(9, 4, 1).check()
    Plan(10, 4, 1).check()
