"""What a prediction store holds, and whether it is whole: `pskd store info | verify`."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from pskd.checkpoint import Checkpoints
from pskd.errors import PskdError
from pskd.run_dir import RunDir
from pskd.store import record
from pskd.store.format import Entry
from pskd.store.generation import (
    MANIFEST,
    Generation,
    finished_epochs,
    generation_name,
    read_manifest,
)
from pskd.store.segment import SegmentReader


class _Holding(NamedTuple):
    """Rows of one epoch: a finished generation, or what a checkpoint names of one."""

    epoch: int
    named_by: str
    entries: list[Entry]


class _Place(NamedTuple):
    """Where generations lie, and the checkpoints of the run, if a run it is, that name them."""

    store: Path
    checkpoints: Path | None


def info(directory: Path) -> str:
    """A table of the generations in a run, its `store/` or a loop's directory; who names them.

    Raises:
        PskdError: no predictions there; a manifest or segment cannot be read.
    """
    place = _place(directory)
    manifests = [_finished(path) for path in _manifests(place.store)]
    found = sorted(manifests + _named_by_checkpoints(place))
    if not found:
        raise _nothing(directory)
    lines = [
        f"{'epoch':>5}  {'named by':22}  {'samples':>19}  {'classes':>7}  {'encoding':9}  "
        f"{'segments':>8}  {'MB':>9}"
    ]
    for epoch, named_by, entries in found:
        header = SegmentReader(place.store / entries[0].segment, entries[0]).header
        generation = Generation(place.store, header.n, header.classes, entries)
        present = int(generation.present_N.sum())
        size = sum(segment.end for segment in generation.segments) / 1e6
        lines.append(
            f"{epoch + 1:5}  {named_by:22}  {present:9,}/{header.n:<9,}  {header.classes:7}  "
            f"{header.encoding:9}  {len(entries):8}  {size:9,.1f}"
        )
    return "\n".join(lines)


def verify(directory: Path) -> Iterator[tuple[str, str | None]]:
    """Read every named row: for each manifest and segment, what it is and what is wrong with it.

    Raises:
        PskdError: no predictions there.
    """
    place = _place(directory)
    entries = {entry for holding in _named_by_checkpoints(place) for entry in holding.entries}
    manifests = _manifests(place.store)
    if not entries and not manifests:
        raise _nothing(directory)
    for path in manifests:
        damage = None
        try:
            entries.update(_finished(path).entries)
        except PskdError as error:
            damage = str(error)
        yield str(path.relative_to(place.store)), damage
    by_segment = groupby(sorted(entries), key=lambda entry: entry.segment)
    named = [list(group) for _, group in by_segment]
    # crc32 and page faults run outside the interpreter's lock.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        yield from threads.map(lambda group: _verify(place.store, group), named)


def _place(directory: Path) -> _Place:
    """Of a run directory, its store, or the directory that somebody's own loop has opened."""
    if not any(directory.glob("gen-*")):
        run = RunDir(directory)
        return _Place(run.store, run.checkpoints)
    run = RunDir(directory.absolute().parent)
    of_a_run = run.store == directory.absolute() and not (directory / record.RECORD).exists()
    return _Place(directory, run.checkpoints if of_a_run else None)


def _manifests(store: Path) -> list[Path]:
    return [store / generation_name(epoch) / MANIFEST for epoch in finished_epochs(store)]


def _finished(path: Path) -> _Holding:
    manifest = read_manifest(path.parent)
    return _Holding(manifest.epoch, "manifest", manifest.entries)


def _named_by_checkpoints(place: _Place) -> list[_Holding]:
    states = {}
    if place.checkpoints is not None:
        states.update(Checkpoints(place.checkpoints).store_states())
    loop = record.read(place.store)
    if loop is not None:
        states.update({f"state {k + 1}": state for k, state in enumerate(loop.retained)})
    found = []
    for name, state in states.items():
        for epoch, part in ((state["epoch"] - 1, "finished"), (state["epoch"], "growing")):
            if state[part]:
                found.append(_Holding(epoch, name, [Entry(*e) for e in state[part]]))
    return found


def _verify(store: Path, entries: list[Entry]) -> tuple[str, str | None]:
    """Of one segment, by rising number of rows: each must be a prefix, and the last one whole."""
    damage = None
    try:
        segments = [SegmentReader(store / entry.segment, entry) for entry in entries]
        segments[-1].verify()
    except PskdError as error:
        damage = str(error)
    return f"{entries[-1].segment}: {entries[-1].rows:,} rows", damage


def _nothing(directory: Path) -> PskdError:
    return PskdError(
        f"{directory} holds no past predictions of a finished epoch: name the run directory of a "
        "method that keeps them, its store/, or what open_for_training was given."
    )
