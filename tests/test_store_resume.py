"""The store against a dict after any interruption: full disks, resumed runs, what is deleted.

The ranks are threads (`store_worlds.py`). Letters: N samples, C classes.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.store_worlds import ALL, N, World, assert_rows, probabilities, refused, segments, worlds
from tests.system import mounted, needs_root

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def named(*states):
    return {e[0] for s in states for e in (*s["finished"], *s["growing"])}


@needs_root
class TestFullDisk:
    @pytest.fixture
    def small(self, tmp_path):
        with mounted(tmp_path / "small") as disk:
            yield disk

    def test_a_full_disk_stops_with_the_path_and_a_restart_loses_nothing(self, small):
        """The run resumes from its checkpoint once there is room."""
        job = World(small.path)
        first, second = probabilities(ALL, 0), probabilities(ALL, 1)
        job.begin(0)
        job.train(first)
        job.begin(1)
        state = job.checkpoint()
        small.leave(0)
        message = refused(lambda: job.train(second))
        assert f"{small.path}/gen-000001/seg-000000-" in message
        assert "Free some space" in message
        job.end()
        small.free_all()
        again = World(small.path, 2, start=1, state=state)
        again.begin(1)
        again.train(second)
        assert_rows(again.past(), first)
        again.begin(2)
        assert_rows(again.past(), second)
        again.end()

    def test_no_room_for_the_manifest_is_named(self, small):
        job = World(small.path)
        job.begin(0)
        job.train(probabilities(ALL, 0))
        small.leave(0)
        assert f"{small.path}/gen-000000/manifest.json" in refused(lambda: job.begin(1))


class TestResume:
    @worlds
    def test_rows_after_the_checkpoint_are_ignored(self, make, world):
        """Killed after more rows were written; the new start writes segments of its own."""
        job = make(2)
        first, second, lost = (probabilities(ALL, seed) for seed in range(3))
        job.begin(0)
        job.train(first)
        job.begin(1)
        job.train({i: second[i] for i in range(10)})
        state = job.checkpoint()
        job.train({i: lost[i] for i in range(10, 18)})
        again = make(world, start=1, state=state)
        again.begin(1)
        assert_rows(again.past(), first)
        again.train({i: second[i] for i in range(10, 15)})
        again.begin(2)
        assert_rows(again.past(), first | {i: second[i] for i in range(15)})

    def test_killed_before_the_first_checkpoint_starts_from_nothing(self, make):
        job = make(2)
        job.begin(0)
        job.train(probabilities(ALL, 0))
        again = make(2, start=1)
        again.begin(0)
        rows = probabilities([4, 5], 1)
        again.train(rows)
        again.begin(1)
        assert_rows(again.past(), rows)

    def test_either_of_two_checkpoints_of_an_epoch_can_be_resumed(self, make):
        """The older one first, then the newer: nothing that the first did is in the way."""
        job = make(2)
        rows, other = probabilities(ALL, 0), probabilities(ALL, 1)
        job.begin(0)
        states = []
        for low in (0, 6, 12):
            job.train({i: rows[i] for i in range(low, low + 6)})
            states.append(job.checkpoint())
        for start, (state, trained) in enumerate([(states[0], 6), (states[1], 12)], start=1):
            again = make(3, start, state)
            again.begin(0)
            again.train({i: other[i] for i in range(20, N)})
            again.begin(1)
            want = {i: rows[i] for i in range(trained)} | {i: other[i] for i in range(20, N)}
            assert_rows(again.past(), want)

    def test_begun_on_2_ranks_continued_on_4_ended_on_1(self, make):
        first, second = probabilities(ALL, 0), probabilities(ALL, 1)
        state, trained = None, 0
        for start, (world, until) in enumerate([(2, 8), (4, 17), (1, N)]):
            job = make(world, start, state)
            job.begin(0 if start == 0 else 1)
            if start == 0:
                job.train(first)
                job.begin(1)
            assert_rows(job.past(), first)
            job.train({i: second[i] for i in range(trained, until)})
            state, trained = job.checkpoint(), until
        assert [e[0].partition("-of-")[2] for e in state["growing"]] == (
            ["00002.psk"] * 2 + ["00004.psk"] * 4 + ["00001.psk"]
        )
        job.begin(2)
        assert_rows(job.past(), second)

    def test_a_start_whose_number_was_used_is_refused(self, make):
        job = make()
        job.begin(0)
        job.train(probabilities(ALL, 0))
        again = make(start=0, state=job.checkpoint())
        again.begin(0)
        assert "seg-000000-00000-of-00001.psk: File exists" in refused(
            lambda: again.train(probabilities(ALL, 1))
        )


class TestRetention:
    def train_with_checkpoints(self, job, epochs):
        """A checkpoint within each epoch and one at its end."""
        states = []
        for epoch in range(epochs):
            job.begin(epoch)
            job.train(probabilities(range(12), epoch))
            states.append(job.checkpoint())
            job.train(probabilities(range(12, N), epoch))
            job.begin(epoch + 1)
            states.append(job.checkpoint())
        return states

    @worlds
    @pytest.mark.parametrize("kept", [(), (-1,), (-2, -1), (0,), (1, 4), range(8)])
    def test_exactly_what_nobody_names_is_deleted(self, make, store_dir, world, kept):
        """Generations without segments go as a whole; every kept state still loads."""
        job = make(world)
        all_states = self.train_with_checkpoints(job, 4)
        job.train(probabilities(range(6), 9))  # growing, named by nobody yet
        growing = {name for name in segments(store_dir) if name.startswith("gen-000004/")}
        states = [all_states[k] for k in kept]
        expected = named(*states, job.stores[0].state_dict()) | growing
        job.stores[0].retain(iter(states))
        assert segments(store_dir) == expected
        directories = {name.partition("/")[0] for name in expected}
        assert {p.name for p in store_dir.iterdir()} == directories
        for start, state in enumerate(states, start=1):
            make(2, start, state).begin(state["epoch"])
        job.begin(5)
        assert_rows(job.past(), probabilities(ALL, 3) | probabilities(range(6), 9))

    def test_what_an_earlier_start_left_behind_goes(self, make, store_dir):
        """Segments of an abandoned future too, but not those of a kept checkpoint there."""
        job = make(2)
        states = self.train_with_checkpoints(job, 3)
        killed = make(2, start=1, state=states[0])
        killed.begin(0)
        killed.train(probabilities([21], 8))
        again = make(3, start=2, state=states[0])
        again.begin(0)
        again.train(probabilities([20], 9))
        again.stores[0].retain([states[0], states[3]])
        own = {name for name in segments(store_dir) if "/seg-000002-" in name}
        assert len(own) == 1
        assert segments(store_dir) == named(states[0], states[3]) | own
        again.begin(1)
        assert sorted(again.past()) == [*range(12), 20]

    def test_a_manifest_that_a_kill_left_half_written_is_no_obstacle(self, make, store_dir):
        job = make()
        states = self.train_with_checkpoints(job, 3)
        (store_dir / "gen-000000" / ".manifest.json.4242.tmp").write_bytes(b"{")
        job.stores[0].retain(states[-1:])
        assert not (store_dir / "gen-000000").exists()


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of steps, epochs, checkpoints, crashes and retention, against a dict."""

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.finished, self.growing = {}, {}
        self.epoch = self.starts = self.seed = 0
        self.checkpoints = []

    def open(self, world, state=None):
        directory = Path(self.directory.name)
        self.job = World(directory, world, self.starts, state)
        self.starts += 1
        self.job.begin(self.epoch)

    @initialize(world=st.integers(1, 4))
    def start(self, world):
        self.open(world)

    @rule(ids=st.sets(st.integers(0, N - 1), min_size=1), ahead=st.booleans())
    def train(self, ids, ahead):
        """A step; an epoch visits a sample once."""
        fresh = sorted(ids - set(self.growing))
        if ahead:
            self.job.each(lambda store, rank: store.prefetch(np.array(sorted(ids))))
        self.seed += 1
        rows = probabilities(fresh, self.seed)
        self.job.train(rows)
        self.growing |= rows

    @rule()
    def next_epoch(self):
        self.epoch += 1
        self.job.begin(self.epoch)
        self.finished, self.growing = self.finished | self.growing, {}

    @rule()
    def begin_again(self):
        self.job.begin(self.epoch)

    @rule(keep=st.integers(1, 3))
    def checkpoint(self, keep):
        model = (self.epoch, dict(self.finished), dict(self.growing))
        self.checkpoints = [*self.checkpoints, (self.job.checkpoint(), model)][-keep:]
        self.job.stores[0].retain(state for state, _ in self.checkpoints)

    @precondition(lambda self: self.checkpoints)
    @rule(world=st.integers(1, 4), data=st.data())
    def crash_and_resume(self, world, data):
        self.job.end()
        state, model = data.draw(st.sampled_from(self.checkpoints), label="checkpoint")
        self.epoch, self.finished, self.growing = model[0], dict(model[1]), dict(model[2])
        self.open(world, state)

    @invariant()
    def last_epoch_is_read(self):
        if self.starts:
            assert_rows(self.job.past(), self.finished)

    def teardown(self):
        self.job.end()
        self.directory.cleanup()


TestAnySequence = StoreMachine.TestCase
TestAnySequence.settings = settings(untimed, max_examples=30, stateful_step_count=20)
