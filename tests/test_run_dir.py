"""The run directory: one owner, one configuration, files that are whole at any moment."""

import dataclasses
import json
import os
import platform
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from pskd import command_line
from pskd.errors import PskdError
from pskd.run_dir import RunDir, new_path
from pskd.run_records import begun_anew
from pskd.run_status import Status, fail
from tests.system import mounted, needs_root, processes


def own(path, owned):
    """Own a run directory until killed."""
    run = RunDir(path)
    run.acquire(wait_s=20)
    owned.set()
    time.sleep(600)


def write_status(path, first_written):
    """Rewrite status.json until killed."""
    status = Status(path, epochs=10**9, start=0)
    epoch = 0
    while True:
        status.write("running", "x" * (epoch % 3000), epoch, epoch)
        first_written.set()
        epoch += 1


def fail_together(path, reason, barrier, verdicts):
    """Be one of several ranks that fail at the same time."""
    barrier.wait()
    verdicts.put((reason, fail(path, 0, reason)))


def start(function, path):
    """A real process that does this, after it has begun to."""
    event = processes.Event()
    process = processes.Process(target=function, args=(path, event), daemon=True)
    process.start()
    assert event.wait(60)
    return process


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "0001-digits"


@pytest.fixture
def run(path):
    """Owned by this process, so that the directory is there."""
    run = RunDir(path)
    run.acquire(0)
    return run


@pytest.fixture
def owner(path):
    process = start(own, path)
    yield process
    process.kill()
    process.join()


class TestLock:
    def test_a_living_owner_is_named(self, path, owner):
        """Process, host, heartbeat and remedy; the owner keeps the lock."""
        for heartbeat in ("never", "42 s ago"):
            with pytest.raises(PskdError) as caught:
                RunDir(path).acquire(wait_s=0)
            message = str(caught.value)
            assert f"{path} is in use by process {owner.pid} on host {socket.gethostname()}" in (
                message
            )
            assert f"last heartbeat {heartbeat}" in message
            assert "another --run.dir" in message
            RunDir(path).write_json("status.json", {"heartbeat": time.time() - 42})

    def test_an_owner_is_waited_for_no_longer_than_asked(self, path, owner):
        begun = time.monotonic()
        with pytest.raises(PskdError, match="in use"):
            RunDir(path).acquire(wait_s=0.5)
        assert 0.5 <= time.monotonic() - begun < 10

    def test_a_dying_owner_is_waited_for(self, path, owner):
        threading.Timer(0.3, owner.kill).start()
        run = RunDir(path)
        run.acquire(wait_s=60)
        assert not owner.is_alive()
        with pytest.raises(PskdError, match=f"in use by process {os.getpid()} on"):
            RunDir(path).acquire(wait_s=0)

    def test_a_dead_owner_is_no_obstacle_and_forgotten(self, path, owner):
        owner.kill()
        owner.join()
        RunDir(path).acquire(wait_s=0)
        assert (path / "lock").read_text().count("process") == 1

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_a_directory_that_cannot_be_made_is_named(self, tmp_path, name):
        (tmp_path / "file").touch()
        with pytest.raises(
            PskdError, match=f"{tmp_path / name} cannot be made: a file .*--run.dir"
        ):
            RunDir(tmp_path / name).acquire(wait_s=0)


class TestNewPath:
    def test_numbers_go_on_from_the_highest(self, tmp_path):
        root = tmp_path / "new" / "runs"
        assert new_path(root, "a") == root / "0001-a"
        assert new_path(root, "b") == root / "0002-b"
        for other in ("0041-old", "notes", "12-short", ".hidden"):
            (root / other).mkdir()
        (root / "0043.txt").touch()
        made = new_path(root, "a")
        assert made == root / "0044-a"
        assert list(made.iterdir()) == []

    def test_jobs_that_start_together_get_directories_of_their_own(self, tmp_path):
        with ThreadPoolExecutor(8) as threads:
            made = list(threads.map(lambda _: new_path(tmp_path, "a"), range(40)))
        assert sorted(p.name for p in made) == [f"{i:04d}-a" for i in range(1, 41)]

    def test_a_root_that_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(PskdError, match=f"{tmp_path / 'file'} cannot be written.*--run.root"):
            new_path(tmp_path / "file", "a")


DEFAULT = command_line.load([])
FIELDS = [
    (section.name, field.name, field.metadata["tag"])
    for section in dataclasses.fields(DEFAULT)
    for field in dataclasses.fields(getattr(DEFAULT, section.name))
]


def value_of(section, name):
    return getattr(getattr(DEFAULT, section), name)


def another(value):
    """A different value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [7] if isinstance(value, list) else "another"


def changed(*keys):
    config = DEFAULT
    for section, name in keys:
        values = dataclasses.replace(
            getattr(config, section), **{name: another(value_of(section, name))}
        )
        config = dataclasses.replace(config, **{section: values})
    return config


class TestReconcile:
    @pytest.fixture(autouse=True)
    def begun(self, run):
        run.reconcile(DEFAULT)
        self.saved = run.path / "config.yaml"
        self.before = self.saved.read_bytes()

    def test_the_same_configuration_goes_on(self, run):
        run.reconcile(command_line.load([]))
        assert self.saved.read_bytes() == self.before

    def test_what_is_saved_is_what_the_run_resolves_to(self):
        again = command_line.load(["--config", str(self.saved)])
        assert again == DEFAULT

    @pytest.mark.parametrize(("section", "name"), [f[:2] for f in FIELDS if f[2] == "numerics"])
    def test_each_changed_numeric_is_refused_by_name(self, run, section, name):
        old = value_of(section, name)
        with pytest.raises(PskdError) as caught:
            run.reconcile(changed((section, name)))
        message = str(caught.value)
        assert f"{section}.{name} was {old}, now {another(old)}." in message
        assert str(run.path) in message
        assert self.saved.read_bytes() == self.before

    def test_all_that_changed_is_named_at_once(self, run):
        with pytest.raises(PskdError, match=r"train\.seed was 0, now 1") as caught:
            run.reconcile(changed(("optimizer", "lr"), ("train", "seed"), ("run", "threads")))
        assert "optimizer.lr was 0.1, now 1.1;" in str(caught.value)
        assert "run.threads" not in str(caught.value)

    def test_speed_and_output_may_change_and_are_saved(self, run):
        free = [f[:2] for f in FIELDS if f[2] in ("speed", "output")]
        assert {f[2] for f in FIELDS} == {"numerics", "content", "speed", "output"}
        run.reconcile(changed(*free))
        saved = yaml.safe_load(self.saved.read_text())
        for section, name in free:
            if (section, name) != ("run", "dir"):  # a moved run is the same run
                assert saved[section][name] == another(value_of(section, name))
        run.reconcile(DEFAULT)
        assert self.saved.read_bytes() == self.before

    @pytest.mark.parametrize("damaged", ["run: {}\ndata:\n", "- a", "", "run: [", "run: {}\nx: 1"])
    def test_a_damaged_one_is_refused_by_name(self, run, damaged):
        self.saved.write_text(damaged)
        with pytest.raises(PskdError) as caught:
            run.reconcile(DEFAULT)
        message = str(caught.value)
        assert message.startswith(str(self.saved))
        assert message.endswith(begun_anew(run.path))
        assert self.saved.read_text() == damaged

    @pytest.mark.parametrize("value", [1e-05, 5e-324, 1 / 3, 1e22, 100.0])
    def test_a_float_that_went_through_yaml_is_no_change(self, run, value):
        optimizer = dataclasses.replace(DEFAULT.optimizer, weight_decay=value)
        config = dataclasses.replace(DEFAULT, optimizer=optimizer)
        self.saved.unlink()
        run.reconcile(config)
        run.reconcile(config)


class TestStarts:
    def test_starts_are_numbered_and_changes_named(self, run):
        facts = {"torch": "2.14", "world": 2, "threads": 1}
        other = facts | {"world": 4, "gpu": "x"}
        given = [facts, facts, other, other]
        number, name, changes = zip(*(run.record_start(f, None) for f in given), strict=True)
        assert number == (0, 1, 2, 3)
        assert len(set(name)) == 1
        assert changes == ([], [], ["world was 2, now 4", "gpu was None, now x"], [])
        starts = json.loads((run.path / "env.json").read_text())
        assert [s["start"] for s in starts] == [0, 1, 2, 3]
        assert starts[1]["facts"] == facts
        assert starts[0]["host"] == platform.node()
        assert all(abs(s["time"] - time.time()) < 600 and s["command"] for s in starts)

    def test_a_lost_list_begins_behind_the_segments_that_there_are(self, run):
        """Whose names hold the number of their start; another run's count for nothing."""
        run.record_start({}, None)
        for name in ("000002-00000-of-00001", "000000-00001-of-00002", "adopted-00007"):
            segment = run.store / "gen-000000" / f"seg-{name}.psk"
            segment.parent.mkdir(parents=True, exist_ok=True)
            segment.touch()
        (run.path / "env.json").unlink()
        assert run.record_start({}, None).number == 3
        assert run.record_start({}, None).number == 3 + 1

    def test_a_fact_that_is_gone_is_named(self, run):
        run.record_start({"torch": "2.14", "gpu": "x"}, None)
        assert run.record_start({"torch": "2.14"}, None).changes == ["gpu was x, now None"]

    def test_runs_have_names_of_their_own(self, run, tmp_path):
        other = RunDir(tmp_path / "other")
        other.path.mkdir()
        assert run.record_start({}, None).run != other.record_start({}, None).run

    def test_where_a_run_began_is_recorded(self, run):
        origin = {"checkpoint": "there", "changes": ["train.epochs was 1, now 2"]}
        run.record_start({}, origin)
        assert json.loads((run.path / "env.json").read_text())[0]["origin"] == origin


class TestSmallFiles:
    def test_metrics_are_exactly_the_lines_given(self, run):
        """Fewer after going back to an older checkpoint, none in a new run."""
        lines = [{"epoch": e, "nll": 0.1 * e, "top5_error": None} for e in range(5)]
        for given in ([], lines, lines[:2], lines, []):
            run.write_metrics(given)
            text = (run.path / "metrics.jsonl").read_text()
            assert [json.loads(line) for line in text.splitlines()] == given
            assert text.count("\n") == len(given)

    def test_json_comes_back_and_absence_is_none(self, run):
        assert run.read_json("result.json") is None
        run.write_json("result.json", {"best": [1, None, 0.5]})
        assert run.read_json("result.json") == {"best": [1, None, 0.5]}

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [
            ("result.json", "Remove it: `train.py --run.dir {run}` writes it again"),
            ("env.json", "Restore it from a copy."),  # it numbers the starts
        ],
    )
    @pytest.mark.parametrize("content", [b"", b'{"a"', b"\xff"])
    def test_a_damaged_json_is_named_with_what_to_do(self, run, name, remedy, content):
        (run.path / name).write_bytes(content)
        with pytest.raises(PskdError) as caught:
            run.read_json(name)
        assert str(caught.value).startswith(f"{run.path / name} cannot be read (")
        assert remedy.format(run=run.path) in str(caught.value)

    def test_nothing_is_left_beside_what_was_written(self, run):
        run.write_json("a.json", 1)
        run.write_metrics([{}])
        run.reconcile(DEFAULT)
        assert {p.name for p in run.path.iterdir()} == {
            "a.json",
            "config.yaml",
            "lock",
            "metrics.jsonl",
        }

    def test_a_write_that_fails_leaves_the_old_content(self, run):
        run.write_json("a.json", 1)
        with pytest.raises(TypeError):
            run.write_json("a.json", object())
        assert run.read_json("a.json") == 1


class TestStatus:
    def test_it_says_where_the_run_is(self, run):
        status = Status(run.path, epochs=9, start=0)
        status.write("stopped", "asked to", 3, 14)
        value = run.read_json("status.json")
        assert abs(value.pop("heartbeat") - time.time()) < 600
        assert value == {
            "state": "stopped",
            "reason": "asked to",
            "epoch": 3,
            "epochs": 9,
            "step": 14,
            "start": 0,
            "host": platform.node(),
            "pid": os.getpid(),
        }

    def test_beats_are_written_every_few_seconds_only(self, run, monkeypatch):
        clock = iter([100.0, 104.9, 105.0, 109.9, 110.0])
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        status, seen = Status(run.path, epochs=9, start=0), []
        for step in range(5):
            status.beat(0, step)
            seen.append(run.read_json("status.json")["step"])
        assert seen == [0, 0, 2, 2, 4]

    def test_readers_never_see_half_a_status(self, run):
        """Nor does a kill leave one."""
        writer = start(write_status, run.path)
        epochs = set()
        while len(epochs) < 50:
            epochs.add(run.read_json("status.json")["epoch"])
        writer.kill()
        writer.join()
        assert run.read_json("status.json")["epoch"] >= max(epochs)

    def test_of_failing_ranks_one_is_the_first(self, run):
        Status(run.path, epochs=2, start=0).write("running", None, 1, 5)
        barrier, verdicts = processes.Barrier(4), processes.SimpleQueue()
        ranks = [
            processes.Process(target=fail_together, args=(run.path, f"rank {r}", barrier, verdicts))
            for r in range(4)
        ]
        for rank in ranks:
            rank.start()
        told = dict(verdicts.get() for _ in ranks)
        for rank in ranks:
            rank.join()
        (first,) = (reason for reason, earlier in told.items() if earlier is None)
        assert {earlier for earlier in told.values() if earlier is not None} == {first}
        value = run.read_json("status.json")
        assert (value["state"], value["reason"], value["epoch"]) == ("failed", first, 1)
        assert fail(run.path, 0, "too late") is not None
        assert run.read_json("status.json") == value

    @pytest.mark.parametrize("state", ["complete", "stopped", "failed"])
    def test_a_run_that_ended_does_not_fail_any_more(self, run, state):
        Status(run.path, epochs=2, start=0).write(state, "because", 2, 0)
        assert fail(run.path, 0, "afterwards") is not None
        value = run.read_json("status.json")
        assert (value["state"], value["reason"]) == (state, "because")

    def test_a_start_that_failed_before_it_trained_is_a_failed_one(self, run):
        assert fail(run.path, 0, "early") is None
        assert fail(run.path, 0, "later") is not None
        value = run.read_json("status.json")
        assert (value["state"], value["reason"], value["start"]) == ("failed", "early", 0)

    @pytest.mark.parametrize("state", ["stopped", "failed", "running"])
    def test_a_new_start_that_fails_replaces_what_the_old_one_said(self, run, state):
        Status(run.path, epochs=2, start=0).write(state, "because", 1, 7)
        assert fail(run.path, 1, "store damaged") is None
        value = run.read_json("status.json")
        assert (value["state"], value["reason"]) == ("failed", "store damaged")
        assert (value["epoch"], value["step"]) == (1, 7)

    def test_a_process_left_over_from_an_earlier_start_changes_nothing(self, run):
        status = Status(run.path, epochs=2, start=1)
        status.write("running", None, 1, 4)
        assert fail(run.path, 0, "lost a peer, at last") is not None
        status.write("complete", None, 2, 0)
        assert run.read_json("status.json")["state"] == "complete"

    @pytest.mark.parametrize("content", [b"", b'{"state": "run', b"\0" * 64, b"\xff\xfe", b"[]"])
    def test_a_damaged_one_keeps_no_run_from_going_on_or_failing(self, run, content):
        """As a disk that was full or a machine that lost its power may leave it."""
        path = run.path / "status.json"
        path.write_bytes(content)
        assert fail(run.path, 0, "early") is None
        assert run.read_json("status.json")["reason"] == "early"
        path.write_bytes(content)
        status = Status(run.path, epochs=2, start=1)
        status.beat(0, 3)
        assert run.read_json("status.json")["step"] == 3
        path.write_bytes(content)
        status.write("complete", None, 2, 0)
        assert run.read_json("status.json")["state"] == "complete"

    def test_a_damaged_one_does_not_hide_the_owner(self, path, owner):
        (path / "status.json").write_text("{")
        with pytest.raises(PskdError, match=f"{path} is in use by process {owner.pid}"):
            RunDir(path).acquire(wait_s=0)

    @needs_root
    def test_a_full_disk_does_not_hide_the_failure(self, tmp_path):
        with mounted(tmp_path / "small") as disk:
            run = RunDir(disk.path)
            Status(run.path, epochs=2, start=0).write("running", None, 1, 4)
            (disk.path / "status.lock").touch()
            disk.leave(0)
            assert fail(disk.path, 0, "no space for checkpoint") is None
            assert run.read_json("status.json")["reason"] == "no space for checkpoint"

    def test_a_beat_does_not_undo_another_ranks_failure(self, run):
        """Rank 0 trains on until it needs the rank that has just failed."""
        status = Status(run.path, epochs=2, start=0)
        status.write("running", None, 1, 4)
        assert fail(run.path, 0, "rank 1: disk full") is None
        status.beat(1, 5)
        assert fail(run.path, 0, "lost a peer") is not None
        assert run.read_json("status.json")["reason"] == "rank 1: disk full"
