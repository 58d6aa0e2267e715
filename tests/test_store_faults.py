"""Kills, power cuts, full and damaged disks: what was committed stays, what follows is right.

A small training (rows are a function of epoch and sample) saves checkpoints within epochs and at
their ends, in a process that is killed; the next start goes on from the newest checkpoint.
Letters: N samples, C classes.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from pskd.checkpoint import Checkpoints, Position
from pskd.errors import PskdError
from pskd.store import open_generation
from pskd.store.format import HEADER_BYTES
from tests.lone_store import new_store
from tests.system import mounted, needs_root, processes

N, C = 48, 5
BATCH, STEPS, EPOCHS = 8, 5, 4  # an epoch skips 8 samples
SAVE_AFTER = (2, 4)
KILLED, REFUSED = -signal.SIGKILL, 3

PHASES = ("append", "fsync", "manifest", "rename", "delete")


class Killer:
    """Ends this process by SIGKILL at the n-th call of a phase; counts the calls of all phases.

    append: a write of rows. fsync: of any file but a manifest. manifest: its fsync and its rename.
    rename: of anything else. delete: of a file or directory.
    """

    def __init__(self, phase=None, n=0, when="before"):
        self.phase, self.n, self.when = phase, n, when
        self.counts = dict.fromkeys(PHASES, 0)

    def install(self):
        """From now on in this process."""
        self._lock = threading.Lock()
        for name in ("fsync", "fdatasync"):
            self._wrap(name, self._at_sync)
        for name in ("replace", "rename"):
            self._wrap(name, self._at_rename)
        for name in ("unlink", "remove", "rmdir"):
            self._wrap(name, lambda real, args: ("delete", None))
        self._wrap("pwrite", self._at_write)

    def _wrap(self, name, look):
        real = getattr(os, name)

        def call(*args, **options):
            phase, half = look(real, args)
            with self._lock:
                now = phase == self.phase and self.counts[phase] == self.n
                self.counts[phase] += 1
            if now:
                if self.when == "inside" and half is not None:
                    half()
                elif self.when == "after":
                    real(*args, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(os, name, call)

    def _at_write(self, real, args):
        file, data, offset = args
        return "append", lambda: real(file, data[: len(data) // 2], offset)

    def _at_sync(self, real, args):
        path = Path(f"/proc/self/fd/{args[0]}").readlink()
        if "manifest.json" not in path.name:
            return "fsync", None
        return "manifest", lambda: os.truncate(path, path.stat().st_size // 2)

    def _at_rename(self, real, args):
        return "manifest" if Path(args[1]).name == "manifest.json" else "rename", None


def rows_of(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return torch.softmax(4 * torch.randn(N, C, generator=generator), dim=1)


def order_of(epoch):
    return np.random.default_rng(epoch).permutation(N)[: STEPS * BATCH]


def predictions_before(epoch):
    """What each sample's row is when `epoch` begins: its own, and whether there is one."""
    rows_NC, present_N = torch.zeros(N, C), torch.zeros(N, dtype=torch.bool)
    for earlier in range(epoch):
        ids = order_of(earlier)
        rows_NC[ids], present_N[ids] = rows_of(earlier)[ids], True
    return rows_NC, present_N


def train(directory, notes, start, epochs=EPOCHS, keep=2, pace_s=0.0):
    """Go on from the newest checkpoint to the end; each commit that returned is noted."""
    torch.set_num_threads(1)
    checkpoints = Checkpoints(directory / "checkpoints", keep)
    directory.mkdir(exist_ok=True)
    checkpoints.prepare()
    store = new_store(directory / "store", start, n=N, classes=C)
    checkpoints.register("store", store)
    position = Position(0, 0)
    if (name := checkpoints.latest()) is not None:
        position, state = checkpoints.read(name)
        checkpoints.restore(state)
    if noted := last_note(notes):
        assert position >= noted, f"{noted} was committed, and {position} is the newest"
    want_NC, want_N = predictions_before(position.epoch)
    first = position.step

    def save(position):
        store.commit()
        checkpoints.save(position)
        store.retain(m["store"] for m in checkpoints.retain())
        note(notes, position)

    for epoch in range(position.epoch, epochs):
        store.begin_epoch(epoch)
        got_NC, present_N = store.past(np.arange(N))
        assert torch.equal(present_N, want_N)
        assert torch.equal(got_NC, want_NC), f"past predictions of epoch {epoch}"
        order, rows_NC = order_of(epoch), rows_of(epoch)
        for step in range(first, STEPS):
            ids = order[BATCH * step : BATCH * step + BATCH]
            store.remember(ids, rows_NC[ids])
            time.sleep(pace_s)
            if step + 1 in SAVE_AFTER:
                save(Position(epoch, step + 1))
        first = 0
        want_NC[order], want_N[order] = rows_NC[order], True
        store.begin_epoch(epoch + 1)
        save(Position(epoch + 1, 0))
    store.close()


def note(notes, position):
    with notes.open("a") as file:
        file.write(position.name + "\n")


def last_note(notes):
    """The newest position whose commit returned before the end of the process, if any."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    return Position.of(lines[-1]) if lines else None


def _process(directory, notes, start, killer, options):
    if killer is not None:
        killer.install()
    try:
        train(directory, notes, start, **options)
    except PskdError as error:
        sys.stderr.write(str(error))
        sys.stderr.flush()
        (notes.parent / "refusal").write_text(str(error))
        os._exit(REFUSED)


def launch(directory, notes, start, killer=None, **options):
    process = processes.Process(target=_process, args=(directory, notes, start, killer, options))
    process.start()
    return process


def run(directory, notes, start, killer=None, **options):
    """Its exit code."""
    process = launch(directory, notes, start, killer, **options)
    process.join(120)
    return process.exitcode


def count_calls(directory, notes, answer):
    killer = Killer()
    killer.install()
    train(directory, notes, 0)
    answer.put(killer.counts)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """How often an undisturbed run calls each phase."""
    directory, answer = tmp_path_factory.mktemp("counted"), processes.SimpleQueue()
    process = processes.Process(
        target=count_calls, args=(directory / "run", directory / "notes", answer)
    )
    process.start()
    counts = answer.get()
    process.join()
    return counts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Bytes of every row in each generation of a run that nobody killed and that keeps them all."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert run(directory / "run", directory / "notes", 0, keep=100) == 0
    found = contents(directory / "run")
    assert sorted(found) == [f"gen-{epoch:06d}" for epoch in range(EPOCHS)]
    for epoch in range(EPOCHS):
        want_NC, present_N = predictions_before(epoch + 1)
        ids = np.flatnonzero(present_N.numpy())
        assert found[f"gen-{epoch:06d}"] == {int(i): want_NC[i].numpy().tobytes() for i in ids}, (
            "the rule that the store keeps each sample's latest row"
        )
    return found


def contents(directory):
    """name of each finished generation -> id -> bytes of its row."""
    found = {}
    for manifest in directory.glob("store/gen-*/manifest.json"):
        table = open_generation(manifest.parent)
        table.verify()
        ids = np.flatnonzero(table.present_N)
        rows = table[ids].numpy()
        found[manifest.parent.name] = {
            int(i): row.tobytes() for i, row in zip(ids, rows, strict=True)
        }
    return found


def assert_same_as(directory, undisturbed):
    """The last generation and the one before are there; all that are there are right."""
    found = contents(directory)
    assert {f"gen-{EPOCHS - 2:06d}", f"gen-{EPOCHS - 1:06d}"} <= set(found)
    for name, rows in found.items():
        assert rows == undisturbed[name], name
    position, _ = Checkpoints(directory / "checkpoints", 2).read(f"{EPOCHS:06d}-{0:08d}")
    assert position == Position(EPOCHS, 0)


def draw(rng, phase, calls):
    when = {"append": ("before", "inside", "after"), "manifest": ("before", "inside", "after")}
    return Killer(
        phase, rng.randrange(calls[phase]), rng.choice(when.get(phase, ("before", "after")))
    )


class TestKill:
    @pytest.mark.parametrize("phase", PHASES)
    def test_killed_in_each_phase_and_started_again(self, tmp_path, calls, undisturbed, phase):
        """Early and late in the run, and once more after a start."""
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        middle = calls[phase] // 2
        directory, notes = tmp_path / "run", tmp_path / "notes"
        early, late = draw(rng, phase, calls), draw(rng, phase, calls)
        early.n, late.n = rng.randrange(middle), rng.randrange(max(1, middle // 3))
        for start, killer in enumerate((early, late)):
            assert run(directory, notes, start, killer) == KILLED, f"seed {seed}"
        assert run(directory, notes, 2) == 0, f"seed {seed}"
        assert_same_as(directory, undisturbed)

    @pytest.mark.slow
    @pytest.mark.parametrize("phase", PHASES)
    def test_killed_many_times_in_each_phase(self, tmp_path, calls, undisturbed, phase):
        """At least 40 kills a phase: the same run is killed until it ends, then another."""
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        hits = runs = 0
        while hits < 40:
            directory, notes, start = tmp_path / f"run-{runs}", tmp_path / f"notes-{runs}", 0
            while (code := run(directory, notes, start, draw(rng, phase, calls))) == KILLED:
                hits, start = hits + 1, start + 1
            assert code == 0, f"seed {seed}, run {runs}, start {start}"
            assert_same_as(directory, undisturbed)
            runs += 1
        assert hits >= 40

    @pytest.mark.slow
    def test_killed_at_random_moments_and_phases(self, tmp_path, calls, undisturbed):
        """By the clock and from outside, or in any phase."""
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        hits = runs = 0
        while hits < 60:
            directory, notes, start = tmp_path / f"run-{runs}", tmp_path / f"notes-{runs}", 0
            while True:
                killer = draw(rng, rng.choice(PHASES), calls) if rng.random() < 0.5 else None
                process = launch(directory, notes, start, killer)
                process.join(rng.random() if killer is None else 120)
                process.kill()
                process.join()
                start += 1
                if process.exitcode != KILLED:
                    break
                hits += 1
            assert process.exitcode == 0, f"seed {seed}, run {runs}, start {start}"
            assert_same_as(directory, undisturbed)
            runs += 1

    def test_a_kill_within_an_epoch_costs_nothing_that_was_committed(self, tmp_path, calls):
        """What a reader outside sees after each kill: the newest checkpoint, whole."""
        directory, notes, newest = tmp_path / "run", tmp_path / "notes", Position(-1, 0)
        for start in range(6):
            killer = Killer("append", 8, "inside")
            assert run(directory, notes, start, killer) in (KILLED, 0)
            checkpoints = Checkpoints(directory / "checkpoints", 2)
            position, _ = checkpoints.read(checkpoints.latest())
            assert position >= last_note(notes)
            assert position > newest or position == Position(EPOCHS, 0)
            newest = position
        assert newest == Position(EPOCHS, 0)


@contextmanager
def disk(image, path):
    """An image with a file system on it, mounted: its journal is replayed as after a power cut."""
    path.mkdir(exist_ok=True)
    # The kernel commits on its own only seconds later, so that a copy is of one moment.
    subprocess.run(["mount", "-o", "loop,commit=300", image, path], check=True)
    try:
        yield path
    finally:
        if subprocess.run(["umount", path], check=False).returncode:
            subprocess.run(["umount", "--lazy", path], check=True)


def wait_until_stopped(process):
    """Until a stopped process has left the kernel, so that nothing of it is under way."""
    stat = Path(f"/proc/{process.pid}/task")
    while any(
        (t / "stat").read_text().rpartition(")")[2].split()[0] != "T" for t in stat.iterdir()
    ):
        time.sleep(0.001)


def check_after_power_cut(directory, notes):
    """The newest checkpoint is whole, no older than the last commit, and its rows are right."""
    checkpoints = Checkpoints(directory / "checkpoints", 2)
    position, state = checkpoints.read(checkpoints.latest())
    assert position >= last_note(notes)
    store = new_store(directory / "store", 10**5, n=N, classes=C)
    store.load_state_dict(state["store"])
    store.begin_epoch(position.epoch)
    rows_NC, present_N = store.past(np.arange(N))
    want_NC, want_N = predictions_before(position.epoch)
    assert torch.equal(present_N, want_N)
    assert torch.equal(rows_NC, want_NC)
    if position.epoch:
        table = open_generation(directory / "store" / f"gen-{position.epoch - 1:06d}")
        table.verify()
        assert torch.equal(table.rows(np.arange(N))[0], want_NC)
    store.close()


@needs_root
class TestPowerCut:
    def cut(self, tmp_path, times):
        """The disk after each cut is that of the next start."""
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        image = tmp_path / "disk-0.img"
        with image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        notes, mountpoint, commits = tmp_path / "notes", tmp_path / "mnt", 0
        notes.touch()
        for start in range(times):
            with disk(image, mountpoint):
                before = last_note(notes)
                process = launch(mountpoint / "run", notes, start, epochs=10**6, pace_s=0.001)
                try:
                    while last_note(notes) == before:
                        assert process.is_alive(), f"seed {seed}: exit {process.exitcode}"
                        time.sleep(0.01)
                    time.sleep(0.5 * rng.random())
                    os.kill(process.pid, signal.SIGSTOP)
                    wait_until_stopped(process)
                    # What had reached the disk, no more: in a new file, as a file system that is
                    # still busy when it is unmounted writes to the old one later.
                    copy = tmp_path / f"disk-{start + 1}.img"
                    shutil.copyfile(image, copy)
                    commits = len(notes.read_text().splitlines())
                finally:
                    process.kill()
                    process.join()
            image = copy
            with disk(image, mountpoint):
                checking = processes.Process(
                    target=check_after_power_cut, args=(mountpoint / "run", notes)
                )
                checking.start()
                checking.join()
                assert checking.exitcode == 0, f"seed {seed}, cut {start}"
        assert commits > times

    def test_what_was_committed_before_a_power_cut_is_whole(self, tmp_path):
        self.cut(tmp_path, times=2)

    @pytest.mark.slow
    def test_what_was_committed_before_many_power_cuts_is_whole(self, tmp_path):
        self.cut(tmp_path, times=20)


def refusal(tmp_path):
    return (tmp_path / "refusal").read_text()


@needs_root
class TestDisk:
    @pytest.mark.parametrize("free_kb", [0, 4, 12, 24, 40, 60])
    def test_a_full_disk_is_an_error_that_names_a_path_and_costs_nothing(
        self, tmp_path, undisturbed, free_kb
    ):
        """At the start, or wherever in an epoch the room ends; never a SIGBUS."""
        notes = tmp_path / "notes"
        with mounted(tmp_path / "small") as small:
            small.leave(free_kb << 10)
            directory, start = small.path / "run", 0
            code = run(directory, notes, start)
            if directory.exists():
                assert code == REFUSED, "60 kB are not enough for this run"
                assert str(small.path) in refusal(tmp_path)
                assert "No space left on device" in refusal(tmp_path)
            small.free_all()
            assert run(directory, notes, start + 1) == 0
            assert_same_as_in_a_process(directory, undisturbed)

    def test_a_disk_that_fills_in_the_middle_of_a_run(self, tmp_path, undisturbed):
        notes = tmp_path / "notes"
        with mounted(tmp_path / "small") as small:
            process = launch(small.path / "run", notes, 0, pace_s=0.02)
            while last_note(notes) is None or last_note(notes) < Position(1, 0):
                assert process.is_alive()
                time.sleep(0.01)
            small.leave(0)
            process.join(120)
            assert process.exitcode == REFUSED
            assert f"{small.path}/run" in refusal(tmp_path)
            assert "No space left on device" in refusal(tmp_path)
            small.free_all()
            assert run(small.path / "run", notes, 1) == 0
            assert_same_as_in_a_process(small.path / "run", undisturbed)

    def test_a_disk_that_is_read_only_when_the_run_goes_on(self, tmp_path, undisturbed):
        notes = tmp_path / "notes"
        with mounted(tmp_path / "small") as small:
            assert run(small.path / "run", notes, 0, Killer("append", 9)) == KILLED
            small.make_read_only()
            assert run(small.path / "run", notes, 1) == REFUSED
            assert f"{small.path}/run/store/gen-" in refusal(tmp_path)
            assert "Read-only file system" in refusal(tmp_path)
            subprocess.run(["mount", "-o", "remount,rw", small.path], check=True)
            assert run(small.path / "run", notes, 2) == 0
            assert_same_as_in_a_process(small.path / "run", undisturbed)


def assert_same_as_in_a_process(directory, undisturbed):
    """A process that ends leaves no mapping on the disk."""
    process = processes.Process(target=assert_same_as, args=(directory, undisturbed))
    process.start()
    process.join()
    assert process.exitcode == 0


class TestDamage:
    @pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
    def test_of_the_newest_checkpoint_the_one_before_takes_its_place(
        self, tmp_path, undisturbed, damage
    ):
        """The message names file and remedy; following the remedy ends with the right rows."""
        directory, notes = tmp_path / "run", tmp_path / "notes"
        # Two checkpoints of epoch 2, the second of which names a segment that the first does not.
        assert run(directory, notes, 0, Killer("append", 2 * 8 + 4)) == KILLED
        assert run(directory, notes, 1, Killer("append", 4)) == KILLED
        checkpoints = Checkpoints(directory / "checkpoints", 2)
        older, newer = sorted(
            (p.name for p in checkpoints.directory.glob("[0-9]*")), key=Position.of
        )
        assert checkpoints.latest() == newer

        def names(name):
            store = checkpoints.read(name)[1]["store"]
            return {e[0] for e in (*store["finished"], *store["growing"])}

        (only_newer, *_) = sorted(names(newer) - names(older))
        path = directory / "store" / only_newer
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(content[:4100])
        else:
            row = HEADER_BYTES + 3 * 32  # the first: prefix and ids take three units
            path.write_bytes(content[:row] + bytes([content[row] ^ 1]) + content[row + 1 :])
        before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
        notes.unlink()
        assert run(directory, notes, 2) == REFUSED
        assert str(path) in refusal(tmp_path)
        assert "older checkpoint" in refusal(tmp_path)
        assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before
        (checkpoints.directory / "latest").write_text(older)
        assert run(directory, notes, 3) == 0
        assert_same_as(directory, undisturbed)

    def test_a_flipped_byte_in_a_checkpoints_manifest_is_found_and_named(self, tmp_path):
        directory, notes = tmp_path / "run", tmp_path / "notes"
        assert run(directory, notes, 0, Killer("append", 20)) == KILLED
        checkpoints = Checkpoints(directory / "checkpoints", 2)
        manifest = checkpoints.directory / checkpoints.latest() / "manifest.json"
        content = manifest.read_bytes()
        where = content.index(b"seg-000000")  # the store's list of segments
        manifest.write_bytes(content[: where + 9] + b"1" + content[where + 10 :])
        assert run(directory, notes, 1) == REFUSED
        assert f"{manifest} is damaged" in refusal(tmp_path)

    def test_a_manifest_of_the_growing_generation_that_a_kill_left_is_replaced(
        self, tmp_path, undisturbed, calls
    ):
        """Killed between the generation's manifest and the checkpoint that names it."""
        directory, notes = tmp_path / "run", tmp_path / "notes"
        for n in range(calls["manifest"]):
            code = run(directory, notes, n, Killer("manifest", n % 4 + 2, "after"))
            if code == 0:
                break
            assert code == KILLED
        assert run(directory, notes, 10**4) == 0
        assert_same_as(directory, undisturbed)
