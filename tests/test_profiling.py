"""A trace of a few steps, of a real run."""

import gzip
import json
import re

import pytest

from tests.forked import ForkedJob, train
from tests.launches import result

FLAGS = (
    "--recipe=digits-pskd",
    "--data.limit=256",
    "--train.batch_size=32",
    "--train.epochs=2",
    "--schedule.milestones=[]",
    "--run.threads=1",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train(run_dir, *FLAGS)
    return result(run_dir)["weights_sha256"]


def test_some_steps_are_traced_and_the_run_is_the_same(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    job = ForkedJob(run_dir, *FLAGS, "--profile=3")
    assert job.process.wait(300) == 0, job.output()
    assert result(run_dir)["weights_sha256"] == undisturbed
    assert f"profile of 3 steps: {run_dir / 'profile'}" in job.output()
    with gzip.open(run_dir / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert sum(bool(re.fullmatch(r"ProfilerStep#\d+", name)) for name in names) == 3
    assert names.count("Optimizer.step#SGD.step") == 3
    summary = (run_dir / "profile" / "summary.txt").read_text()
    assert re.match(r"3 steps, \d+\.\d\d ms each, on rank 0", summary)
    for cause in ("data", "store"):
        (share,) = re.findall(rf"waited for {cause}: ([\d.]+)% of the time", summary)
        assert 0 <= float(share) < 100
    assert "waits and copies between host and device, times a step: none" in summary
    assert "aten::convolution_backward" in summary


@pytest.mark.parametrize(("asked", "epochs", "traced"), [(7, 2, 6), (3, 1, 0)])
def test_too_few_steps_are_said(tmp_path, asked, epochs, traced):
    """And what there is is written."""
    run_dir = tmp_path / "run"
    job = ForkedJob(run_dir, *FLAGS, f"--profile={asked}", f"--train.epochs={epochs}")
    assert job.process.wait(300) == 0, job.output()
    trained = 8 * epochs
    assert f"run.profile {asked}: this start trained {trained} steps, and the first 10 warm up" in (
        job.output()
    )
    summary = run_dir / "profile" / "summary.txt"
    if traced:
        assert summary.read_text().startswith(f"{traced} steps, ")
    else:
        assert not summary.exists()
