"""`pskd health`: what a run's status says to those who watch it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import Tensor, nn

from pskd import entry, run_status
from pskd.cli import main
from pskd.health import STALE_S
from pskd.models import MODELS
from pskd.run_dir import RunDir
from pskd.run_status import Status, fail
from tests.launches import ROOT
from tests.system import processes


@pytest.fixture
def run(tmp_path):
    """Owned by this process, so that the directory is there."""
    run = RunDir(tmp_path / "run")
    run.acquire(0)
    return run


def age(run, seconds):
    """As if it had been written so long ago."""
    run.write_json(
        "status.json", {**run.read_json("status.json"), "heartbeat": time.time() - seconds}
    )


@pytest.mark.parametrize("state", ["stopped", "complete"])
def test_a_run_that_has_ended_well_is_well_for_ever(run, capsys, state):
    Status(run.path, epochs=2, start=0).write(state, None, 2, 0)
    age(run, 1e6)
    assert main(["health", str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path}: {state}\n"


def test_no_run_yet_is_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PSKD_RUN_DIR", str(tmp_path / "none"))
    assert main(["health"]) == 0
    assert "no run has begun" in capsys.readouterr().out


def test_a_running_run_is_well_as_long_as_its_heart_beats(run, capsys):
    Status(run.path, epochs=2, start=0).beat(1, 3)
    assert main(["health", str(run.path)]) == 0
    assert "running, last heartbeat 0 s ago" in capsys.readouterr().out
    age(run, 70)
    assert main(["health", str(run.path)]) == 0
    assert main(["health", str(run.path), "--stale-s", "60"]) == 1
    assert "last heartbeat was 70 s ago, more than 60 s" in capsys.readouterr().err
    age(run, STALE_S + 1)
    assert main(["health", str(run.path)]) == 1


def test_a_failed_run_is_not_well_and_says_why(run, capsys):
    Status(run.path, epochs=2, start=0).write("running", None, 1, 3)
    fail(run.path, 0, "the disk is full")
    assert main(["health", str(run.path)]) == 1
    assert capsys.readouterr().err == f"error: {run.path}: failed: the disk is full\n"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": "running", "heartbeat": "x"}'])
def test_a_damaged_status_is_named(run, capsys, content):
    (run.path / "status.json").write_text(content)
    assert main(["health", str(run.path)]) == 1
    assert f"{run.path}/status.json is damaged" in capsys.readouterr().err


def test_a_status_that_cannot_be_read_is_named(run, capsys):
    (run.path / "status.json").mkdir()
    assert main(["health", str(run.path)]) == 1
    assert f"{run.path}/status.json cannot be read: Is a directory" in capsys.readouterr().err


def test_without_a_run_directory_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.delenv("PSKD_RUN_DIR", raising=False)
    assert main(["health"]) == 1
    assert "needs RUN" in capsys.readouterr().err


def test_a_check_imports_no_torch(run):
    """Containers ask every half minute, beside the training."""
    program = (
        "import sys; from pskd.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "health", run.path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("\nFalse\n")


# --- the heart beats during an evaluation --------------------------------------------------------


class _Noting(nn.Module):
    """Float32 (B, 3, H, W) -> logits (B, num_classes). In an evaluation, notes the heartbeats."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        status = Path(os.environ["NOTED"]).with_name("run") / "status.json"
        if not self.training and status.exists():
            with Path(os.environ["NOTED"]).open("a") as file:
                file.write(f"{json.loads(status.read_text())['heartbeat']}\n")
        return self.head(images_BCHW.mean(dim=(2, 3)))


def build(num_classes: int) -> nn.Module:
    """As `pskd.models.build` wants it."""
    return _Noting(num_classes)


def train_noting(directory):
    """Train one epoch, whose evaluation takes several batches; a heartbeat at every chance."""
    os.environ["NOTED"] = str(directory / "noted")
    run_status.HEARTBEAT_S = 0.0
    MODELS["noting"] = (__name__, {})
    flags = (
        "--data.name=digits",
        "--method.name=baseline",
        "--model.name=noting",
        "--train.batch_size=256",
        "--train.epochs=1",
        "--schedule.milestones=[]",
        "--evaluation.batch_size=90",
        "--run.threads=1",
    )
    sys.exit(entry.main([f"--run.dir={directory / 'run'}", *flags]))


def test_a_long_evaluation_does_not_look_like_a_hang(tmp_path):
    process = processes.Process(target=train_noting, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    beats = [float(line) for line in (tmp_path / "noted").read_text().splitlines()]
    assert len(beats) == 4  # 360 images
    assert sorted(set(beats)) == beats, "the heartbeat stood still"
    assert main(["health", str(tmp_path / "run"), "--stale-s", "0"]) == 0
