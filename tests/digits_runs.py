"""Runs of every method, by ranks that are forked or by torchrun: started, killed, waited for."""

import shutil
import time

import psutil
import torch

from pskd import models
from tests.forked import ForkedJob
from tests.launches import DEADLINE_S, Job, status, wait_for_no_process
from tests.launches import kill as kill_processes

NAME = "preact_resnet8_w16"
EPOCHS = 3
COMMON = (
    "--run.threads=1",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[2]",
    "--train.seed=3",
    "--checkpoint.every_steps=2",
)
DIGITS = ("--recipe=digits-baseline", *COMMON, "--data.limit=253")  # an odd last batch

METHODS = {
    "baseline": (),
    "label_smoothing": ("--method.name=label_smoothing",),
    "cskd": ("--method.name=cskd",),
    # The published weights diverge with ten classes.
    "tfkd_self": ("--method.name=tfkd_self", "--method.multiplier=1"),
    "tfkd_reg": ("--method.name=tfkd_reg",),
    "pskd": ("--method.name=pskd",),
    "pskd by model": ("--method.name=pskd", "--method.teacher=model"),
    "pskd averaged": ("--method.name=pskd", "--method.averaging=0.5"),
}
EMA = ("--model.ema_decay=0.9", "--evaluation.weights=ema")


class ForkedRun(ForkedJob):
    """One job of forked ranks."""

    def processes(self):
        return self.workers()

    def running(self):
        return len(self.workers()) == len(self.process.pids)


class Forks:
    """Starts such jobs."""

    def start(self, run_dir, *flags, ranks=2):
        return ForkedRun(run_dir, *flags, processes=ranks)


class TorchrunRun(Job):
    """The same by torchrun."""

    def processes(self):
        return [psutil.Process(self.process.pid), *self.workers()]

    def running(self):
        return self.process.poll() is None


class Torchrun:
    """Starts such jobs."""

    def start(self, run_dir, *flags, ranks=2):
        return TorchrunRun(run_dir, *map(str, flags), processes=ranks)


def complete(start, run_dir, *flags, ranks=2):
    """The output of a run that has to end well."""
    job = start(run_dir, *flags, ranks=ranks)
    assert job.wait() == 0, job.output()
    assert status(run_dir)["state"] == "complete"
    return job.output()


def refused(start, run_dir, *flags, ranks=2):
    """The one message of a run that has to be refused, or to fail."""
    job = start(run_dir, *flags, ranks=ranks)
    assert job.wait() != 0, job.output()
    output = job.output()
    assert "Traceback" not in output, output
    assert output.count("error: ") == 1, output
    return output.split("error: ")[1]


def latest(run_dir):
    """(epoch, step) of the newest checkpoint, or None."""
    path = run_dir / "checkpoints" / "latest"
    if not path.exists():
        return None
    return tuple(int(part) for part in path.read_text().split("-"))


def kill_in_mid_epoch(start, run_dir, *flags):
    """SIGKILL to all, while the newest checkpoint is one inside an epoch after the first."""

    def there():
        position = latest(run_dir)
        return position is not None and position[0] >= 1 and position[1] > 0

    for _ in range(5):  # a short run may be over before it could be caught
        job = start(run_dir, *flags)
        ranks = None
        deadline = time.monotonic() + DEADLINE_S
        while job.running():
            assert time.monotonic() < deadline, job.output()
            if ranks is None and latest(run_dir) is not None:
                ranks = job.processes()  # takes a while, so before it is urgent
            if ranks is not None and there() and suspended(ranks):
                if there():  # still: nothing moves now
                    kill_processes(ranks)
                    job.wait()
                    wait_for_no_process(run_dir)
                    assert not (run_dir / "result.json").exists()
                    return latest(run_dir)
                for process in ranks:
                    process.resume()
            time.sleep(0.002)
        assert status(run_dir)["state"] == "complete", job.output()
        shutil.rmtree(run_dir)
    raise AssertionError("five runs ended before they could be killed")


def suspended(ranks):
    """Stop them all; whether they were all there."""
    try:
        for process in ranks:
            process.suspend()
    except psutil.NoSuchProcess:
        return False
    return True


def same(one, other):
    """Two states of a checkpoint, to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def last_state(run_dir):
    epoch, step = latest(run_dir)
    path = run_dir / "checkpoints" / f"{epoch:06d}-{step:08d}" / "state.pt"
    return torch.load(path, weights_only=True)


def state_of(name=NAME, classes=10, seed=7):
    torch.manual_seed(seed)
    return models.build(name, classes).state_dict()
