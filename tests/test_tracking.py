"""CSV, TensorBoard, Weights & Biases: as many epochs as the run has, whatever was killed."""

import csv
import json
import signal
import struct
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pskd import tracking
from pskd.command_line import load
from pskd.config import TrackingSection
from pskd.errors import PskdError
from tests.forked import ForkedJob, train
from tests.launches import metrics, processes_of, wait_for_no_process

FLAGS = (
    "--recipe=digits-pskd",
    "--data.limit=256",
    "--train.batch_size=32",
    "--train.epochs=4",
    "--schedule.milestones=[]",
    "--checkpoint.every_steps=3",
    "--evaluation.every=2",
    "--run.threads=1",
)
EVERYWHERE = ("--tracking.csv=true", "--tracking.tensorboard=true", "--tracking.wandb=offline")


def rows(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return [
            {key: json.loads(value) for key, value in row.items() if value != ""}
            for row in csv.DictReader(file)
        ]


def without_none(line):
    return {key: value for key, value in line.items() if value is not None}


def sent(path):
    """Epochs in a file of Weights & Biases: LevelDB's log of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, found, record, at = path.read_bytes(), [], b"", 7  # behind the file's header
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if kind == 0:
            break
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            parsed = Record.FromString(record)
            record = b""
            if parsed.HasField("history"):
                found.append(parsed.history.step.num)
    return found


def assert_all_have_all(run_dir):
    lines = [without_none(line) for line in metrics(run_dir)]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert rows(run_dir) == lines
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    drawn = {key for line in lines for key in line} - {"epoch"}
    assert set(events.Tags()["scalars"]) == drawn
    for key in drawn:
        want = [(line["epoch"], pytest.approx(line[key])) for line in lines if key in line]
        assert [(event.step, event.value) for event in events.Scalars(key)] == want
    assert len(list((run_dir / "tensorboard").iterdir())) == 1


def test_killed_and_resumed_each_has_every_epoch_once(tmp_path):
    run_dir = tmp_path / "run"
    job = ForkedJob(run_dir, *FLAGS, *EVERYWHERE)
    job.wait_until((run_dir / "checkpoints" / "000002-00000003").exists)
    for process in job.workers():
        process.send_signal(signal.SIGKILL)
    job.wait()
    wait_for_no_process(run_dir)
    again = train(run_dir)
    assert again.process.returncode == 0, again.output()
    assert_all_have_all(run_dir)
    (written,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    assert sent(written) == [0, 1, 2, 3]
    name = json.loads((run_dir / "env.json").read_text())[0]["run"]
    assert written.name == f"run-{name}.wandb", "one run there for one here"
    wait_for_no_process(run_dir)
    assert not processes_of(run_dir)


def test_begun_in_mid_run_it_has_the_epochs_before_as_well(tmp_path):
    run_dir = tmp_path / "run"
    job = ForkedJob(run_dir, *FLAGS, processes=None)
    job.wait_for_epochs(2)
    job.process.send_signal(signal.SIGTERM)
    job.wait()
    again = train(run_dir, "--tracking.csv=true", "--tracking.tensorboard=true", processes=None)
    assert again.process.returncode == 0, again.output()
    assert_all_have_all(run_dir)


@pytest.mark.parametrize(
    ("section", "package"),
    [
        (TrackingSection(tensorboard=True), "tensorboard"),
        (TrackingSection(wandb="offline"), "wandb"),
    ],
)
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, section, package):
    tracking.check(section)
    monkeypatch.setitem(sys.modules, package, None)  # what Python takes for: not there
    with pytest.raises(PskdError, match=f'package {package}.*pip install "pskd\\[{package}\\]"'):
        tracking.check(section)


def test_a_project_without_weights_and_biases_is_refused():
    with pytest.raises(PskdError, match=r"tracking\.wandb_project"):
        load([*FLAGS, "--tracking.wandb_project=mine"])
