"""Killed anywhere and started again at once, a run ends with the same bits."""

import random
import signal
import time

import pytest
import torch

from pskd import models
from pskd.weights import weights_sha256
from tests import forked
from tests.forked import ForkedJob
from tests.launches import (
    Job,
    assert_same_result,
    kill,
    metrics,
    result,
    status,
    train,
    wait_for_no_process,
)

EPOCHS, SAMPLES = 6, 719
FLAGS = (
    "--recipe=digits-pskd",
    "--run.threads=1",
    f"--data.limit={SAMPLES}",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[3, 5]",
    "--checkpoint.every_steps=7",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Results of runs that nobody disturbed, by world size."""
    done = {}

    def of(processes):
        if processes not in done:
            run_dir = tmp_path_factory.mktemp("undisturbed") / f"run-{processes}"
            job = forked.train(run_dir, *FLAGS, processes=processes)
            assert job.process.returncode == 0, job.output()
            done[processes] = run_dir
        return done[processes]

    return of


def assert_same_run(run_dir, reference):
    assert_same_result(run_dir, reference, EPOCHS)
    assert status(run_dir)["state"] == "complete"
    best = torch.load(run_dir / "models" / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == result(run_dir)["best"]["epoch"] == result(reference)["best"]["epoch"]
    last = torch.load(run_dir / "models" / f"checkpoint_{EPOCHS}.pth", weights_only=True)
    model = models.build(last["model"], last["num_classes"])
    model.load_state_dict(last["net"])
    assert weights_sha256(model) == result(run_dir)["weights_sha256"]


def kill_at_random(job, whom, rng, pause_s=0.5):
    """Anywhere from the first epoch to the last but one; nothing of the job may outlive it."""
    job.wait_for_epochs(rng.randrange(EPOCHS - 2))
    job.wait_until(lambda: "training:" in job.output() or "resuming:" in job.output())
    time.sleep(rng.random() * pause_s)
    if whom == "launcher":
        job.process.send_signal(signal.SIGKILL)
    elif whom == "one":
        kill([rng.choice(job.workers())])
    else:
        job.process.send_signal(signal.SIGKILL)
        kill(job.workers())
    assert job.wait() != 0, "it was complete before it could be killed"
    wait_for_no_process(job.run_dir)


@pytest.mark.parametrize(
    ("processes", "whom"),
    [
        (None, "all"),
        pytest.param(1, "launcher", marks=pytest.mark.slow),
        (2, "all"),
        (2, "one"),
        pytest.param(2, "launcher", marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again_ends_with_the_same_bits(tmp_path, undisturbed, processes, whom):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    run_dir = tmp_path / "run"
    start = Job if whom == "launcher" else ForkedJob
    job = start(run_dir, *FLAGS, processes=processes)
    kill_at_random(job, whom, rng)
    if whom == "one":
        assert job.process.returncode != 0
        assert status(run_dir)["state"] == "failed"
    # The run brings its own configuration, once it has one.
    flags = () if (run_dir / "config.yaml").exists() else FLAGS
    again = start(run_dir, *flags, processes=processes)
    assert again.wait() == 0, f"seed {seed}\n{again.output()}"
    assert_same_run(run_dir, undisturbed(processes))
    wait_for_no_process(run_dir)


@pytest.mark.parametrize("delay_s", [0.5, 3.0, 6.0])
def test_a_launcher_killed_while_the_ranks_start_leaves_none(tmp_path, delay_s):
    job = Job(tmp_path / "run", *FLAGS)
    time.sleep(delay_s)  # before, during and after the imports
    job.process.send_signal(signal.SIGKILL)
    job.wait()
    wait_for_no_process(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_many_times_ends_with_the_same_bits(tmp_path, undisturbed, processes):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    run_dir = tmp_path / "run"
    for _ in range(40):
        job = Job(run_dir, *FLAGS, processes=processes)
        time.sleep(5 + 7 * rng.random())  # from the imports to the last epoch
        if job.process.poll() is not None:
            break
        if rng.random() < 0.5:
            kill(rng.sample(job.workers(), 1) if job.workers() else [])
        job.process.send_signal(signal.SIGKILL)
        job.wait()
        wait_for_no_process(run_dir)
    again = train(run_dir, *FLAGS, processes=processes)
    assert again.process.returncode == 0, f"seed {seed}\n{again.output()}"
    assert_same_run(run_dir, undisturbed(processes))


@pytest.mark.parametrize("to", [pytest.param("launcher", marks=pytest.mark.slow), "one worker"])
def test_a_stop_request_is_agreed_saved_and_resumed(tmp_path, undisturbed, to):
    run_dir = tmp_path / "run"
    job = (Job if to == "launcher" else ForkedJob)(run_dir, *FLAGS)
    job.wait_for_epochs(2)
    if to == "launcher":
        job.process.send_signal(signal.SIGTERM)
    else:
        job.workers()[1].send_signal(signal.SIGUSR1)
    assert job.wait() != 0
    assert status(run_dir)["state"] == "stopped", job.output()
    wait_for_no_process(run_dir)
    assert forked.train(run_dir).process.returncode == 0
    assert_same_run(run_dir, undisturbed(2))


def test_a_stop_request_during_the_evaluation_is_noticed_at_the_epochs_end(tmp_path):
    """Not one step into the next epoch, and whichever rank was asked."""
    run_dir = tmp_path / "run"
    job = ForkedJob(run_dir, *FLAGS, "--checkpoint.every_steps=0", "--evaluation.batch_size=1")
    # What the epoch has predicted is closed right before it is evaluated.
    job.wait_until((run_dir / "store/gen-000000/manifest.json").exists)
    job.workers()[1].send_signal(signal.SIGUSR1)
    job.wait()
    now = status(run_dir)
    assert (now["state"], now["epoch"], now["step"]) == ("stopped", 1, 0), job.output()
    assert [line["epoch"] for line in metrics(run_dir)] == [0]
    assert (run_dir / "checkpoints/latest").read_text() == "000001-00000000"


def test_a_stop_request_during_the_last_evaluation_completes_the_run(tmp_path):
    run_dir = tmp_path / "run"
    flags = (*FLAGS, "--train.epochs=1", "--schedule.milestones=[]", "--evaluation.batch_size=1")
    job = ForkedJob(run_dir, *flags, processes=None)
    job.wait_until((run_dir / "store/gen-000000/manifest.json").exists)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 0, job.output()
    assert status(run_dir)["state"] == "complete"


def test_a_stopped_process_exits_with_75(tmp_path):
    run_dir = tmp_path / "run"
    job = ForkedJob(run_dir, *FLAGS, processes=None)
    job.wait_for_epochs(1)
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == 75
    assert "SIGINT" in status(run_dir)["reason"]


ENGINES = [
    pytest.param("bf16", marks=pytest.mark.slow),
    pytest.param("fp16", marks=pytest.mark.slow),
    "fp32-zero1",
    pytest.param("bf16-zero2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_is_killed_and_ends_with_the_same_bits(tmp_path, engine):
    seed = random.randrange(2**32)
    flags = (*FLAGS, "--data.limit=128", "--train.batch_size=16", "--checkpoint.every_steps=3")
    flags += ("--data.held_out=40",)  # half precision is slow on a CPU
    flags += (f"--engine.deepspeed_config={engine}",)
    reference = forked.train(tmp_path / "reference", *flags)
    assert reference.process.returncode == 0, reference.output()
    run_dir = tmp_path / "run"
    job = ForkedJob(run_dir, *flags)
    job.wait_for_epochs(1)  # so that there is a checkpoint to resume
    kill_at_random(job, "all", random.Random(seed), pause_s=0.05)
    again = forked.train(run_dir)
    assert again.process.returncode == 0, f"seed {seed}\n{again.output()}"
    assert "resuming" in again.output()
    assert_same_run(run_dir, tmp_path / "reference")
