"""What a run needs on its disk at the peak is said before it begins, and has to be there."""

import os
import re
import threading
import time
from pathlib import Path

import pytest

from pskd import command_line, disk
from pskd.errors import PskdError
from pskd.words import readable_bytes
from tests import forked
from tests.forked import ForkedJob
from tests.refusals import assert_refused
from tests.system import mounted, needs_root


def need(*flags, generation=1000):
    config = command_line.load(["--train.epochs=10", *flags])
    return disk.need(config, state_bytes=100, generation_bytes=generation, export_bytes=7)


@pytest.mark.parametrize(
    ("flags", "checkpoints", "generations", "exports"),
    [
        ([], 3, 3, 3),  # the last, the best, and one that is being written
        (["--checkpoint.keep=5"], 6, 6, 3),
        (["--checkpoint.keep=50"], 51, 10, 3),  # no more generations than epochs
        (["--checkpoint.export_every=3"], 3, 3, 6),  # after epochs 3, 6, 9 and 10
        (["--checkpoint.export_every=5"], 3, 3, 4),
        (["--checkpoint.export_every=20"], 3, 3, 3),
    ],
)
def test_the_peak_follows_from_what_is_kept(flags, checkpoints, generations, exports):
    found = need(*flags)
    assert (found.checkpoints, found.generations) == (checkpoints, generations)
    assert found.exports == exports
    state = 100 + 512 * 10
    assert found.total_bytes == checkpoints * state + generations * 1000 + exports * 7


def test_a_method_without_predictions_needs_no_room_for_them():
    assert need(generation=0).generations == 0
    assert "predictions" not in str(need(generation=0))
    assert "3 generations of predictions of 1 kB" in str(need())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 kB"), (1499, "1 kB"), (2.56e9, "2.6 GB"), (89.6e6, "89.6 MB"), (3e12, "3.0 TB")],
)
def test_sizes_are_readable(count, text):
    assert readable_bytes(count) == text


@needs_root
def test_what_the_run_holds_counts_as_room(tmp_path):
    with mounted(tmp_path / "run") as small:
        held = small.path / "checkpoints" / "000001-00000000"
        held.mkdir(parents=True)
        (held / "state.pt").write_bytes(bytes(600_000))
        wanted = disk.Need(1, 800_000, 0, 0, 0, 0)
        assert "held by the run" in disk.check(small.path, wanted)
        held.rename(small.path / "checkpoints" / "damaged-000001-00000000")  # nothing replaces it
        with pytest.raises(PskdError, match=f"{small.path} will need 800 kB.*--run.dir"):
            disk.check(small.path, wanted)


FLAGS = (
    "--recipe=digits-pskd",
    "--data.limit=512",
    "--train.epochs=6",
    "--schedule.milestones=[]",
    "--checkpoint.every_steps=3",
    "--checkpoint.export_every=2",
    "--run.threads=1",
)


@needs_root
def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path):
    with mounted(tmp_path / "run", "3M") as small:
        job = forked.train(small.path, *FLAGS)
        assert_refused(job, f"run directory {small.path} will need", "3 checkpoints of", "free")
        assert not list(small.path.glob("checkpoints/*"))
        assert not (small.path / "store").exists()


def test_a_run_keeps_within_what_it_said(tmp_path):
    """The sizes are looked at all the time; no more is promised than is of use."""
    job = ForkedJob(tmp_path / "run", *FLAGS)
    peak, ended = 0, threading.Event()

    def look():
        nonlocal peak
        while not ended.is_set():
            total = 0
            for part in ("checkpoints", "store", "models"):
                for folder, _, names in os.walk(tmp_path / "run" / part):
                    for name in names:
                        try:
                            total += Path(folder, name).stat().st_size
                        except FileNotFoundError:
                            continue
            peak = max(peak, total)
            time.sleep(0.002)

    watcher = threading.Thread(target=look)
    watcher.start()
    code = job.wait()
    ended.set()
    watcher.join()
    assert code == 0, job.output()
    said = re.search(r"disk: ([\d.]+) MB \(", job.output())
    assert said is not None
    assert 0.5 * float(said[1]) < peak / 1e6 <= float(said[1]) + 0.05
    assert re.search(r"checkpoint 000000-00000003: \d+ kB, training waited [\d.]+ s", job.output())
