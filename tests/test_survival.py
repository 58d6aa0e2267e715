"""Whatever happens to a run: it ends with the weights of the undisturbed one, after one message.

Every fault x {1 process, 2} x {arrays, a folder of JPEGs}. Forked ranks where no launcher matters.
"""

import json
import os
import random
import shutil
import signal
import time

import pytest

from pskd.store import format as fmt
from tests import forked
from tests.forked import ForkedJob
from tests.launches import (
    DEADLINE_S,
    Job,
    assert_same_result,
    cut_back,
    kill,
    status,
    train,
    wait_for_no_lock,
    wait_for_no_process,
    wait_for_no_trace,
)
from tests.photos import make_folder
from tests.refusals import assert_refused
from tests.system import mounted, needs_root

EPOCHS = 5
COMMON = (
    "--method.name=pskd",
    "--model.name=preact_resnet8_w16",
    "--train.batch_size=32",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[3]",
    "--checkpoint.every_steps=3",
    "--run.threads=1",
    "--run.timeout_s=60",
    "--run.lock_wait_s=10",
)
ARRAYS = ("--data.name=digits", "--data.crop_padding=1", "--data.limit=256")
FOLDER = ("--data.name=imagefolder", "--data.image_size=32", "--data.validation_resize=36")
NEWEST, BEFORE = "000002-00000006", "000002-00000003"


def cells(*often):
    """Processes x data; those of arrays with the processes `often` in every run of the tests."""
    return [
        pytest.param(
            processes,
            data,
            id=f"{data}-{processes}",
            marks=[] if data == "arrays" and processes in often else [pytest.mark.slow],
        )
        for data in ("arrays", "folder")
        for processes in (1, 2)
    ]


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory):
    """Flags of a data set, which is made when first asked for."""
    made = {}

    def of(data):
        if data not in made:
            made[data] = (*COMMON, *ARRAYS)
        if data == "folder" and len(made[data]) != len(COMMON) + len(FOLDER) + 1:
            root = tmp_path_factory.mktemp("photos")
            for split, seed, count in (("train", 0, 80), ("val", 1, 5)):
                make_folder(root / split, classes=3, per_class=count, median_side=48, seed=seed)
            made[data] = (*COMMON, *FOLDER, f"--data.root={root}")
        return made[data]

    return of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, flags_of):
    """A complete run that keeps all of its checkpoints, by world size and data."""
    done = {}

    def of(processes, data):
        if (processes, data) not in done:
            run_dir = tmp_path_factory.mktemp("undisturbed") / f"run-{processes}-{data}"
            job = forked.train(
                run_dir, *flags_of(data), "--checkpoint.keep=100", processes=processes
            )
            assert job.process.returncode == 0, job.output()
            done[processes, data] = run_dir
        return done[processes, data]

    return of


def assert_same_run(run_dir, reference):
    assert_same_result(run_dir, reference, EPOCHS)
    assert status(run_dir)["state"] == "complete"
    wait_for_no_trace(run_dir)


def assert_resumed_to_the_same_end(run_dir, processes, reference):
    """The run brings its own configuration."""
    again = forked.train(run_dir, processes=processes)
    assert again.process.returncode == 0, again.output()
    assert "resuming" in again.output()
    assert_same_run(run_dir, reference)
    return again.output()


# --- while it runs -------------------------------------------------------------------------------


def in_mid_run(job):
    """An epoch is done, and the run goes on."""
    job.wait_for_epochs(1)
    time.sleep(0.2 * random.random())
    assert job.process.poll() is None
    assert status(job.run_dir)["state"] == "running"
    return job


def killed(tmp_path, flags_of, undisturbed, processes, data, whom):
    job = in_mid_run(ForkedJob(tmp_path / "run", *flags_of(data), processes=processes))
    workers = job.workers()
    kill([random.choice(workers)] if whom == "one" else workers)
    assert job.wait() != 0
    if whom == "one" and processes > 1:
        assert_refused(job, "lost another rank", "start again", run_failed=True)
    assert_resumed_to_the_same_end(tmp_path / "run", processes, undisturbed(processes, data))


# In every run of the tests: test_resume.py, with launchers.
@pytest.mark.parametrize(("processes", "data"), cells())
def test_one_is_killed(tmp_path, flags_of, undisturbed, processes, data):
    killed(tmp_path, flags_of, undisturbed, processes, data, "one")


@pytest.mark.parametrize(("processes", "data"), cells())
def test_all_are_killed(tmp_path, flags_of, undisturbed, processes, data):
    killed(tmp_path, flags_of, undisturbed, processes, data, "all")


@pytest.mark.slow  # two launches with imports; two processes on arrays: test_resume.py
@pytest.mark.parametrize(("processes", "data"), cells())
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_launcher_gets(tmp_path, flags_of, undisturbed, processes, data, how):
    run_dir = tmp_path / "run"
    job = in_mid_run(Job(run_dir, *flags_of(data), processes=processes))
    job.process.send_signal(how)
    assert job.wait() != 0
    wait_for_no_process(run_dir)
    wait_for_no_lock(run_dir)  # a file that was being written stays, until the next start
    assert status(run_dir)["state"] == ("running" if how == signal.SIGKILL else "stopped")
    again = train(run_dir, processes=processes)
    assert again.process.returncode == 0, again.output()
    wait_for_no_trace(run_dir)
    assert_same_run(run_dir, undisturbed(processes, data))


@pytest.mark.parametrize(("processes", "data"), cells(2))
def test_interrupted(tmp_path, flags_of, undisturbed, processes, data):
    run_dir = tmp_path / "run"
    job = in_mid_run(ForkedJob(run_dir, *flags_of(data), processes=processes))
    job.process.send_signal(signal.SIGINT)
    assert job.wait() == (75 if processes == 1 else 1)
    assert status(run_dir)["state"] == "stopped", job.output()
    wait_for_no_trace(run_dir)
    assert_resumed_to_the_same_end(run_dir, processes, undisturbed(processes, data))


@pytest.mark.parametrize(("processes", "data"), cells(1, 2))
def test_stalled(tmp_path, flags_of, undisturbed, processes, data):
    """A silent peer is lost after the timeout; a silent process still owns its run."""
    run_dir = tmp_path / "run"
    flags = (*flags_of(data), "--run.timeout_s=4", "--run.lock_wait_s=1")
    job = in_mid_run(ForkedJob(run_dir, *flags, processes=processes))
    stalled = job.workers()[-1]
    stalled.send_signal(signal.SIGSTOP)
    if processes == 1:
        second = forked.train(run_dir, "--run.lock_wait_s=1", processes=1)
        assert_refused(second, "in use by process", str(stalled.pid), "heartbeat")
        stalled.send_signal(signal.SIGCONT)
        assert job.wait() == 0, job.output()
        assert_same_run(run_dir, undisturbed(processes, data))
        return
    deadline = time.monotonic() + DEADLINE_S
    while status(run_dir)["state"] == "running":
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)
    stalled.send_signal(signal.SIGKILL)  # as a launcher does, once it has waited in vain
    assert job.wait() == 1
    assert_refused(job, "lost another rank", run_failed=True)
    assert_resumed_to_the_same_end(run_dir, processes, undisturbed(processes, data))


@needs_root
@pytest.mark.parametrize(("processes", "data"), cells(2))
def test_the_disk_is_full(tmp_path, flags_of, undisturbed, processes, data):
    run_dir = tmp_path / "run"
    with mounted(run_dir, "16M") as disk:
        job = in_mid_run(ForkedJob(run_dir, *flags_of(data), processes=processes))
        disk.fill()
        assert job.wait() == 1
        assert_refused(job, "No space left", "start again", run_failed=True)
        disk.free_all()
        assert_resumed_to_the_same_end(run_dir, processes, undisturbed(processes, data))


# --- while it does not run -----------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path, undisturbed):
    """A copy of the undisturbed run, as if it had ended with NEWEST."""

    def of(processes, data):
        run_dir = shutil.copytree(undisturbed(processes, data), tmp_path / "run")
        cut_back(run_dir, NEWEST)
        return run_dir

    return of


def segment_of(run_dir):
    """The file of the growing generation in which NEWEST names more rows than BEFORE."""
    entries = {}
    for name in (BEFORE, NEWEST):
        manifest = json.loads((run_dir / "checkpoints" / name / "manifest.json").read_text())
        entries[name] = manifest["content"]["store"]["growing"]
    (path, more, _), (same, fewer, _) = entries[NEWEST][-1], entries[BEFORE][-1]
    assert path == same
    assert 0 < fewer < more
    return run_dir / "store" / path


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def damage(run_dir, how):
    """Returns the file that the message has to name."""
    newest = run_dir / "checkpoints" / NEWEST
    if how == "state cut off":
        os.truncate(newest / "state.pt", 1000)
        return newest / "state.pt"
    if how == "byte of the state":
        flip(newest / "state.pt", (newest / "state.pt").stat().st_size // 2)
        return newest / "state.pt"
    if how == "no manifest":
        (newest / "manifest.json").unlink()
        return newest / "manifest.json"
    if how == "no latest":
        (run_dir / "checkpoints/latest").unlink()
        return run_dir / "checkpoints/latest"
    segment = segment_of(run_dir)
    rank_rows = 32 // (2 if "of-00002" in segment.name else 1)
    stride = fmt.parse_header(segment.read_bytes()[: fmt.HEADER_BYTES]).stride
    chunk = fmt.chunk_units(rank_rows, stride) * stride
    within_step_5 = fmt.HEADER_BYTES + 5 * chunk - 40
    if how == "shard cut off":
        os.truncate(segment, within_step_5)
    else:
        flip(segment, within_step_5)
    return segment


OFTEN = ["state cut off", "no latest", "shard cut off", "byte of a shard"]
SELDOM = [pytest.param(how, marks=pytest.mark.slow) for how in ("byte of the state", "no manifest")]


@pytest.mark.parametrize(("processes", "data"), cells(2))
@pytest.mark.parametrize("how", [*OFTEN, *SELDOM])
def test_damaged(stopped, undisturbed, processes, data, how):
    run_dir = stopped(processes, data)
    named = damage(run_dir, how)
    output = assert_resumed_to_the_same_end(run_dir, processes, undisturbed(processes, data))
    assert str(named) in output
    aside = run_dir / f"checkpoints/damaged-{NEWEST}"
    if how == "no latest":
        assert f"the newest checkpoint is {NEWEST}" in output
        assert not aside.exists()
    else:
        assert f"going back to checkpoint {BEFORE}" in output
        assert str(aside) in output
        assert aside.is_dir()


@pytest.mark.slow
def test_a_truncated_shard_of_zero(tmp_path):
    flags = (*COMMON, *ARRAYS, "--deepspeed_config=fp32-zero1", "--checkpoint.keep=100")
    reference = forked.train(tmp_path / "reference", *flags)
    assert reference.process.returncode == 0, reference.output()
    run_dir = shutil.copytree(tmp_path / "reference", tmp_path / "run")
    cut_back(run_dir, NEWEST)
    (shard,) = (run_dir / "checkpoints" / NEWEST).glob("zero_pp_rank_1_*")
    os.truncate(shard, shard.stat().st_size // 2)
    output = assert_resumed_to_the_same_end(run_dir, 2, tmp_path / "reference")
    assert f"{shard} is damaged" in output
    assert f"going back to checkpoint {BEFORE}" in output


def test_if_no_checkpoint_is_whole_each_is_named_in_one_message(stopped, undisturbed):
    run_dir = stopped(2, "arrays")
    before = {}
    for checkpoint in (run_dir / "checkpoints").glob("[0-9]*"):
        flip(checkpoint / "state.pt", 5000)
        before[checkpoint / "state.pt"] = (checkpoint / "state.pt").read_bytes()
    job = forked.train(run_dir)
    assert_refused(job, "no checkpoint of this run is whole", *map(str, before), "--run.dir")
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints/latest").write_text(NEWEST)
    assert_refused(forked.train(run_dir), "checkpoints/latest names a checkpoint that is not there")


def test_gone_back_by_hand(stopped, undisturbed):
    """What it goes on from is kept, and what came after it is of no more use."""
    run_dir = stopped(1, "arrays")
    (run_dir / "checkpoints/latest").write_text(BEFORE)
    job = ForkedJob(run_dir, "--checkpoint.keep=2", processes=1)
    kept = run_dir / "checkpoints" / BEFORE
    job.wait_until(lambda: f"checkpoint {NEWEST}:" in job.output())
    assert job.wait() == 0, job.output()
    assert_same_run(run_dir, undisturbed(1, "arrays"))
    assert not kept.exists(), "in the end there are two newer ones"
    assert len(list((run_dir / "checkpoints").glob("[0-9]*"))) == 2
