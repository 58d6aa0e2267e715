"""A checkpoint is whole or not there: round trips, damage, full disks, kills at any moment."""

import json
import os
import random
import shutil
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pskd.checkpoint import Checkpoints, Position
from pskd.errors import DamagedError, PskdError
from pskd.files import read_manifest, sha256_of, write_manifest
from tests.system import mounted, needs_root, processes

PAGE_BYTES = 4096


class Part:
    """Something with state, all of which tells the step that it was saved at."""

    def __init__(self, step=0, size=5000):
        self.step, self.size = step, size

    def state_dict(self):
        return {"step": self.step, "values": torch.full((self.size,), self.step), "list": [1, "a"]}

    def load_state_dict(self, state):
        self.step = state["step"]


class Recorder:
    """A part whose state is given, and that keeps what it is handed."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def open_with(directory, part, keep=2, name="part"):
    checkpoints = Checkpoints(directory, keep)
    checkpoints.register(name, part)
    checkpoints.prepare()
    return checkpoints


def save(directory, *steps, keep=2, part=None):
    """Checkpoints of these steps; those that are retained after each."""
    part = part or Part()
    checkpoints = open_with(directory, part, keep)
    retained = []
    for part.step in steps:
        checkpoints.save(Position(0, part.step))
        retained.append([m["step"] for m in checkpoints.retain()])
    return retained


def name_of(step):
    return Position(0, step).name


def go_back(directory, step):
    """As a user does who wants an older one."""
    (directory / "latest").write_text(name_of(step) + "\n")


def latest_step(directory):
    """Of the newest checkpoint, which must read, verify and be of one moment."""
    checkpoints = Checkpoints(directory, 2)
    position, state = checkpoints.read(checkpoints.latest())
    assert position == (0, state["part"]["step"])
    assert (state["part"]["values"] == position.step).all()
    assert name_of(position.step) == checkpoints.latest()
    return position.step


def saved_steps(directory):
    return sorted(int(p.name.partition("-")[2]) for p in directory.glob("[0-9]*-*"))


def damage(directory, name):
    with pytest.raises(DamagedError) as caught:
        Checkpoints(directory, 2).read(name)
    return caught.value.what


def files(directory):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "checkpoints"


class TestRoundTrip:
    def test_every_part_gets_its_own_state_back(self, directory):
        model = {
            "weight": torch.randn(3, 4),
            "half": torch.randn(5).half(),
            "brain": torch.randn(5).bfloat16(),
            "steps": torch.tensor(7),
            "mask": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
        }
        history = {"lines": [{"epoch": 0, "nll": 0.1}, {"epoch": 1, "nll": None}], "best": None}
        store = {"epoch": 2, "finished": [["gen-000001/seg.psk", 5, 2**32 - 1]], "growing": []}
        parts = {"model": Recorder(model), "history": Recorder(history), "store": Recorder(store)}
        checkpoints = Checkpoints(directory, 2)
        for name, part in parts.items():
            checkpoints.register(name, part)
        checkpoints.prepare()
        checkpoints.save(Position(2, 31))
        retained = checkpoints.retain()
        assert [(m["epoch"], m["step"], m["store"]) for m in retained] == [(2, 31, store)]

        position, state = checkpoints.read(checkpoints.latest())
        fresh = {name: Recorder() for name in parts}
        again = Checkpoints(directory, 2)
        for name, part in fresh.items():
            again.register(name, part)
        again.restore(state)
        assert position == Position(2, 31)
        assert fresh["history"].state == history
        assert fresh["store"].state == store
        for name, value in model.items():
            loaded = fresh["model"].state[name]
            assert loaded.dtype == value.dtype
            assert torch.equal(loaded, value)

    def test_the_file_loads_as_weights_only_with_plain_torch(self, directory):
        save(directory, 3)
        path = directory / name_of(3) / "state.pt"
        assert torch.load(path, weights_only=True)["part"]["step"] == 3

    def test_reading_touches_nothing(self, directory):
        save(directory, 1, 2)
        before = files(directory)
        latest_step(directory)
        assert files(directory) == before

    def test_without_a_checkpoint_there_is_no_latest(self, directory):
        assert open_with(directory, Part()).latest() is None

    def test_a_name_is_registered_once(self, directory):
        checkpoints = open_with(directory, Part())
        with pytest.raises(AssertionError, match="part is registered twice"):
            checkpoints.register("part", Part())

    def test_names_sort_as_positions_do(self):
        positions = [Position(e, s) for e in (0, 9, 10, 999_999) for s in (0, 9, 10, 99_999_999)]
        assert sorted(p.name for p in positions) == [p.name for p in positions]


class TestRetention:
    def test_the_newest_are_kept_and_named_oldest_first(self, directory):
        assert save(directory, 1, 2, 3, 4, keep=2) == [[1], [1, 2], [2, 3], [3, 4]]
        assert saved_steps(directory) == [3, 4]
        assert latest_step(directory) == 4

    def test_after_going_back_newest_means_last_written(self, directory):
        save(directory, 10, 20, 30)
        go_back(directory, 20)
        assert latest_step(directory) == 20
        assert save(directory, 25) == [[30, 25]]
        assert latest_step(directory) == 25
        assert save(directory, 28, 30) == [[25, 28], [28, 30]]
        assert latest_step(directory) == 30

    def test_fewer_are_kept_when_asked_to(self, directory):
        save(directory, 1, 2, 3, 4, keep=4)
        assert save(directory, 5, keep=1) == [[5]]
        assert saved_steps(directory) == [5]

    def test_saving_what_latest_names_is_a_no_op(self, directory):
        """Asked to stop right after a resume."""
        save(directory, 1, 2)
        before = files(directory)
        assert save(directory, 2) == [[1, 2]]
        assert files(directory) == before

    def test_what_latest_names_is_never_deleted(self, directory):
        """Gone back, now keeping fewer, and asked to stop right after the resume."""
        save(directory, 1, 2)
        go_back(directory, 1)
        save(directory, 1, keep=1)
        assert latest_step(directory) == 1


class TestDamage:
    @pytest.fixture(autouse=True)
    def two(self, directory):
        save(directory, 1, 2, part=Part(size=50))
        self.state = directory / name_of(2) / "state.pt"
        self.manifest = directory / name_of(2) / "manifest.json"

    def test_any_flipped_byte_of_the_state_is_found_and_named(self, directory):
        content = self.state.read_bytes()
        rng = random.Random(0)
        for offset in {0, len(content) - 1, *rng.sample(range(len(content)), 100)}:
            flipped = bytes([content[offset] ^ 1 << rng.randrange(8)])
            self.state.write_bytes(content[:offset] + flipped + content[offset + 1 :])
            assert f"{self.state} is damaged" in damage(directory, name_of(2))

    def test_a_truncated_state_is_found_and_named(self, directory):
        for size in (self.state.stat().st_size - 1, 100, 0):
            os.truncate(self.state, size)
            assert f"{self.state} is damaged" in damage(directory, name_of(2))

    @pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
    def test_a_missing_file_is_named(self, directory, name):
        path = directory / name_of(2) / name
        path.unlink()
        message = damage(directory, name_of(2))
        assert str(path) in message
        assert "No such file" in message

    @pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b'{"version": 1}'])
    def test_an_unreadable_manifest_is_damage(self, directory, content):
        self.manifest.write_bytes(content)
        assert str(directory / name_of(2)) in damage(directory, name_of(2))

    def test_another_version_is_no_damage_and_refused_by_name(self, directory):
        """A newer program's checkpoint must not be passed over, let alone set aside."""
        manifest = json.loads(self.manifest.read_text())
        self.manifest.write_text(json.dumps(manifest | {"version": 2}))
        with pytest.raises(PskdError, match="has version 2, this program reads version 1") as e:
            Checkpoints(directory, 2).read(name_of(2))
        assert not isinstance(e.value, DamagedError)
        save(directory, 3, 4, keep=1)
        assert saved_steps(directory) == [2, 4]

    def test_any_flipped_byte_of_the_manifest_is_found_or_harmless(self, directory):
        content = self.manifest.read_bytes()
        for offset in range(len(content)):
            flipped = bytes([content[offset] ^ 1])
            self.manifest.write_bytes(content[:offset] + flipped + content[offset + 1 :])
            try:
                assert latest_step(directory) == 2, f"byte {offset}"
            except PskdError as error:
                assert str(directory / name_of(2)) in str(error)

    @pytest.mark.parametrize(
        "content", [b"000000-00000009", b"", b"\0", b"gen\n", b"\xff\xfe", b"../x", None]
    )
    def test_a_latest_that_names_no_checkpoint_is_as_good_as_none(self, directory, content):
        path = directory / "latest"
        path.unlink()
        path.mkdir() if content is None else path.write_bytes(content)
        checkpoints = Checkpoints(directory, 2)
        assert checkpoints.latest() is None
        assert checkpoints.exist()
        assert checkpoints.serials() == {name_of(1): 1, name_of(2): 2}

    def test_a_checkpoint_without_a_whole_manifest_is_the_oldest(self, directory):
        self.manifest.write_bytes(b"{")
        assert Checkpoints(directory, 2).serials() == {name_of(1): 1, name_of(2): -1}
        go_back(directory, 1)
        assert save(directory, 3) == [[1, 3]]
        assert saved_steps(directory) == [1, 3]


class TestGoingBack:
    def test_what_training_goes_on_from_outlives_what_was_written_after_it(self, directory):
        save(directory, 10, 20, 30, keep=3)
        open_with(directory, Part(), keep=3).go_on_from(name_of(10), [])
        assert latest_step(directory) == 10
        assert save(directory, 15) == [[10, 15]]
        assert save(directory, 20) == [[15, 20]]

    def test_damaged_ones_are_set_aside_and_never_counted(self, directory):
        save(directory, 10, 20, 30, keep=3)
        for _ in range(2):  # the second time there is one aside already
            open_with(directory, Part()).go_on_from(name_of(10), [name_of(30), name_of(20)])
            assert saved_steps(directory) == [10]
            assert latest_step(directory) == 10
            aside = {p.name for p in directory.glob("damaged-*")}
            assert aside == {f"damaged-{name_of(20)}", f"damaged-{name_of(30)}"}
            assert save(directory, 20, 30, keep=3) == [[10, 20], [10, 20, 30]]

    def test_the_newest_stays_as_it_is(self, directory):
        save(directory, 1, 2)
        before = files(directory)
        open_with(directory, Part()).go_on_from(name_of(2), [])
        assert files(directory) == before


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant(directory, name, state):
    """Replace a checkpoint's state; its manifest vouches for it."""
    torch.save(state, directory / name / "state.pt")
    path = directory / name / "manifest.json"
    manifest = read_manifest(path, 1)
    sha256 = manifest["sha256"] | {"state.pt": sha256_of(directory / name / "state.pt")}
    write_manifest(path, 1, manifest | {"sha256": sha256})


def test_a_pickle_that_would_execute_something_is_refused(directory, tmp_path):
    save(directory, 1, 2)
    plant(directory, name_of(2), {"part": Evil(tmp_path / "executed")})
    with pytest.raises(PskdError, match=r"state.pt holds other things.*not executed") as caught:
        Checkpoints(directory, 2).read(name_of(2))
    assert not isinstance(caught.value, DamagedError), "nobody should go on as if it were"
    assert not (tmp_path / "executed").exists()
    torch.load(directory / name_of(2) / "state.pt", weights_only=False)
    assert (tmp_path / "executed").exists(), "it was a live one"


class TestHalfDone:
    def test_prepare_removes_what_a_kill_left_half_written(self, directory):
        save(directory, 1)
        before = files(directory)
        aside = directory / f".{name_of(2)}.tmp"
        aside.mkdir()
        (aside / "state.pt").write_bytes(b"half")
        (directory / ".latest.4242.tmp").write_bytes(b"0000")
        Checkpoints(directory, 2).prepare()
        assert files(directory) == before
        assert saved_steps(directory) == [1]

    def test_renamed_but_not_yet_latest_is_saved_again(self, directory):
        save(directory, 1, 2)
        go_back(directory, 1)
        assert latest_step(directory) == 1
        assert save(directory, 2, part=Part(size=77)) == [[1, 2]]
        assert latest_step(directory) == 2
        assert len(Checkpoints(directory, 2).read(name_of(2))[1]["part"]["values"]) == 77


@needs_root
class TestFullDisk:
    @pytest.fixture
    def small(self, tmp_path):
        """A disk with one checkpoint of step 1."""
        with mounted(tmp_path / "small") as disk:
            save(disk.path / "checkpoints", 1)
            yield disk

    @pytest.mark.parametrize(
        "fails_at",
        [
            "directory",
            "middle of state",
            "end of state",
            "manifest",
            "latest",
        ],
    )
    def test_a_full_disk_is_named_and_costs_nothing_that_was_saved(self, small, fails_at):
        directory = small.path / "checkpoints"
        size = (directory / name_of(1) / "state.pt").stat().st_size
        pages = -(-size // PAGE_BYTES)
        free = {
            "directory": 0,
            "middle of state": pages // 2,
            "end of state": pages - 1,
            "manifest": pages,
            "latest": pages + 1,
        }
        small.leave(free[fails_at] * PAGE_BYTES)
        with pytest.raises(PskdError, match=f"{directory / name_of(2)}.*No space left.*free some"):
            save(directory, 2)
        assert latest_step(directory) == 1
        assert list(directory.glob(".*")) == [], "what is half written takes no room"
        small.free_all()
        assert save(directory, 2) == [[1, 2]]
        assert latest_step(directory) == 2

    def test_it_fails_only_where_it_must(self, small):
        """Room for state, manifest and latest, and not a page more, is enough."""
        directory = small.path / "checkpoints"
        size = (directory / name_of(1) / "state.pt").stat().st_size
        small.leave((-(-size // PAGE_BYTES) + 2) * PAGE_BYTES)
        save(directory, 2)
        assert latest_step(directory) == 2

    def test_a_read_only_disk_is_named(self, small):
        directory = small.path / "checkpoints"
        part = Part(2)
        checkpoints = open_with(directory, part)
        small.make_read_only()
        with pytest.raises(PskdError, match=f"{directory / name_of(2)}.*Read-only"):
            checkpoints.save(Position(0, 2))
        assert latest_step(directory) == 1


FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}


def save_and_die(directory, step, operations):
    """Save, but die by SIGKILL just before the next file operation after so many."""
    part = Part(step)
    checkpoints = open_with(directory, part, keep=1)

    def count(event, _):
        nonlocal operations
        if event in FILE_EVENTS:
            if operations == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            operations -= 1

    sys.addaudithook(count)
    checkpoints.save(Position(0, step))
    checkpoints.retain()


def save_forever(directory, started):
    """Go on where `latest` says, saving after each step."""
    part = Part()
    checkpoints = open_with(directory, part)
    if checkpoints.latest() is not None:
        checkpoints.restore(checkpoints.read(checkpoints.latest())[1])
    while True:
        part.step += 1
        checkpoints.save(Position(0, part.step))
        checkpoints.retain()
        started.set()


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """What a kill at each file operation of a save leaves.

    The save replaces a checkpoint that was renamed but not named, and deletes an older one.
    """
    directory = tmp_path_factory.mktemp("crashed") / "begin"
    save(directory, 1, 2)
    go_back(directory, 1)
    left = []
    exitcode = -signal.SIGKILL
    while exitcode == -signal.SIGKILL:
        left.append(Path(shutil.copytree(directory, directory.with_name(f"{len(left)}"))))
        process = processes.Process(target=save_and_die, args=(left[-1], 2, len(left) - 1))
        process.start()
        process.join()
        exitcode = process.exitcode
    assert exitcode == 0
    return left


class TestKill:
    @pytest.fixture
    def copies(self, crashed, tmp_path):
        return [Path(shutil.copytree(left, tmp_path / left.name)) for left in crashed]

    def test_killed_before_any_file_operation_latest_is_whole(self, copies):
        assert len(copies) > 20
        steps = [latest_step(copy) for copy in copies]
        assert steps == sorted(steps), "once the new one is named, it stays"
        assert set(steps) == {1, 2}
        for copy in copies:
            assert save(copy, 2, 3, keep=1)[-1] == [3]
            assert latest_step(copy) == 3
            assert list(copy.glob(".*")) == []

    def test_killed_while_deleting_the_rest_is_deleted_later(self, copies):
        for copy in copies:
            save(copy, 2, 3, keep=1)
            assert saved_steps(copy) == [3]

    def test_killed_at_random_moments_latest_always_names_a_whole_one(self, directory):
        rng = random.Random()
        steps = [0]
        for _ in range(15):
            started = processes.Event()
            process = processes.Process(target=save_forever, args=(directory, started))
            process.start()
            assert started.wait(60)
            time.sleep(0.03 * rng.random())
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            steps.append(latest_step(directory))
        assert all(a < b for a, b in pairwise(steps)), steps
        save(directory, steps[-1] + 1)
        assert list(directory.glob(".*")) == []
