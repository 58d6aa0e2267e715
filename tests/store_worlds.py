"""The stores of all ranks of a job, and what they hold.

The ranks of a world are threads of this process that meet at a barrier where real ones would
meet in a collective. Letters: N samples, C classes.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pskd.errors import PskdError
from pskd.order import partition
from pskd.store.sections import StoreSection
from pskd.store.store import Store

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
        options |= {"options": StoreSection(encoding), "device": torch.device("cpu")}
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


def refused(action):
    with pytest.raises(PskdError) as caught:
        action()
    return str(caught.value)
