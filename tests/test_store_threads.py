"""What the store does behind training's back: its threads and their failures.

A slow disk is a real one whose writes or reads stop at a gate. Letters: N samples, C classes.
"""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pskd.errors import PskdError
from pskd.store import open_generation, segment
from pskd.store.format import HEADER_BYTES
from tests.lone_store import C, N, filled, new_store, probabilities
from tests.system import mounted, needs_root

BUFFERS = 4
PATIENCE_S = 0.3  # what has not happened by then is taken to wait
DEADLINE_S = 60  # against a hang

strangers = set()  # threads that were there before the test


def store_threads():
    """Living threads that a store of this test has started, by name."""
    return sorted(
        t.name
        for t in set(threading.enumerate()) - strangers
        if t.name.startswith(("store-", "ThreadPool"))
    )


def path_of(file):
    return Path(f"/proc/self/fd/{file}").readlink()


def in_background(action):
    """Start it on a thread; what is returned also carries the exception."""
    thread = threading.Thread(target=lambda: errors.extend(caught(action)), daemon=True)
    errors = thread.errors = []
    thread.start()
    return thread


def caught(action):
    try:
        action()
    except BaseException as error:
        return [error]
    return []


@pytest.fixture(autouse=True)
def count_threads_from_here():
    strangers.clear()
    strangers.update(threading.enumerate())


@pytest.fixture
def gate(monkeypatch):
    """Closed, it stops the writing thread in front of each write."""
    gate = threading.Event()
    gate.set()
    pwrite = os.pwrite

    def slow(*args):
        if threading.current_thread().name.startswith("store-write"):
            assert gate.wait(DEADLINE_S)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    return gate


class TestWriting:
    @pytest.fixture
    def store(self, tmp_path, gate):
        store = new_store(tmp_path)
        store.begin_epoch(0)
        yield store
        gate.set()
        store.close()

    def test_training_waits_only_when_every_buffer_is_on_its_way(self, store, gate):
        rows = probabilities(0)
        gate.clear()
        for step in range(BUFFERS):
            store.remember(np.arange(8 * step, 8 * step + 8), rows[8 * step : 8 * step + 8])
        assert store.waits()["write"].times == 0
        fifth = in_background(lambda: store.remember(np.arange(32, 40), rows[32:40]))
        fifth.join(PATIENCE_S)
        assert fifth.is_alive(), "nothing but a fifth buffer could have taken it"
        gate.set()
        fifth.join(DEADLINE_S)
        assert fifth.errors == []
        waits = store.waits()["write"]
        assert waits.times == 1
        assert waits.seconds >= PATIENCE_S / 2
        assert store.waits()["write"].times == 0, "counted since the last call"
        store.begin_epoch(1)
        got, present = store.past(np.arange(N))
        assert np.flatnonzero(present).tolist() == list(range(40))
        assert torch.equal(got[:40], rows[:40])

    def test_a_full_ring_keeps_the_order_of_steps(self, store, gate):
        """Of repeated samples the last wins, also through buffers of many sizes and reuses."""
        rng, want = np.random.default_rng(0), {}
        for step in range(60):
            if step % 12 == 0:
                store.commit()
                gate.clear()
            if step % 12 == BUFFERS:
                gate.set()
            ids = rng.choice(N, rng.integers(1, 20), replace=False)
            rows = probabilities(step)[: len(ids)]
            store.remember(ids, rows)
            want |= {int(i): row for i, row in zip(ids, rows.clone(), strict=True)}
        store.begin_epoch(1)
        got, present = store.past(np.arange(N))
        assert sorted(want) == np.flatnonzero(present).tolist()
        for i, row in want.items():
            assert torch.equal(got[i], row), i

    @pytest.mark.parametrize("encoding", ["float32", "float16", "uint8-log", "top2"])
    def test_rows_may_be_overwritten_as_soon_as_they_are_handed_over(
        self, tmp_path, gate, encoding
    ):
        store, clean = new_store(tmp_path / "a", encoding=encoding), tmp_path / "b"
        for other in (store, reference := new_store(clean, encoding=encoding)):
            other.begin_epoch(0)
        gate.clear()
        buffer = torch.empty(16, C)
        for step in range(BUFFERS):
            buffer.copy_(probabilities(0)[16 * step : 16 * step + 16])
            store.remember(np.arange(16 * step, 16 * step + 16), buffer)
            buffer.fill_(float("nan"))
        gate.set()
        reference.remember(np.arange(N), probabilities(0))
        for other in (store, reference):
            other.begin_epoch(1)
        assert torch.equal(store.past(np.arange(N))[0], reference.past(np.arange(N))[0])
        for other in (store, reference):
            other.close()

    def test_a_commit_waits_for_what_is_on_its_way(self, store, gate):
        gate.clear()
        store.remember(np.arange(8), probabilities(0)[:8])
        commit = in_background(store.commit)
        commit.join(PATIENCE_S)
        assert commit.is_alive()
        assert store.state_dict()["growing"] == []
        gate.set()
        commit.join(DEADLINE_S)
        ((_, rows, _),) = store.state_dict()["growing"]
        assert rows == 8

    def test_closing_writes_what_is_on_its_way_and_leaves_no_thread(self, tmp_path, gate):
        store = new_store(tmp_path)
        store.begin_epoch(0)
        gate.clear()
        for step in range(3):
            store.remember(np.arange(8), probabilities(step)[:8])
        close = in_background(store.close)
        close.join(PATIENCE_S)
        assert close.is_alive()
        gate.set()
        close.join(DEADLINE_S)
        assert store_threads() == []
        (path,) = tmp_path.glob("gen-*/seg-*")
        chunk = path.stat().st_size - HEADER_BYTES
        assert chunk == 3 * (96 + 8 * 32), "three chunks of 8 rows, no room beyond"


@needs_root
class TestFullDisk:
    def test_what_fails_behind_training_is_said_at_a_later_call(self, tmp_path):
        """Repeated samples outgrow the room that was reserved; the last commit stays readable."""
        with mounted(tmp_path / "small") as disk:
            rows = probabilities(0, classes=500)
            store = new_store(disk.path / "store", classes=500)
            store.begin_epoch(0)
            store.remember(np.arange(N), rows)
            store.begin_epoch(1)
            store.remember(np.arange(16), rows[16:32])
            store.commit()
            state = store.state_dict()
            disk.leave(50_000)
            with pytest.raises(PskdError, match=r"No space left.*Free some space") as caught:
                for _ in range(20):
                    store.remember(np.arange(32), rows[:32])
            message = str(caught.value)
            assert f"{disk.path}/store/gen-000001/seg-000000-00000-of-00001.psk" in message
            sizes = sorted(p.stat().st_blocks for p in disk.path.rglob("*.psk"))
            disk.free_all()  # there would be room again
            for action in (
                lambda: store.remember(np.arange(32), rows[:32]),
                store.commit,
                lambda: store.begin_epoch(2),
            ):
                with pytest.raises(PskdError, match="No space left"):
                    action()
            assert sorted(p.stat().st_blocks for p in disk.path.rglob("*.psk")) == sizes
            assert store.state_dict() == state
            store.close()
            assert store_threads() == []
            again = new_store(disk.path / "store", start=1, classes=500)
            again.load_state_dict(state)
            again.begin_epoch(1)
            assert torch.equal(again.past(np.arange(N))[0], rows)
            again.begin_epoch(2)
            want = torch.cat((rows[16:32], rows[16:]))
            assert torch.equal(again.past(np.arange(N))[0], want)
            again.close()

    def test_no_row_is_written_after_one_that_failed(self, tmp_path, monkeypatch):
        """The disk fails once, and works again for the steps that are already on their way."""
        store = new_store(tmp_path)
        store.begin_epoch(0)
        store.remember(np.arange(8), probabilities(0)[:8])
        store.commit()
        state, pwrite, handed_over = store.state_dict(), os.pwrite, threading.Event()
        failures, written = [OSError(5, "Input/output error")], []

        def fail_once(*args):
            assert handed_over.wait(DEADLINE_S)
            if failures:
                raise failures.pop()
            written.append(args)
            return pwrite(*args)

        monkeypatch.setattr(os, "pwrite", fail_once)
        for step in range(1, 4):
            store.remember(np.arange(8 * step, 8 * step + 8), probabilities(0)[:8])
        handed_over.set()
        for action in (store.commit, lambda: store.remember(np.arange(8), probabilities(0)[:8])):
            with pytest.raises(PskdError, match=r"Input/output error.*file system"):
                action()
        store.close()
        assert written == []
        assert store.state_dict() == state
        assert store_threads() == []


class TestReading:
    @pytest.mark.parametrize("read", ["mmap", "pread"])
    @pytest.mark.parametrize("encoding", ["float32", "float16", "uint8-log", "top2"])
    def test_rows_of_a_step_stay_right_while_the_next_are_read(self, tmp_path, encoding, read):
        """The step's rows and their presence, with all that the next one asks for being other."""
        store = new_store(tmp_path, encoding=encoding, read=read)
        store.begin_epoch(0)
        store.remember(np.arange(0, N, 2), probabilities(0)[::2])
        store.begin_epoch(1)
        want, present_N = open_generation(tmp_path / "gen-000000").rows(np.arange(N))
        steps = [np.arange(16), np.arange(16, 20), np.arange(1, 64, 3), np.arange(0, 64, 2)]
        store.prefetch(steps[0])
        for now, following in zip(steps, [*steps[1:], steps[0]], strict=True):
            rows, present = store.past(now)
            store.prefetch(following)
            store._lookahead._ahead[1].wait()
            assert torch.equal(rows, want[now])
            assert torch.equal(present, present_N[now])
        store.close()

    def test_a_slow_read_is_waited_for_and_counted(self, tmp_path, monkeypatch):
        store, rows = filled(tmp_path, read="pread")
        gate, preadv = threading.Event(), os.preadv

        def slow(*args):
            assert gate.wait(DEADLINE_S)
            return preadv(*args)

        monkeypatch.setattr(os, "preadv", slow)
        store.prefetch(np.arange(8))
        got = []
        past = in_background(lambda: got.append(store.past(np.arange(8))[0]))
        past.join(PATIENCE_S)
        assert past.is_alive()
        gate.set()
        past.join(DEADLINE_S)
        assert torch.equal(got[0], rows[:8])
        assert store.waits()["read"].times == 1
        store.close()

    def test_a_failed_read_is_said_by_past(self, tmp_path, monkeypatch):
        store, rows = filled(tmp_path, read="pread")

        def broken(*_):
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken)
            store.prefetch(np.arange(8))
            with pytest.raises(PskdError, match=r"seg-000000-00000-of-00001.psk: Input/output"):
                store.past(np.arange(8))
        assert torch.equal(store.past(np.arange(8))[0], rows[:8])
        store.close()

    @pytest.mark.parametrize("read", ["mmap", "pread"])
    @pytest.mark.parametrize("readahead_bytes", [0, 1, 10**9])
    @pytest.mark.parametrize("encoding", ["float16", "top1"])
    def test_how_rows_are_read_does_not_change_them(
        self, tmp_path, read, readahead_bytes, encoding
    ):
        filled(tmp_path, encoding=encoding)[0].close()
        table = open_generation(tmp_path / "gen-000000")[range(N)]
        options = {"encoding": encoding, "read": read, "readahead_bytes": readahead_bytes}
        store, _ = filled(tmp_path / "other", epochs=3, **options)
        assert torch.equal(
            store.past(np.arange(N)[::-1].copy())[0].flip(0),
            open_generation(tmp_path / "other" / "gen-000002")[range(N)],
        )
        first = open_generation(tmp_path / "other" / "gen-000000")[range(N)]
        assert torch.equal(first, table)
        store.close()

    def test_a_closed_store_has_no_thread(self, tmp_path):
        store, _ = filled(tmp_path, epochs=3, readahead_bytes=10**9)
        store.prefetch(np.arange(8))  # never asked for
        store.close()
        assert store_threads() == []

    def test_a_closed_store_that_read_with_pread_has_no_thread(self, tmp_path):
        store, _ = filled(tmp_path, read="pread")
        store.past(np.arange(32))
        store.close()
        assert store_threads() == []

    def test_generations_that_are_over_leave_no_threads(self, tmp_path):
        store, _ = filled(tmp_path, read="pread")
        for epoch in range(1, 6):
            store.past(np.arange(N))
            store.remember(np.arange(N), probabilities(epoch))
            store.begin_epoch(epoch + 1)
        assert len(store_threads()) <= 2 + 8, "two of the store, eight of the generation"
        store.close()


class TestReadahead:
    @pytest.fixture
    def reads(self, monkeypatch):
        """Reads of the readahead threads, a page each: they stop at the gate of their generation.

        name of the generation -> (gate, "it reads" event, number of reads)
        """
        monkeypatch.setattr(segment, "_BLOCK_BYTES", 4096)
        preadv, gates = os.preadv, {}
        for name in ("gen-000000", "gen-000001"):
            gates[name] = (threading.Event(), threading.Event(), [])

        def slow(file, *args):
            if threading.current_thread().name == "store-readahead":
                gate, reading, count = gates[path_of(file).parent.name]
                count.append(1)
                reading.set()
                assert gate.wait(DEADLINE_S)
            return preadv(file, *args)

        monkeypatch.setattr(os, "preadv", slow)
        yield gates
        for gate, _, _ in gates.values():
            gate.set()

    def test_it_reads_the_generation_once_up_to_the_limit(self, tmp_path, reads):
        gate, _, count = reads["gen-000000"]
        gate.set()
        store, _ = filled(tmp_path, readahead_bytes=10**9)
        store.close()
        (size,) = (p.stat().st_size for p in tmp_path.glob("gen-000000/*.psk"))
        store = new_store(tmp_path / "b", n=N, readahead_bytes=5000)
        before = len(count)
        assert before <= -(-size // 4096)
        store.begin_epoch(0)
        store.remember(np.arange(N), probabilities(0))
        store.begin_epoch(1)
        store._warming._thread.join(DEADLINE_S)
        store.close()
        assert len(count) - before == 2, "5000 bytes are two pages"

    def test_training_does_not_wait_for_it_and_closing_ends_it(self, tmp_path, reads):
        gate, reading, count = reads["gen-000000"]
        store, rows = filled(tmp_path, readahead_bytes=10**9, n=10**4)
        assert reading.wait(DEADLINE_S)
        assert torch.equal(store.past(np.arange(8))[0], rows[:8])
        close = in_background(store.close)
        close.join(PATIENCE_S)
        gate.set()
        close.join(DEADLINE_S)
        assert close.errors == []
        assert store_threads() == []
        assert len(count) == 1, "asked after each block"

    def test_closing_ends_that_of_an_earlier_epoch_too(self, tmp_path, reads):
        """A generation may be read so slowly that the next epoch begins."""
        (slow, reading, _), (fast, _, _) = reads["gen-000000"], reads["gen-000001"]
        fast.set()
        store, _ = filled(tmp_path, readahead_bytes=10**9)
        assert reading.wait(DEADLINE_S)
        begin = in_background(
            lambda: (store.remember(np.arange(N), probabilities(1)), store.begin_epoch(2))
        )
        begin.join(PATIENCE_S)  # it may wait for the old readahead, or not
        if begin.is_alive():
            slow.set()
            begin.join(DEADLINE_S)
        close = in_background(store.close)
        close.join(PATIENCE_S)
        left = [] if close.is_alive() else store_threads()
        slow.set()
        close.join(DEADLINE_S)
        assert left == []
