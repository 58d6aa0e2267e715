"""Nodes that share no run directory: segments and checkpoints travel, and a lost disk is no loss.

Ranks are real processes with directories of their own; at the end, whole jobs of which each node
sees another disk at the same path. Letters: N samples, C classes.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pskd.checkpoint import Checkpoints, Position
from pskd.store import open_generation
from pskd.weights import read_saved
from tests.launches import DEADLINE_S, ROOT, metrics, result, train
from tests.separate_sites import EPOCHS, apart, go_on, site_of
from tests.system import mounted, needs_root


def tree(directory):
    """relative name -> content of the store's files."""
    files = (p for p in (directory / "store").rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}


def named_segments(root, leader):
    """relative name -> content of what the newest checkpoint names at a site."""
    directory = site_of(root, leader)
    checkpoints = Checkpoints(directory / "checkpoints", 2)
    _, state = checkpoints.read(checkpoints.latest())
    entries = (*state["store"]["finished"], *state["store"]["growing"])
    return {name: (directory / "store" / name).read_bytes() for name, *_ in entries}


def contents(directory):
    """name of each finished generation -> bytes of its rows."""
    found = {}
    for manifest in sorted(directory.glob("store/gen-*/manifest.json")):
        table = open_generation(manifest.parent)
        table.verify()
        found[manifest.parent.name] = table[np.flatnonzero(table.present_N)].numpy().tobytes()
    return found


def last_two(directory):
    found = contents(directory)
    return [found[f"gen-{epoch:06d}"] for epoch in (EPOCHS - 2, EPOCHS - 1)]


def best_weights(directory):
    """(epoch, hash) of the best epoch's export, which is that of the result where there is one."""
    best = read_saved(directory / "models" / "checkpoint_best.pth")
    if (directory / "result.json").exists():
        assert best["epoch"] == result(directory)["best"]["epoch"]
    return best["epoch"], best["weights_sha256"]


@pytest.fixture(scope="module")
def shared(pool, tmp_path_factory):
    """What as many ranks write into one directory that they all see."""
    done = {}

    def of(size):
        if size not in done:
            root = tmp_path_factory.mktemp(f"shared-{size}")
            assert pool(size).run(go_on, root, [0] * size, 0) == [None] * size
            done[size] = site_of(root, 0)
        return done[size]

    return of


class TestTraining:
    @apart
    def test_every_site_ends_with_the_files_of_a_shared_directory(
        self, pool, tmp_path, shared, leaders
    ):
        """To the byte, segments and manifests; each rank has read every row from its own disk."""
        size = len(leaders)
        assert pool(size).run(go_on, tmp_path, leaders, 0) == [None] * size
        want = tree(shared(size))
        assert len(want) > EPOCHS
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            f"site-{leader}" for leader in sorted(set(leaders))
        ]
        for leader in set(leaders):
            assert tree(site_of(tmp_path, leader)) == want
            assert contents(site_of(tmp_path, leader)) == contents(shared(size))
        names = [
            sorted(p.name for p in (site_of(tmp_path, leader) / "checkpoints").iterdir())
            for leader in set(leaders)
        ]
        assert names.count(names[0]) == len(names)

    @pytest.mark.parametrize(
        ("leaders", "lost"),
        [
            ([0, 1], [0]),
            ([0, 1], [1]),
            ([0, 0, 2, 2], [0]),
            ([0, 0, 2, 2], [2]),
            ([0, 1, 2, 3], [0, 1, 2]),
            ([0, 1, 2, 3], [1, 2, 3]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("stop", [Position(1, 2), Position(2, 0)], ids=str)
    def test_a_lost_disk_is_filled_again_and_training_goes_on(
        self, pool, tmp_path, shared, leaders, lost, stop
    ):
        """Rank 0's too, and all but one."""
        size = len(leaders)
        assert pool(size).run(go_on, tmp_path, leaders, 0, stop) == [None] * size
        kept = next(leader for leader in leaders if leader not in lost)
        before = named_segments(tmp_path, kept)
        for leader in lost:
            shutil.rmtree(site_of(tmp_path, leader))
        assert pool(size).run(go_on, tmp_path, leaders, 1, stop) == [None] * size
        for leader in lost:
            assert named_segments(tmp_path, leader) == before
        assert pool(size).run(go_on, tmp_path, leaders, 2) == [None] * size
        for leader in leaders:
            assert last_two(site_of(tmp_path, leader)) == last_two(shared(size))
        assert len({json.dumps(sorted(named_segments(tmp_path, k))) for k in leaders}) == 1
        assert all(
            named_segments(tmp_path, k) == named_segments(tmp_path, leaders[0]) for k in leaders
        )

    def test_a_site_that_missed_a_checkpoint_catches_up(self, pool, tmp_path, shared):
        """Its disk holds an older state, and what it wrote since is in nobody's way."""
        assert pool(2).run(go_on, tmp_path, [0, 1], 0, Position(1, 0)) == [None] * 2
        older = shutil.copytree(site_of(tmp_path, 0), tmp_path / "older")
        assert pool(2).run(go_on, tmp_path, [0, 1], 1, Position(2, 2)) == [None] * 2
        shutil.rmtree(site_of(tmp_path, 0))
        older.rename(site_of(tmp_path, 0))
        assert pool(2).run(go_on, tmp_path, [0, 1], 2, Position(2, 2)) == [None] * 2
        assert named_segments(tmp_path, 0) == named_segments(tmp_path, 1)
        assert not list(tmp_path.rglob("seg-000002-*")), "nothing was trained again"
        assert pool(2).run(go_on, tmp_path, [0, 1], 2) == [None] * 2
        for leader in (0, 1):
            assert last_two(site_of(tmp_path, leader)) == last_two(shared(2))
            assert (site_of(tmp_path, leader) / "checkpoints/latest").read_text() == (
                Position(EPOCHS, 0).name
            )

    def test_begun_apart_and_ended_on_a_shared_directory_and_back(self, pool, tmp_path, shared):
        """The layout of the nodes may change with each start, and their number."""
        assert pool(2).run(go_on, tmp_path, [0, 1], 0, Position(0, 2)) == [None] * 2
        assert pool(4).run(go_on, tmp_path, [0] * 4, 1, Position(1, 2)) == [None] * 4
        assert pool(4).run(go_on, tmp_path, [0, 0, 2, 2], 2, Position(2, 2)) == [None] * 4
        assert pool(2).run(go_on, tmp_path, [0, 1], 3) == [None] * 2
        for leader in (0, 1):
            assert last_two(site_of(tmp_path, leader)) == last_two(shared(2))


def flip(path):
    content = bytearray(path.read_bytes())
    content[4096 + 40] ^= 1  # within the ids of the first chunk
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path):
    with path.open("ab") as file:
        file.write(b"what a later commit had begun to write")
    flip(path)


class TestDamage:
    @pytest.mark.parametrize("damage", [flip, truncate, lengthen, Path.unlink])
    @pytest.mark.parametrize("at", [(0,), (1,), (0, 1)], ids=str)
    def test_a_damaged_replica_is_fetched_again(self, pool, tmp_path, shared, damage, at):
        """Also if each site has damaged another segment."""
        assert pool(2).run(go_on, tmp_path, [0, 1], 0, Position(2, 2)) == [None] * 2
        segments = named_segments(tmp_path, 0)
        for site, name in zip(at, (sorted(segments)[0], sorted(segments)[-1]), strict=False):
            damage(site_of(tmp_path, site) / "store" / name)
        assert pool(2).run(go_on, tmp_path, [0, 1], 1) == [None] * 2
        for leader in (0, 1):
            assert last_two(site_of(tmp_path, leader)) == last_two(shared(2))
            for name, content in segments.items():
                path = site_of(tmp_path, leader) / "store" / name
                assert path.read_bytes()[: len(content)] == content

    def test_what_is_damaged_everywhere_is_refused_by_name_on_every_rank(self, pool, tmp_path):
        assert pool(2).run(go_on, tmp_path, [0, 1], 0, Position(2, 2)) == [None] * 2
        name = sorted(named_segments(tmp_path, 0))[0]
        for site in (0, 1):
            flip(site_of(tmp_path, site) / "store" / name)
        first, second = pool(2).run(go_on, tmp_path, [0, 1], 1)
        assert first == second
        assert f"{site_of(tmp_path, 0)}/store/{name}" in first
        assert "damaged" in first


@needs_root
class TestFullDisk:
    @pytest.mark.parametrize("full", [0, 1])
    def test_no_room_at_one_site_stops_all_with_one_message(self, pool, tmp_path, full):
        """Its own segment fits, what it receives does not. With room again the run goes on."""
        classes = 1000  # 30 rows of 4 kB a rank
        with mounted(site_of(tmp_path, full)) as disk:
            disk.leave(180 << 10)
            first, second = pool(2).run(go_on, tmp_path, [0, 1], 0, None, classes)
            assert first == second
            assert str(disk.path) in first
            assert "No space left on device" in first
            assert "start again" in first
            disk.free_all()
            stop = Position(1, 2)
            assert pool(2).run(go_on, tmp_path, [0, 1], 1, stop, classes) == [None] * 2
            assert named_segments(tmp_path, 0) == named_segments(tmp_path, 1)

    def test_a_read_only_site_stops_all_with_one_message(self, pool, tmp_path):
        with mounted(site_of(tmp_path, 1)) as disk:
            disk.make_read_only()
            first, second = pool(2).run(go_on, tmp_path, [0, 1], 0)
            assert first == second
            assert str(disk.path) in first
            assert "Read-only file system" in first


FLAGS = (
    "--recipe=digits-pskd",
    "--run.threads=1",
    "--train.epochs=3",
    "--schedule.milestones=[2]",
    "--checkpoint.every_steps=7",
)


LEADERS = """
import torch
import torch.distributed as dist
from pskd import launch, world
from pskd.sites import Sites
here = world.join(launch.from_environment(), torch.device("cpu"), 60, "run.timeout_s")
assert dist.group.WORLD.bound_device_id is None
assert Sites(here, [0, 0, 2]).gather(here.rank) == [0, 1, 2]
world.stop(here)
"""


def test_leaders_make_a_group_that_the_other_ranks_know_nothing_of(tmp_path):
    """DeepSpeed's accelerator is a GPU here, as it is for `pskd doctor` on a node with GPUs."""
    program = tmp_path / "leaders.py"
    program.write_text(LEADERS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*torchrun, program],
        env={**os.environ, "DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr


class Nodes:
    """Two nodes of one process each; the run directory is another disk on each of them."""

    def __init__(self, root, *flags):
        self.run_dir = root / "run"
        self.run_dir.mkdir(exist_ok=True)
        self.disks = [root / "disk0", root / "disk1"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes, self._logs = [], []
        for rank, disk in enumerate(self.disks):
            disk.mkdir(exist_ok=True)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            script = 'mount --bind "$0" "$1" && shift && exec "$@"'
            train = [sys.executable, str(ROOT / "train.py"), "--run.dir", str(self.run_dir)]
            command = ["unshare", "-m", "sh", "-c", script, str(disk), str(self.run_dir)]
            self._logs.append(root / f"log-{port}-{rank}")
            with self._logs[-1].open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *train, *flags],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=os.environ | environment,
                    )
                )

    def wait(self):
        """Both exit codes."""
        return [process.wait(DEADLINE_S) for process in self.processes]

    def wait_until(self, ready):
        """Until `ready()`; fails if a process ends before."""
        deadline = time.monotonic() + DEADLINE_S
        while not ready():
            assert all(p.poll() is None for p in self.processes), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def output(self):
        """What both printed so far."""
        return "".join(log.read_text() for log in self._logs)

    def kill(self):
        """SIGKILL, at once."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        self.wait()


@pytest.fixture
def nodes(tmp_path):
    """Starts jobs on two nodes, and ends what is left of them."""
    started = []

    def start(*flags):
        started.append(Nodes(tmp_path, *flags))
        return started[-1]

    yield start
    for job in started:
        job.kill()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Two ranks on one directory."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    job = train(run_dir, *FLAGS, processes=2)
    assert job.process.returncode == 0, job.output()
    return run_dir


@needs_root
class TestNodes:
    def test_zero_stages_are_refused_by_name(self, nodes):
        job = nodes(*FLAGS, "--engine.deepspeed_config=fp32-zero1")
        assert job.wait() == [1, 1]
        assert "fp32-zero1" in job.output()
        assert "run directory that all nodes share" in job.output()
        assert job.output().count("error:") == 1

    @pytest.mark.slow
    def test_two_nodes_end_with_the_weights_of_one(self, nodes, reference):
        """To the bit; each node's disk then holds checkpoints and predictions."""
        job = nodes(*FLAGS)
        assert job.wait() == [0, 0], job.output()
        assert result(job.disks[0])["weights_sha256"] == result(reference)["weights_sha256"]
        assert contents(job.disks[0]) == contents(job.disks[1]) == contents(reference)
        latest = [(d / "checkpoints/latest").read_text() for d in job.disks]
        assert latest == [(reference / "checkpoints/latest").read_text()] * 2
        assert list(job.run_dir.iterdir()) == [], "nothing outside of the nodes' disks"
        assert best_weights(job.disks[0]) == best_weights(job.disks[1]) == best_weights(reference)

    @pytest.mark.slow
    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_node_that_lost_its_disk_costs_nothing(self, nodes, reference, lost):
        """All killed in mid-epoch, one disk emptied, started again without a flag."""
        job = nodes(*FLAGS)
        job.wait_until((job.disks[1] / "checkpoints/000001-00000007/state.pt").exists)
        job.kill()
        assert (job.disks[lost] / "store").exists()
        shutil.rmtree(job.disks[lost])
        again = nodes(*FLAGS)
        assert again.wait() == [0, 0], again.output()
        assert "resuming" in again.output()
        assert result(job.disks[0])["weights_sha256"] == result(reference)["weights_sha256"]
        assert contents(job.disks[0])["gen-000002"] == contents(reference)["gen-000002"]
        assert contents(job.disks[0]) == contents(job.disks[1])
        assert [line["epoch"] for line in metrics(job.disks[0])] == [0, 1, 2]
        assert len(json.loads((job.disks[0] / "env.json").read_text())) == 2
        assert best_weights(job.disks[0]) == best_weights(job.disks[1]) == best_weights(reference)

    @pytest.mark.slow
    def test_a_damaged_file_is_mended_from_the_other_node(self, nodes, reference):
        """Nothing is trained again: the newest checkpoint is whole on one of the disks."""
        job = nodes(*FLAGS)
        newest = "checkpoints/000001-00000007"
        job.wait_until((job.disks[1] / newest / "state.pt").exists)
        job.kill()
        newest = "checkpoints/" + (job.disks[1] / "checkpoints/latest").read_text()
        os.truncate(job.disks[1] / newest / "state.pt", 1000)
        again = nodes(*FLAGS)
        assert again.wait() == [0, 0], again.output()
        assert "going back" not in again.output()
        assert result(job.disks[0])["weights_sha256"] == result(reference)["weights_sha256"]
        assert contents(job.disks[0]) == contents(job.disks[1])
