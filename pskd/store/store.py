"""The store as training sees it: read last epoch's predictions, remember this epoch's.

Letters: N samples, B of a batch, C classes.
"""

import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pskd.errors import PskdError
from pskd.files import make_directory, sync_directory
from pskd.order import Ids, partition
from pskd.store.appender import Appender
from pskd.store.format import Entry, Header
from pskd.store.generation import (
    MANIFEST,
    Generation,
    expect,
    generation_name,
    unfinish,
    write_manifest,
)
from pskd.store.lookahead import Lookahead
from pskd.store.peers import Peers
from pskd.store.registry import create_encoding
from pskd.store.sections import StoreSection
from pskd.store.segment import SegmentReader, SegmentWriter, explain, give_back_room
from pskd.store.waits import Waits

_CARRIED_ROWS = 4096  # carried forward at a time


class Store:
    """Past predictions on disk. `begin_epoch`, `commit` and `receive` are collective.

    Generation e holds the predictions made in epoch e. While epoch e trains, generation e - 1 is
    read (`finished`) and generation e is written (`growing`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        n: int,
        classes: int,
        identity: str,
        run: str,
        start: int,
        peers: Peers,
        options: StoreSection,
        device: torch.device,
    ) -> None:
        """Identity: fingerprint of the data set. run: name of the run, `start`: a number that no
        earlier start of it has used; both go into new segments. device: where rows are wanted.

        Raises:
            PskdError: an encoding that is unknown, or makes no sense for so many classes.
        """
        self._directory = directory
        self._n, self._classes = n, classes
        self._encoding = create_encoding(options.encoding)
        self._row_bytes = self._encoding.row_bytes(classes)
        self._options = options
        self._identity = identity
        self._run = run
        self._runs = {run}  # whose segments are ours: this run's, and those that it began from
        self._start = start
        self._peers = peers
        self._epoch = 0
        self._finished: list[Entry] = []
        self._inherited: list[Entry] = []  # of the growing generation, from earlier starts
        self._growing: list[Entry] = []  # as of the last commit
        self._spread: dict[str, int] = {}  # bytes of its segments that are on every node
        self._writer: SegmentWriter | None = None
        self._readable: Generation | None = None
        self._appender = Appender(self._encoding, classes, device)
        self._lookahead = Lookahead(device)
        self._warming: _WarmUp | None = None

    @property
    def epoch(self) -> int:
        """Of the growing generation."""
        return self._epoch

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
            self._warm_up(self._readable)

    def prefetch(self, ids_B: Ids) -> None:
        """Start reading the rows that the next call of `past` will ask for."""
        assert self._readable is not None, "begin_epoch comes first"
        self._lookahead.start(self._readable, ids_B)

    def past(self, ids_B: Ids) -> tuple[Tensor, Tensor]:
        """Last epoch's rows: float32 (B, C), zeros if absent, and present_B bool, on the device.

        On the CPU they may lie in a reused buffer, until the second `prefetch` from now.
        """
        assert self._readable is not None, "begin_epoch comes first"
        return self._lookahead.take(self._readable, ids_B)

    def remember(self, ids_B: Ids, probs_BC: Tensor) -> None:
        """Append this epoch's predictions of one step: float32 (B, C), any device.

        Returns before they are on the disk; `probs_BC` may be overwritten then, `ids_B` may not.

        Raises:
            PskdError: an earlier step's rows are not finite or no probabilities (names the
                samples), or the disk is full.
        """
        if len(ids_B):
            self._appender.append(self._segment(), self._epoch, ids_B, probs_BC)

    @property
    def waited_s(self) -> float:
        """Seconds that training has waited for reads and writes since the last call of `waits`."""
        return self._lookahead.waits.seconds + self._appender.waits.seconds

    def waits(self) -> dict[str, Waits]:
        """How often and how long training has waited for reads and writes since the last call."""
        taken = {"read": self._lookahead.waits, "write": self._appender.waits}
        self._lookahead.waits, self._appender.waits = Waits(), Waits()
        return taken

    def commit(self) -> None:
        """Make what was remembered durable and known to all ranks; `state_dict` names it then.

        Raises:
            PskdError: as `remember`; or segments cannot be brought to the other nodes.
        """
        self._appender.flush()
        mine: list[tuple[Entry, int]] = []
        if self._writer is not None and self._writer.entry.rows:
            self._writer.sync()
            mine = [(self._writer.entry, self._writer.end)]
        current = [(Entry(*e), end) for rank in self._peers.gather(mine) for e, end in rank]
        # What the other nodes have received so far, and what this rank has written since.
        self._peers.spread(self._directory, {**self._spread, **{e.segment: n for e, n in mine}})
        self._spread = {entry.segment: end for entry, end in current}
        self._growing = self._inherited + [entry for entry, _ in current]

    def state_dict(self) -> dict[str, Any]:
        """Names the finished and the growing generation as of the last commit."""
        return {
            "epoch": self._epoch,
            "finished": [list(e) for e in self._finished],
            "growing": [list(e) for e in self._growing],
            "runs": sorted(self._runs),
        }

    def receive(self, state: dict[str, Any]) -> None:
        """Get the segments that a checkpoint names and this node's directory lacks, or has damaged.

        Raises:
            PskdError: a segment cannot be written.
        """
        mine, ours = self._share()
        if ours < self._peers.size:
            named = sorted({Entry(*e) for e in (*state["finished"], *state["growing"])})
            self._peers.spread(self._directory, self._intact(named[mine::ours]))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what a checkpoint names; every named row is verified, shared over ranks.

        Not collective. May be called again, with an older checkpoint, if it fails.

        Raises:
            PskdError: missing, damaged or foreign segments.
        """
        self._epoch = state["epoch"]
        self._runs |= set(state["runs"])
        self._finished = [Entry(*e) for e in state["finished"]]
        self._inherited = [Entry(*e) for e in state["growing"]]
        self._growing = list(self._inherited)
        for entries in (self._finished, self._growing):
            self._open(entries).verify(*self._share())
        if self._share()[0] == 0:
            for name in {e.segment for e in (*self._finished, *self._inherited)}:
                give_back_room(self._directory / name)
        manifest = self._directory / generation_name(self._epoch - 1) / MANIFEST
        if self._finished and self._share()[0] == 0 and not manifest.exists():
            # Its segments were brought here from another run or node.
            write_manifest(self._directory, self._epoch - 1, self._n, self._classes, self._finished)

    def adopt(self, source: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Take over the segments that a checkpoint of another run names; returns its state here.

        Called by one rank of a directory. Links where the file system can, copies otherwise.

        Raises:
            PskdError: a segment is missing or foreign (nothing is taken over then), or there is no
                room.
        """
        self._runs |= set(state["runs"])
        for part in ("finished", "growing"):
            self._open([Entry(*e) for e in state[part]], source).close()
        adopted = dict(state)
        number = 0
        for part in ("finished", "growing"):
            adopted[part] = []
            for segment, rows, crc in state[part]:
                # A name of its own: the two runs number their starts alike.
                name = f"{Path(segment).parent}/seg-adopted-{number:05d}.psk"
                number += 1
                _link_or_copy(source / segment, self._directory / name)
                adopted[part].append([name, rows, crc])
        return adopted

    def empty_state(self, epoch: int) -> dict[str, Any]:
        """The state of a store that has seen nothing when `epoch` begins."""
        return {"epoch": epoch, "finished": [], "growing": [], "runs": [self._run]}

    def retain(self, states: Iterable[dict[str, Any]]) -> None:
        """Delete the segments that neither a retained checkpoint's state nor this run names.

        Called by one rank of a directory. Segments of this start in the growing generation stay.
        """
        named = {e[0] for s in states for e in (*s["finished"], *s["growing"])}
        named |= {e.segment for e in (*self._finished, *self._growing)}
        own = f"{generation_name(self._epoch)}/seg-{self._start:06d}-"
        found = self._directory.glob("gen-*/seg-*.psk")
        names = {path.relative_to(self._directory).as_posix() for path in found}
        unwanted = {name for name in names - named if not name.startswith(own)}
        unfinish(self._directory, unwanted)
        for name in unwanted:
            (self._directory / name).unlink()
        for generation in self._directory.glob("gen-*"):
            if generation.name != generation_name(self._epoch) and not any(
                generation.glob("seg-*.psk")
            ):
                shutil.rmtree(generation)

    def close(self) -> None:
        """Stop the threads; give back the room that the growing segment reserved."""
        self._lookahead.close()
        self._appender.close()
        if self._warming is not None:
            self._warming.end()
        if self._readable is not None:
            self._readable.close()
        if self._writer is not None:
            self._writer.close()

    def _share(self) -> tuple[int, int]:
        """This rank's part of the work on its directory, and how many parts there are."""
        colleagues = self._peers.colleagues
        return colleagues.index(self._peers.rank), len(colleagues)

    def _finish_epoch(self) -> None:
        self.commit()
        growing = self._open(self._growing)
        self._readable = self._readable or self._open(self._finished)
        skipped = np.flatnonzero(self._readable.present_N & ~growing.present_N)
        if len(skipped):
            low, high = partition(len(skipped), self._peers.size)[self._peers.rank :][:2]
            for first in range(low, high, _CARRIED_ROWS):
                self._carry_forward(
                    self._readable, skipped[first : min(first + _CARRIED_ROWS, high)]
                )
            self.commit()
            del growing  # two generations are open at a time, not three
            growing = self._open(self._growing)
        if self._writer is not None:
            self._writer.close()
        if self._share()[0] == 0:
            write_manifest(self._directory, self._epoch, self._n, self._classes, self._growing)
        self._epoch += 1
        self._finished, self._growing, self._inherited = self._growing, [], []
        self._spread = {}
        self._readable.close()
        self._readable, self._writer = growing, None
        self._warm_up(growing)

    def _carry_forward(self, older: Generation, ids_B: Ids) -> None:
        rows_BR = np.empty((len(ids_B), self._row_bytes), np.uint8)
        older.gather(ids_B, rows_BR, np.empty(len(ids_B), np.bool_))
        self._segment().append(ids_B, rows_BR)

    def _warm_up(self, generation: Generation) -> None:
        if self._warming is not None:
            self._warming.end()
            self._warming = None
        if self._options.readahead_bytes and generation.segments:
            peers, limit = self._peers, self._options.readahead_bytes
            self._warming = _WarmUp(generation, limit, peers.local_rank, peers.local_size)

    def _segment(self) -> SegmentWriter:
        """This start's segment of the growing generation."""
        if self._writer is None:
            rank, size = self._peers.rank, self._peers.size
            name = f"seg-{self._start:06d}-{rank:05d}-of-{size:05d}.psk"
            name = f"{generation_name(self._epoch)}/{name}"
            header = Header(
                run=self._run,
                identity=self._identity,
                epoch=self._epoch,
                start=self._start,
                rank=rank,
                world=size,
                n=self._n,
                classes=self._classes,
                encoding=self._encoding.name,
                row_bytes=self._row_bytes,
            )
            missing = max(self._n - sum(entry.rows for entry in self._inherited), 0)
            self._writer = SegmentWriter(self._directory / name, header, -(-missing // size), name)
        return self._writer

    def _intact(self, entries: list[Entry]) -> dict[str, int]:
        """Bytes of those segments that are whole here; another node has to send the others."""
        whole = {}
        for entry in entries:
            try:
                segment = SegmentReader(self._directory / entry.segment, entry)
                segment.verify()
            except PskdError:
                continue
            whole[entry.segment] = segment.end
        return whole

    def _open(self, entries: list[Entry], directory: Path | None = None) -> Generation:
        generation = Generation(
            directory or self._directory, self._n, self._classes, entries, self._options.read
        )
        for segment in generation.segments:
            header = segment.header
            expect(segment, "data set", self._identity, header.identity)
            expect(segment, "encoding", self._encoding.name, header.encoding)
            ours = header.run in self._runs
            expect(segment, "run", header.run if ours else self._run, header.run)
        return generation


class _WarmUp:
    """A thread that reads a generation into the page cache."""

    def __init__(self, generation: Generation, limit_bytes: int, part: int, parts: int) -> None:
        self._stop = threading.Event()
        arguments = (limit_bytes, part, parts, self._stop.is_set)
        self._thread = threading.Thread(
            target=generation.warm_up, args=arguments, name="store-readahead", daemon=True
        )
        self._thread.start()

    def end(self) -> None:
        """Stop it, if it still runs."""
        self._stop.set()
        self._thread.join()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        make_directory(target.parent)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, target)
            with target.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(target.parent)
    except FileNotFoundError as error:
        raise PskdError(
            f"prediction store: {source} is missing. Resume another checkpoint."
        ) from error
    except OSError as error:
        raise explain(error, target) from error
