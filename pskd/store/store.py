"""The store as training sees it: read last epoch's predictions, remember this epoch's.

Letters: N samples, B of a batch, C classes.
"""

import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pskd.errors import PskdError
from pskd.order import Ids, partition
from pskd.store.encoding import ENCODINGS
from pskd.store.format import Entry, Header
from pskd.store.generation import Generation, generation_name, write_manifest
from pskd.store.segment import SegmentWriter


class Peers(Protocol):
    """The other processes that write this store."""

    @property
    def rank(self) -> int:
        """Of this process, 0-based."""
        ...

    @property
    def size(self) -> int:
        """How many processes write."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank; returns when all have called it."""
        ...


class Store:
    """Past predictions on disk. All methods but `past`, `prefetch`, `remember` are collective.

    Generation e holds the predictions made in epoch e. While epoch e trains, generation e - 1 is
    read (`finished`) and generation e is written (`growing`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        n: int,
        classes: int,
        encoding: str,
        identity: str,
        start: int,
        peers: Peers,
    ) -> None:
        """`start`: a number that no earlier start of this run has used; names new segments."""
        self._directory = directory
        self._n, self._classes = n, classes
        self._encoding = ENCODINGS[encoding]
        self._identity = identity
        self._start = start
        self._peers = peers
        self._epoch = 0
        self._finished: list[Entry] = []
        self._inherited: list[Entry] = []  # of the growing generation, from earlier starts
        self._growing: list[Entry] = []  # as of the last commit
        self._writer: SegmentWriter | None = None
        self._readable: Generation | None = None
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="store-read")
        self._ahead: tuple[Ids, Future[tuple[Tensor, Tensor]]] | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Make generation epoch - 1 readable and start generation `epoch`.

        When an epoch ends, rows of samples that it skipped are carried forward, so that a sample
        always has its latest prediction. Calling it again for the same epoch changes nothing.

        Raises:
            PskdError: the disk is full, or a segment cannot be read.
        """
        assert epoch in (self._epoch, self._epoch + 1), "epochs follow one another"
        if epoch == self._epoch + 1:
            self._finish_epoch()
        if self._readable is None:
            self._readable = self._open(self._finished)

    def prefetch(self, ids_B: Ids) -> None:
        """Start reading the rows that the next call of `past` will ask for."""
        assert self._readable is not None, "begin_epoch comes first"
        self._ahead = (ids_B, self._reading.submit(self._readable.rows, ids_B))

    def past(self, ids_B: Ids) -> tuple[Tensor, Tensor]:
        """Last epoch's rows: float32 (B, C) on the host, zeros if absent, and present_B bool."""
        if self._ahead is None or not np.array_equal(self._ahead[0], ids_B):
            self.prefetch(ids_B)
        assert self._ahead is not None
        rows, self._ahead = self._ahead[1], None
        return rows.result()

    def remember(self, ids_B: Ids, probs_BC: Tensor) -> None:
        """Append this epoch's predictions of one step: float32 (B, C), any device.

        Raises:
            PskdError: a value is not finite (names the samples), or the disk is full.
        """
        probs_BC = probs_BC.cpu()
        finite_B = torch.isfinite(probs_BC).all(dim=1)
        if not bool(finite_B.all()):
            bad = ids_B[~finite_B.numpy()].tolist()
            raise PskdError(
                f"non-finite predictions of samples {bad} in epoch {self._epoch}: not stored. "
                "Lower optimizer.lr or set optimizer.clip_norm."
            )
        self._append(ids_B, self._encoding.encode(probs_BC))

    def commit(self) -> None:
        """Make what was remembered durable and known to all ranks; `state` names it then."""
        if self._writer is not None:
            self._writer.sync()
        mine = [] if self._writer is None else [self._writer.entry]
        current = [Entry(*e) for rank in self._peers.gather(mine) for e in rank]
        self._growing = self._inherited + [e for e in current if e.rows]

    def state_dict(self) -> dict[str, Any]:
        """Names the finished and the growing generation as of the last commit."""
        return {
            "epoch": self._epoch,
            "finished": [list(e) for e in self._finished],
            "growing": [list(e) for e in self._growing],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what a checkpoint names; every named row is verified, shared over ranks.

        Raises:
            PskdError: missing, damaged or foreign segments.
        """
        self._epoch = state["epoch"]
        self._finished = [Entry(*e) for e in state["finished"]]
        self._inherited = [Entry(*e) for e in state["growing"]]
        self._growing = list(self._inherited)
        for entries in (self._finished, self._growing):
            self._open(entries).verify(self._peers.rank, self._peers.size)

    def retain(self, states: Iterable[dict[str, Any]]) -> None:
        """Delete the segments that neither a retained checkpoint's state nor this run names.

        Called by rank 0 alone. Segments of this start in the growing generation stay.
        """
        named = {e[0] for s in states for e in (*s["finished"], *s["growing"])}
        named |= {e.segment for e in (*self._finished, *self._growing)}
        own = f"{generation_name(self._epoch)}/seg-{self._start:06d}-"
        for path in self._directory.glob("gen-*/seg-*.psk"):
            name = path.relative_to(self._directory).as_posix()
            if name not in named and not name.startswith(own):
                path.unlink()
        for generation in self._directory.glob("gen-*"):
            if generation.name < generation_name(self._epoch) and not any(
                generation.glob("seg-*.psk")
            ):
                shutil.rmtree(generation)

    def close(self) -> None:
        """Stop the reading thread; give back the room that the growing segment reserved."""
        self._reading.shutdown(wait=True, cancel_futures=True)
        if self._writer is not None:
            self._writer.close()

    def _finish_epoch(self) -> None:
        self.commit()
        growing = self._open(self._growing)
        self._readable = self._readable or self._open(self._finished)
        skipped = np.setdiff1d(self._readable.present(), growing.present())
        if len(skipped):
            low, high = partition(len(skipped), self._peers.size)[self._peers.rank :][:2]
            mine = skipped[low:high]
            if len(mine):
                self._append(mine, self._readable.encoded_rows(mine)[0])
            self.commit()
            growing = self._open(self._growing)
        if self._writer is not None:
            self._writer.close()
        if self._peers.rank == 0:
            write_manifest(self._directory, self._epoch, self._n, self._classes, self._growing)
        self._epoch += 1
        self._finished, self._growing, self._inherited = self._growing, [], []
        self._readable, self._writer, self._ahead = growing, None, None

    def _append(self, ids_B: Ids, bytes_BR: Tensor) -> None:
        if self._writer is None:
            self._writer = self._new_segment()
        self._writer.append(ids_B, bytes_BR.numpy())

    def _new_segment(self) -> SegmentWriter:
        rank, size = self._peers.rank, self._peers.size
        name = f"{generation_name(self._epoch)}/seg-{self._start:06d}-{rank:05d}-of-{size:05d}.psk"
        header = Header(
            identity=self._identity,
            epoch=self._epoch,
            start=self._start,
            rank=rank,
            world=size,
            n=self._n,
            classes=self._classes,
            encoding=self._encoding.name,
            row_bytes=self._encoding.row_bytes(self._classes),
        )
        missing = self._n - sum(entry.rows for entry in self._inherited)
        return SegmentWriter(self._directory / name, header, -(-max(missing, 0) // size), name)

    def _open(self, entries: list[Entry]) -> Generation:
        generation = Generation(self._directory, self._n, self._classes, entries)
        generation.check_written_for(self._identity, self._encoding.name)
        return generation
