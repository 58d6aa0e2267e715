"""The index of a folder of encoded images: what training needs to know before it opens one.

A sample's id is its row; rows are sorted bytewise by path relative to the folder. The index is one
file, in the container that `index_format` specifies. Its arrays, for N samples:

    paths    uint8           relative paths, one after the other
    offsets  int64  N + 1    where each begins in `paths`, and the end of the last
    labels   int32  N        row of `class_names`
    widths, heights  int32 N     pixels as stored, without the rotation that EXIF may ask for
    bytes    int64  N        size of the file

Its JSON: `class_names`; `fingerprint`, sha256 over class names and all arrays; `dropped`, [path,
reason] of files left out; `labels_from`, the options of `pskd index` that gave the labels, or "";
`snapshot`, see `folder.Snapshot`. Names that are not UTF-8 have surrogate escapes.

An index is out of date when another set of class folders (or images) lies in the root, or a folder
in it has another mtime: files were added, removed or renamed. Not noticed: a file overwritten in
place, a change within one tick of the file system's clock after the folder was listed, a changed
target of a link to a file, and bytes of the index's arrays gone bad. `verify` finds these.
"""

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pskd.data import index_format
from pskd.data.folder import (
    MOST_NAMED,
    Snapshot,
    as_text,
    list_classes,
    refuse_classes_without_images,
    shown,
)
from pskd.data.headers import Headers, Progress, read_headers
from pskd.data.index_format import Arrays
from pskd.data.labels import GroundTruth, PathList
from pskd.errors import PskdError
from pskd.files import FormatError, write_atomically

NAME = ".pskd-index"  # beside the class folders

Labels = GroundTruth | PathList
Complaint = tuple[str, str]  # path relative to the root, reason

log = logging.getLogger("pskd")


@dataclass(frozen=True, eq=False)
class Index:
    """Samples of a folder: in memory after `build`, mapped from `file` after `open_index`."""

    root: Path
    class_names: tuple[str, ...] = field(repr=False)
    labels_N: npt.NDArray[np.int32] = field(repr=False)
    widths_N: npt.NDArray[np.int32] = field(repr=False)
    heights_N: npt.NDArray[np.int32] = field(repr=False)
    bytes_N: npt.NDArray[np.int64] = field(repr=False)
    fingerprint: str
    dropped: tuple[Complaint, ...]
    labels_from: str
    snapshot: Snapshot = field(repr=False)
    paths: npt.NDArray[np.uint8] = field(repr=False)
    offsets_N: npt.NDArray[np.int64] = field(repr=False)
    file: Path | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.labels_N)

    def relative(self, sample: int) -> bytes:
        """Path of a sample, relative to the root."""
        return self.paths[self.offsets_N[sample] : self.offsets_N[sample + 1]].tobytes()

    def path(self, sample: int) -> str:
        """Absolute path of a sample."""
        return os.fsdecode(self._prefix + self.relative(sample))

    @cached_property
    def samples(self) -> str:
        """sha256 over classes, paths and labels: what a run is bound to. A file may be mended."""
        digest = hashlib.sha256(json.dumps([self.class_names, len(self)]).encode())
        for array in (self.paths, self.offsets_N, self.labels_N):
            digest.update(array.data)
        return digest.hexdigest()

    @cached_property
    def _prefix(self) -> bytes:
        return os.fsencode(self.root / "_")[:-1]

    @cached_property
    def _blob(self) -> memoryview:
        """The paths; slicing this is three times as fast as slicing an array."""
        return self.paths.data

    def path_bytes(self, ids_B: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        """Absolute paths of some samples: read-only views of one buffer, made for this call."""
        blob, prefix = self._blob, self._prefix
        starts_B, ends_B = self.offsets_N[ids_B], self.offsets_N[ids_B + 1]
        parts = [blob[a:b] for a, b in zip(starts_B.tolist(), ends_B.tolist(), strict=True)]
        joined = np.frombuffer(prefix + prefix.join(parts), np.uint8)
        cuts = np.cumsum(ends_B - starts_B + len(prefix)).tolist()
        return [joined[a:b] for a, b in pairwise((0, *cuts))]


def build(
    root: Path,
    *,
    labels: Labels | None = None,
    drop_bad: bool = False,
    decode: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Index:
    """Look at every image of a folder; nothing is written.

    labels: None is by class folders. drop_bad: files of no use are left out, not refused.
    decode: a file is of use only if its whole content decodes, and not just its header.

    Raises:
        PskdError: no samples, files of no use, or labels that do not fit; all of them at once.
    """
    root = Path(root).absolute()
    listing = list_classes(root) if labels is None else labels.listing(root)
    labels_from = "" if labels is None else labels.options
    base = os.fsencode(root / "_")[:-1]
    headers = read_headers(
        [base + path for path in listing.paths], decode=decode, workers=workers, progress=progress
    )
    wrong = tuple((as_text(listing.paths[row]), why) for row, why in headers.wrong.items())
    if wrong and not drop_bad:
        raise PskdError(
            f"{len(wrong)} of {len(listing.paths)} files in {shown(str(root))} cannot be used:\n"
            f"{describe(wrong)}\nMend or remove them, or leave them out: "
            f"`{command(root, labels_from)} --drop-bad`."
        )
    kept = [row for row in range(len(listing.paths)) if row not in headers.wrong]
    if not kept:
        raise PskdError(f"{shown(str(root))} has no image that can be used.")
    labels_N = np.array([listing.labels[row] for row in kept], np.int32)
    if labels is None:
        lost = set(range(len(listing.class_names))) - set(np.unique(labels_N).tolist())
        refuse_classes_without_images(root, [listing.class_names[k] for k in sorted(lost)])
    arrays = _arrays([listing.paths[row] for row in kept], labels_N, headers, kept)
    return _index(
        root,
        arrays,
        class_names=listing.class_names,
        fingerprint=fingerprint_of(listing.class_names, arrays),
        dropped=wrong,
        labels_from=labels_from,
        snapshot=listing.snapshot,
    )


def write(index: Index, path: Path) -> None:
    """Replace the file `path` by an index.

    Raises:
        PskdError: the file there is something else.
        OSError: no space, no permission.
    """
    if index_format.is_foreign(path):
        raise PskdError(f"{path} is not an index, so it is not overwritten. Name another file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "class_names": index.class_names,
        "fingerprint": index.fingerprint,
        "dropped": index.dropped,
        "labels_from": index.labels_from,
        "snapshot": asdict(index.snapshot),
    }
    write_atomically(path, index_format.pack(facts, arrays_of(index)))


def open_index(path: Path, root: Path) -> Index:
    """Map an index file; whether it is current is not asked.

    Raises:
        PskdError: it cannot be read, is damaged or of another version.
    """
    try:
        return _open(path, root)
    except (OSError, FormatError) as error:
        raise PskdError(f"{path}: {_reason(error)}. Run `{command(root)}`.") from error


def out_of_date(index: Index) -> str | None:
    """Why an index is out of date, or None: see the top of this module."""
    return index.snapshot.difference(index.root)


def find(root: Path, index_path: Path | None = None) -> tuple[Index | None, str | None]:
    """The index of a folder, and why it cannot be used: (Index, None) is a current one.

    Looked for at `index_path`, else beside the class folders and then in the user's cache.
    """
    stale: Index | None = None
    reason: str | None = None
    for place in places(root, index_path):
        try:
            index = _open(place, root)
        except FileNotFoundError:
            continue
        except (OSError, FormatError) as error:
            reason = reason or f"{place}: {_reason(error)}"
            continue
        difference = out_of_date(index)
        if difference is None:
            return index, None
        stale = stale or index
        reason = reason or f"{place} is out of date: {difference}"
    return stale, reason or "it has no index yet"


def save(index: Index, index_path: Path | None = None) -> Path:
    """Write an index where `find` looks for it; returns the place.

    Raises:
        PskdError: it can be written nowhere.
    """
    troubles = []
    for place in places(index.root, index_path):
        try:
            write(index, place)
        except OSError as error:
            troubles.append(f"{place}: {_reason(error)}")
        else:
            return place
    raise PskdError(
        f"The index of {shown(str(index.root))} cannot be written ({'; '.join(troubles)}). "
        f"Name a place for it: `{command(index.root, index.labels_from)} --index-path FILE`."
    )


def load_or_build(
    root: Path,
    index_path: Path | None = None,
    *,
    labels: Labels | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Index:
    """The current index of a folder: the one found, else a new one, which is written first.

    Raises:
        PskdError: as `build` and `save`; or the one found is out of date and only its files of
            labels could renew it.
    """
    index, reason = find(root, index_path)
    if index is not None and reason is None:
        if labels is None or labels.options == index.labels_from:
            return index
        reason = "other labels are asked for"
    if index is not None and index.labels_from and labels is None:
        where = "" if index_path is None else f" --index-path {shlex.quote(str(index_path))}"
        raise PskdError(f"{reason}. Run `{command(root, index.labels_from)}{where}`.")
    log.info("looking at the images of %s: %s", root, reason)
    built = build(root, labels=labels, workers=workers, progress=progress)
    return open_index(save(built, index_path), root)


def places(root: Path, index_path: Path | None = None) -> list[Path]:
    """Where the index of a folder may lie, in the order in which they are tried."""
    if index_path is not None:
        return [index_path]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return [root / NAME, cache / "pskd" / f"{key}.pskd-index"]


def command(root: Path, labels_from: str = "") -> str:
    """The command that makes the index of a folder."""
    return f"pskd index {shlex.quote(shown(str(root)))} {labels_from}".rstrip()


def describe(complaints: Sequence[Complaint]) -> str:
    """One line for each of the first files, and how many more there are."""
    lines = [f"  {shown(path)}: {shown(reason)}" for path, reason in complaints[:MOST_NAMED]]
    if len(complaints) > MOST_NAMED:
        lines.append(f"  and {len(complaints) - MOST_NAMED} more")
    return "\n".join(lines)


def _arrays(
    paths: list[bytes], labels_N: npt.NDArray[np.int32], headers: Headers, rows: list[int]
) -> Arrays:
    offsets_N = np.zeros(len(paths) + 1, "<i8")
    np.cumsum([len(path) for path in paths], out=offsets_N[1:])
    return {
        "paths": np.frombuffer(b"".join(paths), np.uint8),
        "offsets": offsets_N,
        "labels": labels_N.astype("<i4"),
        "widths": headers.widths_N[rows].astype("<i4"),
        "heights": headers.heights_N[rows].astype("<i4"),
        "bytes": headers.bytes_N[rows].astype("<i8"),
    }


def _index(root: Path, arrays: Arrays, **facts: Any) -> Index:
    return Index(
        root=root,
        labels_N=arrays["labels"],
        widths_N=arrays["widths"],
        heights_N=arrays["heights"],
        bytes_N=arrays["bytes"],
        paths=arrays["paths"],
        offsets_N=arrays["offsets"],
        **facts,
    )


def arrays_of(index: Index) -> Arrays:
    """The arrays of a file, by their names there."""
    return {
        "paths": index.paths,
        "offsets": index.offsets_N,
        "labels": index.labels_N,
        "widths": index.widths_N,
        "heights": index.heights_N,
        "bytes": index.bytes_N,
    }


def _open(path: Path, root: Path) -> Index:
    facts, arrays = index_format.read(path)
    snapshot = facts["snapshot"]
    return _index(
        Path(root).absolute(),
        arrays,
        class_names=tuple(facts["class_names"]),
        fingerprint=facts["fingerprint"],
        dropped=tuple((path, reason) for path, reason in facts["dropped"]),
        labels_from=facts["labels_from"],
        file=path,
        snapshot=Snapshot(
            snapshot["layout"],
            snapshot["names"],
            tuple((name, files, mtime) for name, files, mtime in snapshot["directories"]),
        ),
    )


def fingerprint_of(class_names: tuple[str, ...], arrays: Arrays) -> str:
    """sha256 over classes and all that is known of the images: of the index, and not of a run."""
    digest = hashlib.sha256(json.dumps([class_names, len(arrays["labels"])]).encode())
    for array in arrays.values():
        digest.update(array.data)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
