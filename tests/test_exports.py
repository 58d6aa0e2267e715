"""Weights that a run leaves for plain torch are of the history that its result tells of."""

import shutil
import signal

import pytest

from pskd.weights import read_saved
from tests.forked import ForkedJob
from tests.launches import cut_back, result

EPOCHS = 3
FLAGS = (
    "--recipe=digits-pskd",
    "--run.threads=1",
    "--data.limit=512",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[2]",
    "--checkpoint.every_steps=3",
    "--checkpoint.keep=100",
)
MIDDLE = "000001-00000003"  # within epoch 2


def run(run_dir, *flags):
    job = ForkedJob(run_dir, *FLAGS, *flags, processes=None)
    assert job.wait() == 0, job.output()
    return job.output()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run(run_dir, "--checkpoint.export_every=1")
    return run_dir


def weights(run_dir, which):
    return read_saved(run_dir / "models" / f"checkpoint_{which}.pth")


@pytest.fixture
def gone_back(finished, tmp_path):
    """A copy that goes on within epoch 2, and still has the best weights of a later one."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    cut_back(run_dir, MIDDLE)
    assert weights(run_dir, "best")["epoch"] > 0
    return run_dir


def begin(run_dir):
    """Train to the next checkpoint, and die there; the output."""
    job = ForkedJob(run_dir, *FLAGS, processes=None)
    job.wait_until((run_dir / "checkpoints" / "000001-00000006").exists)
    job.process.send_signal(signal.SIGKILL)
    job.wait()
    return job.output()


def test_the_best_of_an_abandoned_history_is_replaced_by_that_of_this_one(gone_back):
    output = begin(gone_back)
    assert weights(gone_back, "best") | {"net": None} == weights(gone_back, 1) | {"net": None}
    assert "best epoch so far" not in output


def test_where_no_copy_is_left_it_is_removed_and_a_better_one_comes_there(gone_back, finished):
    (gone_back / "models" / "checkpoint_1.pth").unlink()
    output = begin(gone_back)
    assert not (gone_back / "models" / "checkpoint_best.pth").exists()
    assert f"the weights of the best epoch so far, 1, are not in {gone_back}/models" in output
    run(gone_back)
    best = weights(gone_back, "best")
    assert best["weights_sha256"] == weights(finished, "best")["weights_sha256"]
    assert best["epoch"] == result(gone_back)["best"]["epoch"]


def test_results_of_an_abandoned_history_are_gone_as_training_goes_on(gone_back):
    begin(gone_back)
    assert not (gone_back / "result.json").exists()
    assert not (gone_back / "evaluation.npz").exists()


@pytest.mark.parametrize("name", ["", f"checkpoints/{MIDDLE}"])
def test_a_run_that_begins_in_another_has_the_best_of_that(finished, tmp_path, name):
    """It may never get better. MIDDLE: the best so far is in a file of its epoch there."""
    new = tmp_path / "new"
    worse = ("--optimizer.lr=1",) if name else ()
    run(new, *worse, "--resume", finished / name)
    best = result(new)["best"]
    assert best["epoch"] == (0 if name else result(finished)["best"]["epoch"])
    assert weights(new, "best")["epoch"] == best["epoch"]
    source = weights(finished, best["epoch"] + 1)
    assert weights(new, "best")["weights_sha256"] == source["weights_sha256"]
