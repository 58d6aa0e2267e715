"""Bad input and bad luck in real launches: one clear message, non-zero exit, nothing lost."""

import os
import resource
import signal
import time

import pytest
import torch

from tests import forked
from tests.forked import ForkedJob
from tests.launches import ROOT, Job, kill, metrics, processes_of, result, status, train
from tests.refusals import assert_refused
from tests.test_checkpoint import Evil, plant

# One thread: on a busy machine, threads of one process wait for each other most of the time.
LONG = ("--recipe=digits-pskd", "--run.threads=1")
BRIEF = (*LONG, "--train.epochs=2", "--schedule.milestones=[1]")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--recipe=digit-pskd"], ["'digit-pskd'", "did you mean 'digits-pskd'"]),
        (["--recipe=digits-pskd", "--optimizer.lrr=1"], ["optimizer.lrr", "'optimizer.lr'"]),
        (["--recipe=digits-pskd", "--model.name=preact_resnet19"], ["preact_resnet18"]),
        (["--recipe=digits-pskd", "--method.alpha_T=1.2"], ["method.alpha_T is 1.2", "[0, 1]"]),
        (["--PSKD"], ["--method.name pskd"]),
    ],
)
def test_a_bad_command_line_is_refused(tmp_path, flags, parts):
    job = train(tmp_path / "run", *flags, processes=None)
    assert_refused(job, *parts)
    assert not (tmp_path / "run").exists()


def test_two_ranks_refuse_a_bad_command_line_once(tmp_path):
    assert_refused(train(tmp_path / "run", "--recipe=nope"), "--recipe 'nope' is unknown")


def test_the_rank_that_speaks_may_be_the_slowest(tmp_path):
    """A launcher ends all ranks as soon as one has failed."""
    late = tmp_path / "late.py"
    late.write_text(
        "import os, runpy, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "time.sleep(2 * (os.environ['LOCAL_RANK'] == '0'))\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    job = train(tmp_path / "run", "--recipe=nope", program=late)
    assert_refused(job, "--recipe 'nope' is unknown")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--store.encoding=top20"], "store.encoding top20 keeps 20 of 10 classes"),
        (["--engine.channels_last=true", "--deepspeed_config=fp32-zero1"], "channels_last with"),
    ],
)
def test_what_all_ranks_refuse_alike_is_said_once(tmp_path, flags, part):
    assert_refused(forked.train(tmp_path / "run", *BRIEF, *flags), part)


@pytest.mark.parametrize(
    ("model", "reason"),
    [("vit_b_16", "Expected 224 but got 8"), ("alexnet", "Output size is too small")],
)
def test_a_network_that_cannot_take_the_images_is_refused_before_anything_else(
    tmp_path, model, reason
):
    job = forked.train(tmp_path / "run", *BRIEF, f"--model.name={model}")
    named = f"model.name {model} cannot take images of 8x8 pixels ("
    assert_refused(job, named, reason, "another size (data.pad_to)")
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_set_is_refused(tmp_path):
    job = forked.train(tmp_path / "run", *BRIEF, "--train.batch_size=1438", processes=None)
    assert_refused(job, "train.batch_size 1438", "1437 samples")


def test_a_world_that_leaves_a_micro_batch_under_two_is_refused(tmp_path):
    # 1437 = 44 * 32 + 29: the last step has 15 pairs, so 7 micro-batches of 2 ranks fit.
    job = forked.train(tmp_path / "run", *BRIEF, "--train.batch_size=32", "--train.accumulation=8")
    assert_refused(job, "fewer than 2 samples", "at most 1 rank with train.accumulation 8")
    assert not (tmp_path / "run").exists()


def test_a_non_finite_loss_names_epoch_step_and_samples(tmp_path):
    job = forked.train(tmp_path / "run", *BRIEF, "--optimizer.lr=1e20")
    assert_refused(job, "loss is not finite in epoch 1, step", "samples [", run_failed=True)
    assert not metrics(tmp_path / "run")


def test_a_changed_configuration_is_refused_by_name(tmp_path):
    run_dir = tmp_path / "run"
    assert forked.train(run_dir, *BRIEF, processes=None).process.returncode == 0
    again = forked.train(run_dir, *BRIEF, "--method.alpha_T=0.5", "--train.seed=3", processes=None)
    assert_refused(again, "method.alpha_T was 0.8, now 0.5", "train.seed was 0, now 3")
    assert status(run_dir)["state"] == "complete"  # the run itself is as it was
    assert (
        forked.train(run_dir, *BRIEF, "--checkpoint.keep=3", processes=None).process.returncode == 0
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_read_only_directory_is_refused(tmp_path, read_only_directory):
    job = train(read_only_directory / "run", *BRIEF, processes=None, log_dir=tmp_path)
    assert_refused(job, str(read_only_directory / "run"), "Read-only file system", "--run.dir")


def test_a_directory_in_use_is_refused_and_its_owner_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    owner = ForkedJob(run_dir, *LONG, processes=None)
    owner.wait_until(lambda: len(metrics(run_dir)) >= 1)
    second = forked.train(run_dir, *LONG, "--run.lock_wait_s=1", processes=None)
    assert_refused(second, "is in use by process", str(owner.process.pid), "heartbeat")
    assert owner.wait() == 0
    assert status(run_dir)["state"] == "complete"


def test_a_lost_peer_fails_the_run_at_once_and_leaves_no_process(tmp_path):
    run_dir = tmp_path / "run"
    job = Job(run_dir, "--recipe=digits-pskd")
    job.wait_until(lambda: len(metrics(run_dir)) >= 1)
    kill([job.workers()[1]])
    assert job.wait() != 0
    assert status(run_dir)["state"] == "failed"
    assert "lost" in status(run_dir)["reason"]
    assert "lost another rank" in job.output()
    assert not processes_of(run_dir)


@pytest.mark.slow  # under torchrun; of ranks without a launcher: test_survival.py
def test_a_stalled_peer_fails_the_run_after_the_timeout(tmp_path):
    run_dir = tmp_path / "run"
    job = Job(run_dir, "--recipe=digits-pskd", "--run.timeout_s=5", "--run.lock_wait_s=1")
    job.wait_until(lambda: len(metrics(run_dir)) >= 1)
    stalled = job.workers()[1]
    stalled.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 120
    while status(run_dir)["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert status(run_dir)["state"] == "failed"
    stalled.send_signal(signal.SIGKILL)
    assert job.wait() != 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path):
    run_dir = tmp_path / "run"
    assert forked.train(run_dir, *BRIEF, processes=None).process.returncode == 0
    hash_before = result(run_dir)["weights_sha256"]
    state = run_dir / "checkpoints" / (run_dir / "checkpoints/latest").read_text() / "state.pt"
    damaged = bytearray(state.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    state.write_bytes(damaged)
    again = forked.train(run_dir, *BRIEF, processes=None)
    assert again.process.returncode == 0, again.output()
    assert f"{state} is damaged (sha256 differs)" in again.output()
    assert "going back to checkpoint 000001-00000000" in again.output()
    assert result(run_dir)["weights_sha256"] == hash_before


def test_an_empty_status_keeps_no_start_from_going_on(tmp_path):
    run_dir = tmp_path / "run"
    assert forked.train(run_dir, *BRIEF, processes=None).process.returncode == 0
    (run_dir / "status.json").write_text("")
    job = forked.train(run_dir, *BRIEF, processes=None)
    assert job.process.returncode == 0, job.output()
    assert status(run_dir)["state"] == "complete"


def test_a_pickle_in_a_checkpoint_is_never_executed(tmp_path):
    """Whoever can write into a run directory can vouch for a file, but not make it run."""
    run_dir, proof = tmp_path / "run", tmp_path / "executed"
    assert forked.train(run_dir, *BRIEF, processes=None).process.returncode == 0
    name = (run_dir / "checkpoints/latest").read_text()
    plant(run_dir / "checkpoints", name, {"engine": Evil(proof)})
    state = run_dir / "checkpoints" / name / "state.pt"
    taught = (f"--method.teacher={run_dir}/checkpoints/{name}", "--method.name=tfkd_self")
    for path, flags in (
        (run_dir, ()),
        (tmp_path / "new", (*BRIEF, "--resume", run_dir)),
        (tmp_path / "taught", (*BRIEF, *taught)),
    ):
        job = forked.train(path, *flags, processes=None)
        assert_refused(job, str(state), "not executed")
        assert "weights_only" not in job.output(), "torch's own advice would execute it"
        assert not proof.exists()
    torch.load(state, weights_only=False)
    assert proof.exists(), "it was a live one"


@pytest.mark.slow
def test_out_of_memory_names_the_batch_and_the_remedy(tmp_path):
    # 12 GB of address space hold the libraries and the data, not the activations.
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))

    flags = ("--model.name=preact_resnet18", "--data.pad_to=64", "--train.batch_size=1024")
    job = train(tmp_path / "run", *BRIEF, *flags, processes=None, preexec_fn=limit)
    assert_refused(job, "train.batch_size 1024", "train.accumulation 1", "more ranks")


def test_a_changed_deepspeed_file_is_refused_by_setting(tmp_path):
    run_dir, file = tmp_path / "run", tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"stage": 0}}')
    flags = (*BRIEF, f"--deepspeed_config={file}")
    assert forked.train(run_dir, *flags, processes=None).process.returncode == 0
    file.write_text('{"torch_autocast": {"enabled": true, "dtype": "bfloat16"}}')
    assert_refused(
        forked.train(run_dir, *flags, processes=None), "torch_autocast was None", str(run_dir)
    )
