"""The restart loop: it ends with the run, and gives up with the reason where there is no hope."""

import json
import random
import signal
import time

import psutil
import pytest

from tests import forked
from tests.launches import (
    ROOT,
    Job,
    kill,
    metrics,
    processes_of,
    result,
    status,
    train,
    wait_for_no_trace,
)

LOOP = [str(ROOT / "scripts" / "run_until_done.sh")]
FLAGS = (
    "--recipe=digits-pskd",
    "--data.limit=256",
    "--train.batch_size=32",
    "--schedule.milestones=[]",
    "--checkpoint.every_steps=3",
    "--run.threads=1",
)


def starts(run_dir):
    path = run_dir / "env.json"
    return len(json.loads(path.read_text())) if path.exists() else 0


def test_a_bad_flag_is_said_once_and_not_repeated(tmp_path):
    job = train(tmp_path / "run", *FLAGS, "--optimizer.lrr=1", processes=None, prefix=LOOP)
    assert job.process.returncode == 1
    assert job.output().count("error: ") == 1
    assert f"gave up: the command ended with 1 and began no run in {tmp_path}/run" in job.output()


def test_a_command_without_a_run_or_its_directory_is_refused(tmp_path):
    job = train(tmp_path / "run", processes=None, prefix=[*LOOP, "true"], program="x")
    assert job.process.returncode == 1
    assert f"gave up: the command ended with 0 and began no run in {tmp_path}/run" in job.output()
    job = train(tmp_path / "a", processes=None, prefix=["sh", "-c", f"{LOOP[0]} true"])
    assert job.process.returncode == 1
    assert "the command needs --run.dir DIR" in job.output()


def test_a_signal_is_passed_on_and_ends_the_loop(tmp_path):
    run_dir = tmp_path / "run"
    job = Job(run_dir, *FLAGS, "--train.epochs=500", processes=1, prefix=LOOP)
    job.wait_for_epochs(1)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output()
    assert status(run_dir)["state"] == "stopped"
    assert starts(run_dir) == 1
    wait_for_no_trace(run_dir)


@pytest.mark.slow
def test_a_run_that_always_fails_at_one_place_is_given_up_with_the_reason(tmp_path):
    run_dir = tmp_path / "run"
    job = train(run_dir, *FLAGS, "--optimizer.lr=1e20", processes=None, prefix=LOOP)
    assert job.process.returncode == 1
    assert starts(run_dir) == 3
    (last,) = (line for line in job.output().splitlines() if line.startswith("gave up"))
    assert "3 starts in a row brought no checkpoint after 'none'" in last
    assert "failed, the loss is not finite in epoch 1" in last
    wait_for_no_trace(run_dir)


@pytest.mark.slow
def test_a_changed_flag_on_a_run_that_is_there_does_not_loop(tmp_path):
    run_dir = tmp_path / "run"
    flags = (*FLAGS, "--train.epochs=1")
    assert forked.train(run_dir, *flags, processes=1).process.returncode == 0
    job = train(run_dir, *flags, "--train.seed=7", processes=None, prefix=LOOP)
    assert job.process.returncode == 1
    assert "it ended with 1 before it resumed the run" in job.output()
    assert status(run_dir)["state"] == "complete"
    assert starts(run_dir) == 1


@pytest.mark.slow
def test_a_run_that_gives_no_sign_of_life_is_ended_and_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    patience = {"STALE_S": "9", "END_S": "2"}
    flags = (*FLAGS, "--train.epochs=20")
    job = Job(run_dir, *flags, processes=None, prefix=LOOP, env=patience)
    job.wait_for_epochs(1)
    (trainer,) = (p for p in processes_of(run_dir) if "python" in p.name())
    trainer.send_signal(signal.SIGSTOP)
    assert job.wait() == 0, job.output()
    assert "ending the command: the run is running, and its last sign of life" in job.output()
    assert status(run_dir)["state"] == "complete"
    assert starts(run_dir) == 2
    wait_for_no_trace(run_dir)


KILLS = 50


def trains(run_dir, start):
    """Whether this start of the run says of itself that it trains."""
    if not (run_dir / "status.json").exists():
        return False
    now = status(run_dir)
    return (now["start"], now["state"]) == (start, "running")


def victims(run_dir, rng):
    """Of a running job: one of its ranks, all of them, or the launcher."""
    ranks, launchers = [], []
    for process in processes_of(run_dir):
        try:
            if "RANK" in process.environ():
                ranks.append(process)
            elif process.cmdline()[1:3] == ["-m", "torch.distributed.run"]:
                launchers.append(process)
        except psutil.Error:
            continue
    assert (len(ranks), len(launchers)) == (2, 1)
    return rng.choice([[rng.choice(ranks)], ranks, launchers])


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_killed_fifty_times_the_loop_brings_it_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIES", "60")  # some starts do not live until their first checkpoint
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    flags = (*FLAGS, "--train.epochs=200", "--run.timeout_s=60")
    run_dir, reference = tmp_path / "run", tmp_path / "reference"
    job = Job(run_dir, *flags, prefix=LOOP)
    try:
        for number in range(1, KILLS + 1):
            # Its own status says that this start trains, and where.
            job.wait_until(lambda n=number: trains(run_dir, n - 1))
            time.sleep(rng.random())
            assert trains(run_dir, number - 1), f"kill {number} came too late, seed {seed}"
            chosen = victims(run_dir, rng)
            assert all(process.is_running() for process in chosen)
            kill(chosen)
        assert job.process.wait(1800) == 0, f"seed {seed}\n{job.output()}"
    finally:
        job.process.send_signal(signal.SIGTERM)  # else a failed test would leave it at work
    assert starts(run_dir) == KILLS + 1
    undisturbed = forked.train(reference, *flags)
    assert undisturbed.process.returncode == 0, undisturbed.output()
    assert result(run_dir)["weights_sha256"] == result(reference)["weights_sha256"]
    assert [line["nll"] for line in metrics(run_dir)] == [
        line["nll"] for line in metrics(reference)
    ]
    wait_for_no_trace(run_dir)
