"""`--resume`: another run's checkpoint begins a run of its own, and the other one is left alone.

Jobs are forked from a process that has imported everything: a launch then takes a second or two.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from pskd.store import open_generation
from tests.forked import ForkedJob
from tests.launches import assert_same_result, cut_back, metrics, result, status, train

SAMPLES, EPOCHS = 512, 3
FLAGS = (
    "--recipe=digits-pskd",
    "--run.threads=1",
    f"--data.limit={SAMPLES}",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[2]",
    "--checkpoint.every_steps=3",
)
MIDDLE = "000001-00000003"  # within epoch 1: past predictions are read and written
DEADLINE_S = 120


def slowly(*values):
    """A parameter for the slow part only."""
    return pytest.param(*values, marks=pytest.mark.slow)


class Jobs:
    """Runs `train.py --run.dir RUN FLAGS...` in forked processes."""

    def start(self, run_dir, *flags):
        return ForkedJob(run_dir, *flags, processes=None)

    def run(self, run_dir, *flags):
        """Exit code and output."""
        job = self.start(run_dir, *flags)
        return job.wait(), job.output()

    def complete(self, run_dir, *flags):
        """The output of a run that has to end well."""
        code, output = self.run(run_dir, *flags)
        assert code == 0, output
        assert status(run_dir)["state"] == "complete"
        return output

    def kill_when(self, ready, run_dir, *flags):
        """SIGKILL as soon as `ready()`."""
        job = self.start(run_dir, *flags)
        job.wait_until(ready)
        job.process.send_signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL, job.output()


@pytest.fixture(scope="module")
def jobs():
    return Jobs()


def digest(run_dir):
    """Names and content of all files."""
    total = hashlib.sha256()
    for path in sorted(p for p in run_dir.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(run_dir)} {path.stat().st_size}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run that keeps all of its checkpoints, by an ordinary launch."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    job = train(run_dir, *FLAGS, "--checkpoint.keep=100", processes=None)
    assert job.process.returncode == 0, job.output()
    return run_dir


@pytest.fixture
def source(finished):
    """That run; no test changes a byte of it."""
    before = digest(finished)
    yield finished
    assert digest(finished) == before


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of the run, as if it had ended at MIDDLE."""
    run_dir = shutil.copytree(finished, tmp_path / "stopped")
    cut_back(run_dir, MIDDLE)
    return run_dir


def generations(run_dir):
    """name -> bytes of all rows of the finished generations."""
    return {
        path.parent.name: open_generation(path.parent)[range(SAMPLES)].numpy().tobytes()
        for path in run_dir.glob("store/gen-*/manifest.json")
    }


def assert_same_run(run_dir, reference):
    assert_same_result(run_dir, reference, EPOCHS)
    last = f"gen-{EPOCHS - 1:06d}"
    assert last in generations(run_dir)
    assert generations(run_dir).items() <= generations(reference).items()


def origins(run_dir):
    """Of each start of the run."""
    return [start["origin"] for start in json.loads((run_dir / "env.json").read_text())]


class TestSameSettings:
    @pytest.mark.parametrize("name", [MIDDLE, *map(slowly, ("000000-00000006", "000002-00000000"))])
    def test_from_a_checkpoint_to_the_same_end(self, jobs, tmp_path, source, name):
        checkpoint = source / "checkpoints" / name
        output = jobs.complete(tmp_path / "new", *FLAGS, "--resume", checkpoint)
        assert f"beginning from {checkpoint}\n" in output
        assert_same_run(tmp_path / "new", source)
        assert origins(tmp_path / "new") == [{"checkpoint": str(checkpoint), "changes": []}]
        ours, theirs = (
            json.loads((run / "env.json").read_text())[0]["run"]
            for run in (tmp_path / "new", source)
        )
        assert ours != theirs, "a run of its own"

    def test_from_a_run_means_its_latest_checkpoint(self, jobs, tmp_path, stopped, source):
        before = digest(stopped)
        relative = os.path.relpath(stopped)  # to where the command is given
        jobs.complete(tmp_path / "new", *FLAGS, "--resume", relative)
        assert digest(stopped) == before
        assert_same_run(tmp_path / "new", source)
        recorded = Path(origins(tmp_path / "new")[0]["checkpoint"])
        assert recorded.is_absolute()
        assert recorded.resolve() == stopped / "checkpoints" / MIDDLE

    @pytest.mark.slow
    def test_from_a_complete_run_there_is_nothing_left_to_do(self, jobs, tmp_path, source):
        jobs.complete(tmp_path / "new", *FLAGS, "--resume", source)
        assert_same_run(tmp_path / "new", source)

    @pytest.mark.slow
    def test_from_a_run_that_was_itself_begun_from_another(self, jobs, tmp_path, source):
        first = source / "checkpoints" / "000000-00000006"
        jobs.complete(tmp_path / "a", *FLAGS, "--checkpoint.keep=100", "--resume", first)
        second = tmp_path / "a" / "checkpoints" / MIDDLE
        jobs.complete(tmp_path / "b", *FLAGS, "--resume", second)
        third = tmp_path / "b" / "checkpoints" / "000002-00000006"
        shutil.rmtree(tmp_path / "a")
        jobs.complete(tmp_path / "c", *FLAGS, "--resume", third)
        assert_same_run(tmp_path / "c", source)

    @pytest.mark.slow
    @pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs another file system")
    def test_from_another_file_system_rows_are_copied(self, jobs, tmp_path, source):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
            other = shutil.copytree(source, Path(elsewhere) / "run")
            checkpoint = other / "checkpoints" / MIDDLE
            jobs.kill_when(
                lambda: len(metrics(tmp_path / "new")) == 2,
                tmp_path / "new",
                *FLAGS,
                "--resume",
                checkpoint,
            )
        jobs.complete(tmp_path / "new")
        assert_same_run(tmp_path / "new", source)


class TestKilled:
    def test_neither_needs_the_other_run_any_more(self, jobs, tmp_path, stopped, source):
        """Killed, the other run deleted, started again without a flag."""
        new = tmp_path / "new"
        jobs.kill_when(lambda: len(metrics(new)) >= 2, new, *FLAGS, "--resume", stopped)
        shutil.rmtree(stopped)
        output = jobs.complete(new)
        assert "beginning from" not in output
        assert "resuming" in output
        assert_same_run(new, source)
        assert origins(new)[1:] == [None]

    @pytest.mark.slow
    def test_the_other_run_goes_on_too(self, jobs, tmp_path, stopped, source):
        """Both grow from one checkpoint; their segments have the same names and share bytes."""
        new = tmp_path / "new"
        jobs.kill_when(lambda: len(metrics(new)) >= 2, new, *FLAGS, "--resume", stopped)
        jobs.complete(stopped)
        jobs.complete(new)
        for run_dir in (stopped, new):
            assert_same_run(run_dir, source)

    @pytest.mark.parametrize(
        ("at", "flags"),
        [("store", ()), ("env.json", FLAGS)]
        + [slowly("store", FLAGS), slowly("env.json", ())]
        + [slowly("checkpoints/latest", flags) for flags in ((), FLAGS)],
        ids=["store", "env with flags", "store with flags", "env", "latest", "latest with flags"],
    )
    def test_before_its_first_own_checkpoint(self, jobs, tmp_path, source, at, flags):
        """While it takes the other one's over, or right after; then with or without the flags."""
        new, resume = tmp_path / "new", ("--resume", source / "checkpoints" / MIDDLE)
        jobs.kill_when((new / at).exists, new, *FLAGS, *resume)
        jobs.complete(new, *flags, *(resume if flags else ()))
        assert_same_run(new, source)

    @pytest.mark.slow
    def test_at_random_moments(self, jobs, tmp_path, source):
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        resume = ("--resume", source / "checkpoints" / MIDDLE)
        for number in range(8):
            new = tmp_path / f"new-{number}"
            for _ in range(3):
                job = jobs.start(new, *FLAGS, *resume)
                time.sleep(0.2 + 3 * rng.random())
                job.process.send_signal(signal.SIGKILL)
                job.wait()
            jobs.complete(new, *FLAGS, *resume)
            assert_same_run(new, source)


class TestOtherSettings:
    def test_what_changed_is_warned_about_and_recorded(self, jobs, tmp_path, source):
        new, checkpoint = tmp_path / "new", source / "checkpoints" / MIDDLE
        flags = ("--optimizer.lr=0.05", "--method.alpha_T=0.5", "--store.read=pread")
        output = jobs.complete(new, *FLAGS, *flags, "--resume", checkpoint)
        changes = ["method.alpha_T was 0.8, now 0.5", "optimizer.lr was 0.1, now 0.05"]
        assert f"beginning from {checkpoint} with other settings: {'; '.join(changes)}" in output
        assert origins(new) == [{"checkpoint": str(checkpoint), "changes": changes}]
        assert [line["epoch"] for line in metrics(new)] == [0, 1, 2]
        assert metrics(new)[1]["alpha"] == pytest.approx(0.5 * 2 / 3)
        assert metrics(new)[1]["lr"] == 0.05
        assert result(new)["weights_sha256"] != result(source)["weights_sha256"]
        code, output = jobs.run(new, *FLAGS)
        assert code == 1, "from here on the new run's settings count"
        assert "optimizer.lr was 0.05, now 0.1" in output

    @pytest.mark.slow
    def test_a_longer_run(self, jobs, tmp_path, source):
        new = tmp_path / "new"
        output = jobs.complete(new, *FLAGS, "--train.epochs=4", "--resume", source)
        assert "train.epochs was 3, now 4" in output
        assert [line["epoch"] for line in metrics(new)] == [0, 1, 2, 3]
        assert metrics(new)[3]["alpha"] == pytest.approx(0.8)

    @pytest.mark.slow
    def test_from_baseline_to_pskd_and_back(self, jobs, tmp_path):
        """Without past predictions the first targets are one-hot, and that is said."""
        baseline, pskd, back = tmp_path / "baseline", tmp_path / "pskd", tmp_path / "back"
        as_baseline = ("--recipe=digits-baseline", *FLAGS[1:])
        jobs.complete(baseline, *as_baseline, "--checkpoint.keep=100")
        checkpoint = baseline / "checkpoints" / MIDDLE
        output = jobs.complete(pskd, *FLAGS, "--checkpoint.keep=100", "--resume", checkpoint)
        assert "method.name was baseline, now pskd" in output
        assert f"{checkpoint} has no past predictions: the first targets are one-hot" in output
        first = open_generation(pskd / "store" / "gen-000001")
        assert np.count_nonzero(first.present_N) == SAMPLES - 3 * 64, "of the rest of the epoch"
        output = jobs.complete(back, *as_baseline, "--resume", pskd / "checkpoints" / MIDDLE)
        assert "method.name was pskd, now baseline" in output
        assert not (back / "store").exists()
        assert [line["epoch"] for line in metrics(back)] == [0, 1, 2]
        jobs.complete(back)

    def test_another_precision_is_warned_about_and_recorded(self, jobs, tmp_path, source):
        new, checkpoint = tmp_path / "new", source / "checkpoints" / MIDDLE
        engine = "--engine.deepspeed_config=bf16"
        output = jobs.complete(new, *FLAGS, engine, "--resume", checkpoint)
        assert "with other settings" in output
        assert "bfloat16" in str(origins(new)[0]["changes"])

    def test_within_an_epoch_another_batch_size_is_refused(self, jobs, tmp_path, source):
        """The rest of the epoch would skip some samples, or train some twice."""
        new, flags = tmp_path / "new", ("--train.batch_size=256", "--checkpoint.keep=100")
        code, output = jobs.run(new, *FLAGS, *flags, "--resume", source / "checkpoints" / MIDDLE)
        assert code == 1, output
        assert "train.batch_size" in output.partition("error: ")[2]


class TestRefusals:
    def refusal(self, jobs, run_dir, *flags):
        """What a start that must fail says, in one line and without a traceback."""
        code, output = jobs.run(run_dir, *flags)
        assert code == 1, output
        assert "Traceback" not in output
        (message,) = (line for line in output.splitlines() if "error: " in line)
        assert not (run_dir / "result.json").exists()
        return message.partition("error: ")[2]

    def test_what_is_no_run(self, jobs, tmp_path, source):
        """Each is named, with what to give instead."""
        (tmp_path / "empty").mkdir()
        (tmp_path / "young" / "checkpoints").mkdir(parents=True)
        for name, parts in {
            source / "models" / f"checkpoint_{EPOCHS}.pth": ["is a file", "a run directory or one"],
            tmp_path / "empty": ["neither a run directory nor RUN/checkpoints/NAME"],
            tmp_path / "nowhere": ["neither a run directory nor RUN/checkpoints/NAME"],
            source / "checkpoints": ["neither a run directory nor RUN/checkpoints/NAME"],
            tmp_path / "young": ["has no checkpoint yet"],
        }.items():
            message = self.refusal(jobs, tmp_path / "new", *FLAGS, "--resume", name)
            assert message.startswith(f"run.resume {name}")
            assert all(part in message for part in parts), message
        jobs.complete(tmp_path / "new", *FLAGS, "--resume", source / "checkpoints" / MIDDLE)

    def test_other_samples(self, jobs, tmp_path, source):
        flags = (*FLAGS, "--data.limit=500", "--resume", source / "checkpoints" / MIDDLE)
        assert "trained on other samples" in self.refusal(jobs, tmp_path / "new", *flags)

    def test_another_encoding(self, jobs, tmp_path, source):
        flags = (*FLAGS, "--store.encoding=uint8-log", "--resume", source / "checkpoints" / MIDDLE)
        message = self.refusal(jobs, tmp_path / "new", *flags)
        assert "store.encoding was float16, now uint8-log, and its past predictions" in message
        assert not (tmp_path / "new" / "env.json").exists()

    @pytest.mark.parametrize(
        ("name", "where"),
        [("000001-00000003", "in epoch 2"), (f"{EPOCHS:06d}-00000000", "after epoch 3")],
    )
    def test_a_run_that_ends_before_the_checkpoint(self, jobs, tmp_path, source, name, where):
        checkpoint = source / "checkpoints" / name
        flags = (*FLAGS, "--train.epochs=1", "--schedule.milestones=[]", "--resume", checkpoint)
        message = self.refusal(jobs, tmp_path / "new", *flags)
        assert message.startswith(f"run.resume {checkpoint} lies {where}, and train.epochs is 1")

    def test_weights_to_begin_with(self, jobs, tmp_path, source):
        weights = source / "models" / f"checkpoint_{EPOCHS}.pth"
        flags = (*FLAGS, "--model.init", weights, "--resume", source / "checkpoints" / MIDDLE)
        message = self.refusal(jobs, tmp_path / "new", *flags)
        assert f"model.init was None, now {weights}, but the weights are the" in message
        assert message.endswith("Leave out --model.init, or --resume.")

    def test_other_groups_of_parameters(self, jobs, tmp_path, source):
        """Nothing of the refused start is in the way of what the message says to do."""
        new, checkpoint = tmp_path / "new", source / "checkpoints" / MIDDLE
        flags = (*FLAGS, "--optimizer.decay_norm_and_bias=false")
        message = self.refusal(jobs, new, *flags, "--resume", checkpoint)
        assert message.startswith(
            f"run.resume {checkpoint}: optimizer.decay_norm_and_bias was True, now False"
        )
        assert "instead of --resume, give --model.init a checkpoint" in message
        assert not (new / "checkpoints").exists()
        jobs.complete(new, *flags, f"--model.init={checkpoint}")

    @pytest.mark.parametrize("damage", ["state", "missing segment", "damaged segment"])
    def test_a_damaged_checkpoint(self, jobs, tmp_path, stopped, damage):
        path = stopped / "checkpoints" / MIDDLE / "state.pt"
        if "segment" in damage:
            path = next(stopped.glob("store/gen-000000/*.psk"))
        content = path.read_bytes()
        path.unlink()
        if damage != "missing segment":
            middle = len(content) // 2
            path.write_bytes(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
        message = self.refusal(jobs, tmp_path / "new", *FLAGS, "--resume", stopped)
        named = tmp_path / "new/store" if damage == "damaged segment" else path
        assert str(named) in message

    def test_another_model(self, jobs, tmp_path, source):
        flags = (*FLAGS, "--model.name=preact_resnet18")
        message = self.refusal(
            jobs, tmp_path / "new", *flags, "--resume", source / "checkpoints" / MIDDLE
        )
        assert "model" in message


@pytest.mark.slow
def test_the_shards_of_zero_come_along(tmp_path):
    flags = (*FLAGS, "--engine.deepspeed_config=fp32-zero1", "--checkpoint.keep=100")
    reference = train(tmp_path / "reference", *flags)
    assert reference.process.returncode == 0, reference.output()
    checkpoint = tmp_path / "reference" / "checkpoints" / MIDDLE
    job = train(tmp_path / "new", *flags, "--resume", str(checkpoint))
    assert job.process.returncode == 0, job.output()
    assert_same_run(tmp_path / "new", tmp_path / "reference")
