"""The store against a dict: any world, any interruption, real files, real concurrency.

The ranks of a world are threads of this process that meet at a barrier where real ones would
meet in a collective. Letters: N samples, B of a batch, C classes.
"""

import json
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pskd.errors import PskdError
from pskd.order import partition
from pskd.store import open_generation
from pskd.store.store import Store, StoreOptions
from tests.system import mounted, needs_root

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
N, C = 23, 5
ALL = np.arange(N)
worlds = pytest.mark.parametrize("world", [1, 2, 3, 4])


class ThreadPeers:
    """One of several ranks that are threads; `board` and `barrier` are shared by all."""

    def __init__(self, rank, board, barrier):
        self.rank, self.size = rank, len(board)
        self.local_rank, self.local_size = rank, len(board)
        self.colleagues = tuple(range(len(board)))
        self._board, self._barrier = board, barrier

    def gather(self, value):
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values

    def spread(self, directory, mine):
        """They see one directory."""


class World:
    """The stores of all ranks of one job, used by all ranks at once."""

    def __init__(self, directory, size=1, start=0, state=None, **other):
        options = {"n": N, "classes": C, "identity": "data", "run": "run"} | other
        encoding = options.pop("encoding", "float32")
        options |= {"options": StoreOptions(encoding), "device": torch.device("cpu")}
        board, self._barrier = [None] * size, threading.Barrier(size, timeout=20)
        self.size = size
        self.stores = [
            Store(directory, start=start, peers=ThreadPeers(r, board, self._barrier), **options)
            for r in range(size)
        ]
        self._threads = ThreadPoolExecutor(size)
        if state is not None:
            self.each(lambda store, rank: store.load_state_dict(state))

    def each(self, action):
        """Every rank's result; the first rank's own error if some fail."""

        def run(rank):
            try:
                return action(self.stores[rank], rank)
            except BaseException:
                self._barrier.abort()
                raise

        futures = [self._threads.submit(run, rank) for rank in range(self.size)]
        errors = [e for f in futures if (e := f.exception()) is not None]
        own = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        if errors:
            raise (own or errors)[0]
        return [f.result() for f in futures]

    def begin(self, epoch):
        self.each(lambda store, rank: store.begin_epoch(epoch))

    def train(self, rows):
        """Remember id -> row in one step, as the plan would split it over the ranks."""
        ids = np.array(list(rows), np.int64)
        cuts = partition(len(ids), self.size)

        def step(store, rank):
            mine = ids[cuts[rank] : cuts[rank + 1]]
            if len(mine):
                store.remember(mine, torch.stack([rows[i] for i in mine.tolist()]))

        self.each(step)

    def checkpoint(self):
        """What a checkpoint would hold, after a trip through JSON; equal on all ranks."""

        def save(store, rank):
            store.commit()
            return store.state_dict()

        states = self.each(save)
        assert states.count(states[0]) == self.size
        text = json.dumps(states[0])
        assert json.loads(text) == states[0], "tuples, numpy numbers or int keys would differ"
        return json.loads(text)

    def past(self):
        """id -> last epoch's row; equal on all ranks, zeros where absent."""
        answers = self.each(lambda store, rank: store.past(ALL))
        rows_NC, present_N = answers[0]
        for other_rows_NC, other_present_N in answers:
            assert bits(other_rows_NC) == bits(rows_NC)
            assert torch.equal(other_present_N, present_N)
        assert rows_NC.dtype == torch.float32
        assert rows_NC.shape == (N, C)
        assert not rows_NC[~present_N].any()
        return {i: rows_NC[i] for i in ALL.tolist() if present_N[i]}

    def end(self):
        """As when the processes end: nothing is committed."""
        for store in self.stores:
            store.close()
        self._threads.shutdown()


def probabilities(ids, seed, classes=C):
    """id -> a row, from confident to flat."""
    generator = torch.Generator().manual_seed(seed)
    scale = 20 * torch.rand(N, 1, generator=generator)
    rows_NC = torch.softmax(scale * torch.randn(N, classes, generator=generator), dim=1)
    return {int(i): rows_NC[int(i)] for i in ids}


def bits(rows):
    return rows.numpy().tobytes()


def assert_rows(got, want):
    assert sorted(got) == sorted(want)
    for i, row in got.items():
        assert bits(row) == bits(want[i]), f"row of sample {i}"


def files(directory):
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def segments(directory):
    return {name for name in files(directory) if name.endswith(".psk")}


def named(*states):
    return {e[0] for s in states for e in (*s["finished"], *s["growing"])}


def refused(action):
    with pytest.raises(PskdError) as caught:
        action()
    return str(caught.value)


@pytest.fixture
def make(tmp_path):
    """Makes worlds on one directory, and ends them."""
    made = []

    def make(size=1, start=0, state=None, **options):
        made.append(World(tmp_path / "store", size, start, state, **options))
        return made[-1]

    yield make
    for world in made:
        world.end()


@pytest.fixture
def store_dir(tmp_path):
    return tmp_path / "store"


class TestEpochs:
    @worlds
    def test_in_the_first_epoch_nothing_is_present(self, make, world):
        job = make(world)
        job.begin(0)
        assert job.past() == {}

    @worlds
    def test_an_epoch_reads_the_one_before_even_while_it_writes(self, make, world):
        job = make(world)
        first, second = probabilities(ALL, 1), probabilities(ALL, 2)
        job.begin(0)
        job.train(first)
        assert job.past() == {}
        job.begin(1)
        assert_rows(job.past(), first)
        job.train(second)
        job.checkpoint()
        assert_rows(job.past(), first)
        job.begin(2)
        assert_rows(job.past(), second)

    @worlds
    def test_a_skipped_sample_keeps_its_row_to_the_bit_for_any_number_of_epochs(self, make, world):
        job = make(world)
        want = probabilities(ALL[:20], 0)
        job.begin(0)
        job.train(want)
        for epoch in range(1, 5):
            job.begin(epoch)
            assert_rows(job.past(), want)
            trained = probabilities(range(3 * epoch, 3 * epoch + 4), epoch)
            want |= trained
            job.train(trained)
        job.begin(5)
        assert_rows(job.past(), want)
        job.begin(6)  # an epoch that trains nothing
        assert_rows(job.past(), want)

    @pytest.mark.parametrize("encoding", ["float32", "float16"])
    def test_contents_do_not_depend_on_the_world(self, tmp_path, encoding):
        """The same bits from 1, 2, 3 and 4 ranks, whatever was carried forward."""
        contents = []
        for world in (1, 2, 3, 4):
            job = World(tmp_path / str(world), world, encoding=encoding)
            for epoch in range(3):
                job.begin(epoch)
                rows = probabilities(np.random.default_rng(epoch).permutation(N)[:17], epoch)
                for low in range(0, 17, 8):
                    job.train({i: rows[i] for i in list(rows)[low : low + 8]})
            job.begin(3)
            contents.append({i: bits(row) for i, row in job.past().items()})
            job.end()
        assert len(contents[0]) > 17
        assert contents.count(contents[0]) == 4

    @given(st.integers(1, 40), st.integers(0, 10**6))
    @settings(untimed, max_examples=20)
    def test_float32_keeps_every_bit_and_float16_rounds_and_normalises(self, classes, seed):
        rows = probabilities(ALL, seed, classes)
        rows[0] = torch.eye(classes)[0]
        rows[1] = torch.full((classes,), 1 / classes)
        with tempfile.TemporaryDirectory() as directory:
            for encoding in ("float32", "float16"):
                job = World(Path(directory, encoding), encoding=encoding, classes=classes)
                job.begin(0)
                job.train(rows)
                job.begin(1)
                got_NC = job.stores[0].past(ALL)[0]
                job.begin(2)
                assert bits(job.stores[0].past(ALL)[0]) == bits(got_NC), "carried forward"
                job.end()
                want_NC = torch.stack([rows[i] for i in ALL.tolist()])
                if encoding == "float32":
                    assert bits(got_NC) == bits(want_NC)
                assert (got_NC - want_NC).abs().max() <= 2.5e-4
                assert (got_NC.sum(dim=1) - 1).abs().max() < 1e-6

    def test_float32_keeps_every_bit_of_odd_numbers(self, make):
        """Signed zeros and the smallest numbers: the encoding does not compute."""
        job = make()
        odd = torch.tensor([-0.0, 1e-45, 1e-39, 1 - 2**-24, 2**-24])
        job.begin(0)
        job.train({4: odd})
        job.begin(1)
        assert bits(job.past()[4]) == bits(odd)

    def test_of_repeated_samples_the_last_wins(self, make):
        """Within a step, between steps; between ranks the higher rank; then the later start."""
        job = make(2)
        rows = [probabilities([0, 1, 2, 3], seed) for seed in range(4)]
        job.begin(0)
        job.stores[0].remember(np.array([0, 1, 0]), torch.stack([rows[s][0] for s in range(3)]))
        job.stores[0].remember(np.array([1]), rows[2][1][None])
        job.stores[1].remember(np.array([2]), rows[0][2][None])
        job.stores[0].remember(np.array([2]), rows[1][2][None])
        job.stores[1].remember(np.array([3]), rows[0][3][None])
        again = make(1, start=1, state=job.checkpoint())
        again.begin(0)
        again.train({3: rows[3][3]})
        again.begin(1)
        want = {0: rows[2][0], 1: rows[2][1], 2: rows[0][2], 3: rows[3][3]}
        assert_rows(again.past(), want)

    @worlds
    def test_beginning_an_epoch_again_changes_nothing(self, make, store_dir, world):
        job = make(world)
        rows = probabilities(ALL, 0)
        job.begin(0)
        job.train(dict(list(rows.items())[:9]))
        job.begin(0)
        job.train(dict(list(rows.items())[9:]))
        job.begin(1)
        before, state = files(store_dir), job.checkpoint()
        job.begin(1)
        assert (files(store_dir), job.checkpoint()) == (before, state)
        assert_rows(job.past(), rows)

    @pytest.mark.parametrize("epoch", [2, -1])
    def test_epochs_follow_one_another(self, make, epoch):
        job = make()
        job.begin(0)
        with pytest.raises(AssertionError):
            job.begin(epoch)


class TestReading:
    def test_a_prefetch_never_changes_the_answer(self, make):
        """Used, for other ids, repeated, dropped, or from the epoch before."""
        job = make()
        store, first, second = job.stores[0], probabilities(ALL, 1), probabilities(ALL, 2)
        job.begin(0)
        job.train(first)
        job.begin(1)
        for ahead, asked in [([3, 1], [3, 1]), ([3, 1], [1, 3]), ([2], [2, 4]), ([5, 6], [5])]:
            store.prefetch(np.array(ahead))
            rows_BC, present_B = store.past(np.array(asked))
            assert present_B.tolist() == [True] * len(asked)
            assert bits(rows_BC) == b"".join(bits(first[i]) for i in asked)
        store.prefetch(np.array([7]))
        store.prefetch(np.array([8]))
        assert bits(store.past(np.array([7]))[0][0]) == bits(first[7])
        store.prefetch(np.array([9]))
        job.train(second)
        job.begin(2)
        assert bits(store.past(np.array([9]))[0][0]) == bits(second[9])

    @pytest.mark.parametrize("encoding", ["float32", "float16"])
    def test_absent_rows_are_zeros_and_marked(self, make, encoding):
        job = make(2, encoding=encoding)
        job.begin(0)
        job.train(probabilities([2, 5], 0))
        job.begin(1)
        rows_BC, present_B = job.stores[1].past(np.array([5, 6, 2, 5, 0]))
        assert present_B.tolist() == [True, False, True, True, False]
        assert torch.isfinite(rows_BC).all()
        assert not rows_BC[~present_B].any()
        assert bits(rows_BC[0]) == bits(rows_BC[3])

    @worlds
    def test_a_finished_generation_is_a_table(self, make, store_dir, tmp_path, world):
        job = make(world)
        rows = probabilities([0, 3, 7, 11, N - 1], 0)
        job.begin(0)
        job.train(rows)
        job.begin(1)
        moved = shutil.copytree(store_dir, tmp_path / "elsewhere")
        for path in (store_dir / "gen-000000", str(moved / "gen-000000")):
            table = open_generation(path)
            table.verify()
            assert np.flatnonzero(table.present_N).tolist() == sorted(rows)
            got_BC = table[[11, 0, 11]]
            assert got_BC.dtype == torch.float32
            assert bits(got_BC) == bits(torch.stack([rows[11], rows[0], rows[11]]))
            with pytest.raises(KeyError, match=r"never seen: \[1, 2\]"):
                table[[0, 1, 3, 2]]
            with pytest.raises(KeyError, match=r"outside 0\.\.22: \[-1, 23\]"):
                table[[0, -1, 1, 23]]

    @pytest.mark.parametrize("encoding", ["float32", "float16"])
    def test_asking_for_nothing_gives_nothing(self, make, store_dir, encoding):
        job = make(encoding=encoding)
        job.begin(0)
        job.train(probabilities(ALL, 0))
        job.begin(1)
        assert job.stores[0].past(np.array([], np.int64))[0].shape == (0, C)
        assert open_generation(store_dir / "gen-000000")[[]].shape == (0, C)

    def test_only_a_finished_generation_can_be_opened(self, make, store_dir):
        job = make()
        job.begin(0)
        job.train(probabilities(ALL, 0))
        for name in ("gen-000000", "gen-000001"):
            message = refused(lambda name=name: open_generation(store_dir / name))
            assert f"{store_dir / name} holds no finished generation" in message

    def test_a_damaged_manifest_is_refused_by_name(self, make, store_dir):
        """Any flipped bit is refused, or changes none of the rows."""
        job = make(2)
        rows = probabilities(ALL, 0)
        job.begin(0)
        job.train(rows)
        job.begin(1)
        path = store_dir / "gen-000000" / "manifest.json"
        content = path.read_bytes()
        for offset in range(len(content)):
            path.write_bytes(
                content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :]
            )
            try:
                table = open_generation(path.parent)
            except PskdError as error:
                assert str(store_dir) in str(error)
            else:
                assert bits(table[ALL]) == bits(torch.stack([rows[i] for i in ALL.tolist()]))

    def test_a_manifest_of_another_version_is_refused(self, make, store_dir):
        job = make()
        job.begin(0)
        job.begin(1)
        path = store_dir / "gen-000000" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))
        assert "version 3" in refused(lambda: open_generation(path.parent))


class TestRefusals:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_non_finite_predictions_are_named_and_not_stored(self, make, store_dir, bad):
        """Said at the next call, as a thread writes; what follows them is not written either."""
        job = make()
        good, mixed = probabilities([1, 2], 0), torch.softmax(torch.rand(3, C), 1)
        mixed[0, 2] = mixed[2, 0] = bad
        job.begin(0)
        job.train(good)
        before = job.checkpoint()
        job.stores[0].remember(np.array([7, 8, 9]), mixed)
        for action in (job.checkpoint, job.checkpoint, lambda: job.train(probabilities([3], 0))):
            message = refused(action)
            assert "samples [7, 9] in epoch 0" in message
            assert "not finite" in message
            assert "optimizer.lr" in message
        (segment,) = segments(store_dir)
        assert bits(mixed[1]) not in (store_dir / segment).read_bytes()
        again = make(1, 1, before)
        again.begin(0)
        again.begin(1)
        assert_rows(again.past(), good)

    @pytest.mark.parametrize("wrong", [2.0, 0.0, -1.0])
    def test_what_is_no_probability_is_named_and_not_stored(self, make, store_dir, wrong):
        """Logits, for example."""
        job = make()
        rows = torch.softmax(torch.rand(3, C), 1)
        rows[1] = rows[1] * wrong
        job.begin(0)
        job.stores[0].remember(np.array([7, 8, 9]), rows)
        message = refused(job.checkpoint)
        message = message.replace("-0", "0")
        assert f"sum to {wrong:.4g}, not to 1, of samples [8] in epoch 0" in message
        assert "softmax" in message

    @pytest.mark.parametrize("encoding", ["float32", "uint8-log"])
    def test_a_negative_number_is_named_and_not_stored(self, make, encoding):
        """Though its row sums to 1."""
        job = make(encoding=encoding)
        rows = torch.softmax(torch.rand(3, C), 1)
        rows[1] = torch.tensor([1.5, -0.5] + [0.0] * (C - 2))
        job.begin(0)
        job.stores[0].remember(np.array([7, 8, 9]), rows)
        message = refused(job.checkpoint)
        assert "with a negative number, -0.5, of samples [8] in epoch 0" in message

    def test_a_softmax_in_half_precision_passes(self, make):
        job = make()
        job.begin(0)
        rows = torch.softmax(8 * torch.randn(N, C), 1).bfloat16().float()
        job.stores[0].remember(ALL, rows)
        job.begin(1)
        assert len(job.past()) == N

    @worlds
    @pytest.mark.parametrize(
        ("option", "was", "now"),
        [
            ("identity", "data", "other-data"),
            ("encoding", "float32", "float16"),
            ("classes", C, C + 1),
            ("n", N, N + 1),
            ("run", "run", "other-run"),
        ],
    )
    def test_predictions_of_another_run_are_refused_by_name(self, make, world, option, was, now):
        job = make(world)
        job.begin(0)
        job.train(probabilities(ALL, 0))
        growing = job.checkpoint()
        job.begin(1)
        for named in (growing, job.checkpoint()):
            state = named | ({"runs": []} if option == "run" else {})
            message = refused(lambda state=state: make(1, 1, state, **{option: now}))
            assert f"{was}, not {now}" in message
            assert "seg-000000-00000-of-" in message

    @worlds
    @pytest.mark.parametrize("part", ["finished", "growing"])
    def test_damage_anywhere_is_found_when_loading(self, make, store_dir, world, part):
        """The ranks share the work; one of them finds it and names the file."""
        job = make(3)
        for epoch in (0, 1):
            job.begin(epoch)
            job.train(probabilities(ALL, epoch))
        state = job.checkpoint()
        assert len(state[part]) == 3
        for name, *_ in state[part]:
            path = store_dir / name
            content = path.read_bytes()
            last_row = max(i for i, byte in enumerate(content) if byte)
            path.write_bytes(content[:last_row] + b"\0" + content[last_row + 1 :])
            assert str(path) in refused(lambda: make(world, 1, state))
            path.unlink()
            assert str(path) in refused(lambda: make(world, 1, state))
            path.write_bytes(content)
        make(world, 1, state)


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
