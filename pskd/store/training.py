"""The store in a training loop of one's own, without our trainer: in one process or many.

    store = open_for_training(DIR, n=len(dataset), classes=C, device=device)
    for epoch in range(first, E):
        store.begin_epoch(epoch)
        for ...:
            past_BC, present_B = store.past(ids_B)
            ...
            store.remember(ids_B, probs_BC)
        store.end_epoch()
    store.close()

It finds the other ranks by torch.distributed, numbers its starts, and keeps no more generations
than a restart can need: the one that is read, and the one that grows.

Letters: N samples, B of a batch, C classes.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from pskd.errors import AgreedError, PskdError, together
from pskd.fields import require
from pskd.order import Ids
from pskd.store import record as records
from pskd.store.format import Entry
from pskd.store.generation import (
    MANIFEST,
    finished_epochs,
    generation_name,
    read_manifest,
    write_manifest,
)
from pskd.store.peers import Peers
from pskd.store.ranks import find_peers
from pskd.store.record import Record
from pskd.store.registry import create_encoding
from pskd.store.sections import StoreSection
from pskd.store.store import Store

_NAMED_IDS = 10  # in a message


def open_for_training(
    directory: str | Path,
    *,
    n: int,
    classes: int,
    device: torch.device | str = "cpu",
    encoding: str = "float16",
    dataset: str = "",
) -> "TrainingStore":
    """Open a directory for training, or make it. Collective; after `init_process_group`, if any.

    Args:
        directory: seen by all ranks; one loop at a time owns it.
        n: samples of the training split; their ids are 0..n-1.
        classes: of a prediction.
        device: of the logits, where past predictions are wanted.
        encoding: of the rows on disk: float32, float16, uint8-log or top<k>.
        dataset: a name or fingerprint of the samples; a directory of another one is refused.

    Raises:
        PskdError: the directory holds predictions for other samples, classes or another encoding,
            is in use, cannot be written, or is not seen by all ranks; or several processes were
            launched and nobody has called `init_process_group`.
    """
    require(n > 0, "n", n, "give the number of training samples.")
    require(classes > 1, "classes", classes, "give 2 or more.")
    create_encoding(encoding).row_bytes(classes)
    device = torch.device(device)
    _refuse_unusable(device)
    peers = find_peers()
    path = Path(directory).absolute()
    lock: IO[str] | None = None
    try:
        with together(peers.gather):
            lock = records.own(path) if peers.rank == 0 else None
        record = _enter(path, Record(n, classes, encoding, dataset), peers)
        return TrainingStore(path, record, peers, device, lock)
    except BaseException:
        if lock is not None:
            lock.close()
        raise


def _refuse_unusable(device: torch.device) -> None:
    """Copies from a GPU are waited for by events of the current one."""
    if device.type == "cpu":
        return
    if device.type != "cuda" or not torch.cuda.is_available():
        raise PskdError(f"device {device} is no CPU and no GPU that torch can use: give another.")
    if device.index not in (None, torch.cuda.current_device()):
        raise PskdError(f"device {device} is not the current one: call torch.cuda.set_device.")


def _enter(path: Path, wanted: Record, peers: Peers) -> Record:
    """Rank 0 counts this start; all compare what they see and want with it."""
    claimed: Record | None = None
    with together(peers.gather):
        if peers.rank == 0:
            claimed = records.claim(path, wanted)
    claimed = peers.gather(claimed)[0]
    assert claimed is not None
    with together(peers.gather):
        claimed.expect(wanted, path)
        if records.read(path) != claimed:
            raise PskdError(
                f"rank {peers.rank} does not see in {path} what rank 0 has written there. "
                "Name a directory on a disk that all ranks share."
            )
    return claimed


class TrainingStore:
    """Past predictions of a loop.

    `begin_epoch`, `end_epoch`, `commit`, `load_state_dict` and `retain` are collective.

    If an epoch trains a sample more than once, its last row counts: of one rank that of the last
    step, of several that of the highest rank. A sample that an epoch leaves out keeps its older
    row.

    After a kill, open the directory again and begin the epoch with which your weights go on: that
    of the last `end_epoch`, or the one before if it had not been followed by a `begin_epoch`. To
    go on anywhere else, keep `state_dict()` with your weights.
    """

    def __init__(
        self,
        directory: Path,
        record: Record,
        peers: Peers,
        device: torch.device,
        lock: IO[str] | None,
    ) -> None:
        """See `open_for_training`. lock: on rank 0, closed at the end."""
        self.directory = directory
        self.n, self.classes = record.n, record.classes
        self._record = record
        self._peers = peers
        self._lock = lock
        self._on_host = device.type == "cpu"
        self._next: int = peers.gather(max(finished_epochs(directory), default=-1) + 1)[0]
        self._latest: list[dict[str, Any]] = []  # the state that a checkpoint may hold
        self._placed = False  # whether it is known where to go on
        self._begun = False  # whether an epoch is in progress
        self._unfinished = False  # whether it has rows, perhaps of an earlier start
        self._closed = False
        self._store = Store(
            directory,
            n=self.n,
            classes=self.classes,
            identity=record.dataset,
            run=record.run,
            start=record.starts,
            peers=peers,
            options=StoreSection(encoding=record.encoding),
            device=device,
        )

    @property
    def epoch(self) -> int:
        """The epoch in progress, 0-based; between epochs, the next one to begin."""
        return self._store.epoch if self._placed else self._next

    def begin_epoch(self, epoch: int) -> None:
        """From now on `past` gives the predictions of `epoch` - 1, and `remember` takes new ones.

        Ends the epoch in progress if it is the one before. What was remembered of this epoch
        before a kill counts only after `load_state_dict`.

        Raises:
            PskdError: epochs do not follow one another, or on another rank it is another epoch;
                predictions of the epoch before are missing or damaged; as `end_epoch`.
        """
        self._refuse_closed()
        epochs = self._peers.gather(epoch)
        if any(other != epoch for other in epochs):
            raise AgreedError(f"ranks begin different epochs: {epochs}, by rank. Begin the same.")
        if not self._placed:
            self._place(epoch)
        elif not self.epoch <= epoch <= self.epoch + self._unfinished:
            raise AgreedError(
                f"epoch {epoch} cannot begin: the next one is {self.epoch + self._unfinished}. "
                "Epochs follow one another; open the directory again to go back."
            )
        self._store.begin_epoch(epoch)
        self._begun = self._unfinished = True
        self._peers.gather(None)  # nobody reads the older generations any more
        if self._peers.rank == 0:
            self._store.retain([*self._record.retained, *self._latest])

    def prefetch(self, ids_B: Tensor | Ids) -> None:
        """Start reading what the next call of `past` will ask for, while something else computes.

        Raises:
            PskdError: as `past`.
        """
        self._refuse_idle()
        self._store.prefetch(self._ids(ids_B))

    def past(self, ids_B: Tensor | Ids) -> tuple[Tensor, Tensor]:
        """Predictions of the epoch before: float32 (B, C), zeros if absent, and present_B bool.

        ids_B: int64 (B,) in 0..N-1, a tensor on the CPU or an array. Both results are on the
        store's device.

        Raises:
            PskdError: ids of another kind, or outside; no epoch has begun.
        """
        self._refuse_idle()
        past_BC, present_B = self._store.past(self._ids(ids_B))
        if self._on_host:  # out of buffers that are used again
            return past_BC.clone(), present_B.clone()
        return past_BC, present_B

    def remember(self, ids_B: Tensor | Ids, probs_BC: Tensor) -> None:
        """Keep predictions of this epoch: floating (B, C) on any device, rows that sum to 1.

        Returns before they are on the disk; both arguments may be overwritten then.

        Raises:
            PskdError: ids as in `past`; rows of another shape or dtype; or, a few steps later,
                rows that are not finite or no probabilities (names the samples), or a full disk.
        """
        self._refuse_idle()
        ids = self._ids(ids_B)
        want = (len(ids), self.classes)
        if probs_BC.shape != want or not probs_BC.is_floating_point():
            raise PskdError(
                f"predictions are {probs_BC.dtype} of shape {tuple(probs_BC.shape)}: give floating "
                f"numbers of shape {want}, a row for each id and a column for each class."
            )
        self._store.remember(ids.copy(), probs_BC.detach().float())

    def end_epoch(self) -> None:
        """Finish the generation: `open_generation(DIR/gen-<epoch>)` reads it from now on.

        Save your weights after it: a kill in between loses nothing.

        Raises:
            PskdError: no epoch has begun; rows as in `remember`, or the disk is full.
        """
        self._refuse_idle()
        self._store.begin_epoch(self.epoch + 1)
        self._begun = self._unfinished = False
        self._peers.gather(None)  # the manifest is there for every rank

    def commit(self) -> None:
        """Make what was remembered durable; `state_dict` names it then. For use inside an epoch.

        Raises:
            PskdError: as `end_epoch`.
        """
        self._refuse_idle()
        self._store.commit()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint of your own: names the predictions as of `end_epoch` or `commit`.

        Numbers, strings and lists; the same on every rank.

        Raises:
            PskdError: before the first `begin_epoch` or `load_state_dict`.
        """
        if not self._placed:
            raise PskdError("the store has no state before its first begin_epoch.")
        state = self._store.state_dict()
        self._latest = [state]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; before the first `begin_epoch`, which takes `state["epoch"]`.

        Reads and checks every row that the state names.

        Raises:
            PskdError: an epoch has begun; rows are missing, damaged or of another store.
        """
        self._refuse_closed()
        if self._placed:
            raise PskdError("load_state_dict comes before the first begin_epoch: open it again.")
        self._load(state)
        self._latest = [state]

    def retain(self, states: Iterable[dict[str, Any]]) -> None:
        """Keep what these states name, of checkpoints that you keep, until the next call of this.

        Without it only the latest `state_dict` can be loaded. It holds after a restart as well.
        What nobody names any more is deleted when the next epoch begins.

        Raises:
            PskdError: the record cannot be written.
        """
        self._refuse_closed()
        record = replace(self._record, retained=list(states))
        with together(self._peers.gather):
            if self._peers.rank == 0:
                records.write(self.directory, record)
        self._record = record

    def close(self) -> None:
        """End the threads and let go of the directory. Not collective; a second call does nothing.

        It does not end an epoch: that one is trained again.
        """
        if self._closed:
            return
        self._closed, self._begun = True, False
        try:
            self._store.close()
        finally:
            if self._lock is not None:
                self._lock.close()

    def __enter__(self) -> "TrainingStore":
        """For `with`."""
        return self

    def __exit__(self, *error: object) -> None:
        """As `close`."""
        self.close()

    def _place(self, epoch: int) -> None:
        """Go on with `epoch`, from the finished generation before it."""
        state = self._store.empty_state(epoch)
        with together(self._peers.gather):
            if self._peers.rank == 0:
                self._refuse_far(epoch)
                if epoch:
                    state["finished"] = self._entries(epoch - 1)
        self._load(self._peers.gather(state)[0])

    def _refuse_far(self, epoch: int) -> None:
        """Another epoch than the next one and, if nothing has come after it, the last one."""
        known = {done + 1 for done in finished_epochs(self.directory)}
        if self._next <= 1:
            known.add(0)
        if epoch not in known:
            raise PskdError(
                f"epoch {epoch} cannot begin: with what {self.directory} holds, training goes on "
                f"with epoch {' or '.join(map(str, sorted(known)))}, and the weights that belong "
                "to it. For another, load a state_dict; to begin anew, name another directory."
            )

    def _entries(self, epoch: int) -> list[list[Any]]:
        """Of a finished generation, as a state names them."""
        manifest = read_manifest(self.directory / generation_name(epoch))
        return [list(entry) for entry in manifest.entries]

    def _load(self, state: dict[str, Any]) -> None:
        with together(self._peers.gather):
            self._store.load_state_dict(state)
        with together(self._peers.gather):
            if self._peers.rank == 0:
                self._make_last(state["epoch"] - 1, [Entry(*e) for e in state["finished"]])
        self._placed = True
        self._unfinished = bool(state["growing"])

    def _make_last(self, epoch: int, entries: list[Entry]) -> None:
        """Let a generation of these entries be the last finished one: what follows will differ."""
        for later in finished_epochs(self.directory):
            if later > epoch:
                (self.directory / generation_name(later) / MANIFEST).unlink()
        if entries:  # what is there may be of another attempt at that epoch
            write_manifest(self.directory, epoch, self.n, self.classes, entries)

    def _ids(self, ids_B: Tensor | Ids) -> Ids:
        """As an array, without a copy.

        Raises:
            PskdError: of another kind, or outside the data set.
        """
        if isinstance(ids_B, Tensor):
            if ids_B.device.type != "cpu":
                raise PskdError(
                    f"sample ids are on {ids_B.device}: to read them would wait for it. Leave the "
                    "ids that the loader gives on the CPU."
                )
            ids_B = ids_B.numpy()
        if not isinstance(ids_B, np.ndarray) or ids_B.dtype != np.int64 or ids_B.ndim != 1:
            kind = getattr(ids_B, "dtype", type(ids_B).__name__)
            raise PskdError(
                f"sample ids are {kind} of shape {np.shape(ids_B)}: give int64 of shape (B,), a "
                "tensor or an array."
            )
        outside_B = (ids_B < 0) | (ids_B >= self.n)
        if outside_B.any():
            raise PskdError(
                f"sample ids outside 0..{self.n - 1}: "
                f"{ids_B[outside_B][:_NAMED_IDS].tolist()}. Number the training samples from 0."
            )
        return ids_B

    def _refuse_idle(self) -> None:
        if not self._begun:
            raise PskdError("no epoch is in progress: begin_epoch comes first.")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise PskdError("the store is closed: open it again.")
