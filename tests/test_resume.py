"""Killed anywhere and started again at once, a run ends with the same bits."""

import random
import signal
import time

import pytest

from tests.launches import Job, kill, metrics, result, status, train, wait_for_no_process

EPOCHS = 6
FLAGS = (
    "--recipe=digits-pskd",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[3, 5]",
    "--checkpoint.every_steps=7",
)
MEASURES = ("train_loss", "lr", "alpha", "top1_error", "nll", "ece", "aurc")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Results of runs that nobody disturbed, by world size."""
    done = {}

    def of(processes):
        if processes not in done:
            run_dir = tmp_path_factory.mktemp("undisturbed") / f"run-{processes}"
            job = train(run_dir, *FLAGS, processes=processes)
            assert job.process.returncode == 0, job.output()
            done[processes] = run_dir
        return done[processes]

    return of


def assert_same_run(run_dir, reference):
    assert result(run_dir)["weights_sha256"] == result(reference)["weights_sha256"]
    lines, expected = metrics(run_dir), metrics(reference)
    assert [line["epoch"] for line in lines] == list(range(EPOCHS))
    for line, want in zip(lines, expected, strict=True):
        assert {k: line[k] for k in MEASURES} == {k: want[k] for k in MEASURES}
    assert status(run_dir)["state"] == "complete"


def kill_at_random(job, whom, rng):
    job.wait_for_epochs(rng.randrange(1, EPOCHS - 1))
    time.sleep(rng.random() * 0.5)
    if whom == "launcher":
        job.process.send_signal(signal.SIGKILL)
    elif whom == "one":
        kill([rng.choice(job.workers())])
    else:
        job.process.send_signal(signal.SIGKILL)
        kill(job.workers())
    job.wait()


@pytest.mark.parametrize(
    ("processes", "whom"),
    [(None, "all"), (1, "launcher"), (2, "all"), (2, "one"), (2, "launcher")],
)
def test_killed_and_started_again_ends_with_the_same_bits(tmp_path, undisturbed, processes, whom):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    run_dir = tmp_path / "run"
    job = Job(run_dir, *FLAGS, processes=processes)
    kill_at_random(job, whom, rng)
    if whom == "one":
        assert job.process.returncode != 0
        assert status(run_dir)["state"] == "failed"
    again = train(run_dir, processes=processes)
    assert again.process.returncode == 0, f"seed {seed}\n{again.output()}"
    assert "resuming" in again.output()
    assert_same_run(run_dir, undisturbed(processes))
    wait_for_no_process(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_many_times_ends_with_the_same_bits(tmp_path, undisturbed, processes):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    run_dir = tmp_path / "run"
    for _ in range(8):
        job = Job(run_dir, *FLAGS, processes=processes)
        before = len(metrics(run_dir))
        if before >= EPOCHS - 1:
            break
        job.wait_for_epochs(before + 1)
        kill_at_random(job, rng.choice(["all", "one", "launcher"]), rng)
    again = train(run_dir, *FLAGS, processes=processes)
    assert again.process.returncode == 0, f"seed {seed}\n{again.output()}"
    assert_same_run(run_dir, undisturbed(processes))


@pytest.mark.parametrize("to", ["launcher", "one worker"])
def test_a_stop_request_is_agreed_saved_and_resumed(tmp_path, undisturbed, to):
    run_dir = tmp_path / "run"
    job = Job(run_dir, *FLAGS)
    job.wait_for_epochs(2)
    if to == "launcher":
        job.process.send_signal(signal.SIGTERM)
    else:
        job.workers()[1].send_signal(signal.SIGUSR1)
    assert job.wait() != 0
    assert status(run_dir)["state"] == "stopped", job.output()
    wait_for_no_process(run_dir)
    assert train(run_dir).process.returncode == 0
    assert_same_run(run_dir, undisturbed(2))


def test_a_stopped_process_exits_with_75(tmp_path):
    run_dir = tmp_path / "run"
    job = Job(run_dir, *FLAGS, processes=None)
    job.wait_for_epochs(1)
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 75
    assert "SIGINT" in status(run_dir)["reason"]
