"""Labels that come from a file instead of from class folders. Letter: K classes."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pskd.data.folder import (
    Listing,
    as_bytes,
    as_text,
    enumerated,
    names_in,
    shown,
    take_snapshot,
)
from pskd.errors import PskdError

MOST_CLASSES = 1_000_000  # a larger integer is a mistake, not a label

_INTEGER = re.compile(rb"-?\d{1,18}")


@dataclass(frozen=True)
class GroundTruth:
    """The labels of ImageNet's validation images, which lie in one flat folder.

    file: one integer a line, for the images sorted bytewise. It is an ILSVRC2012_ID, counted from
    1 in an order of its own. classes: which class each integer is, see `_classes_by_id`. The label
    is the class's place among all, sorted: the same as in a folder of class folders.
    """

    file: Path
    classes: Path

    @property
    def options(self) -> str:
        """What `pskd index` is told to take these labels."""
        return _options({"--ground-truth": self.file, "--classes": self.classes})

    def listing(self, root: Path) -> Listing:
        """The samples of a folder.

        Raises:
            PskdError: the files or the folder do not fit together.
        """
        folders = names_in(root, "classes")
        if folders:
            raise PskdError(
                f"--ground-truth is for a folder of images only, but {root} has folders: "
                f"{enumerated([as_text(name) for name in folders])}. Move them away, or index it "
                f"by its folders without --ground-truth."
            )
        snapshot = take_snapshot(root, "files", [])
        paths = names_in(root, "files")
        names = _classes_by_id(self.classes)
        numbers = [
            _label(text.strip(), 1, len(names), f"{self.file}:{number}")
            for number, text in _lines(self.file)
        ]
        if len(numbers) != len(paths):
            raise PskdError(
                f"--ground-truth {self.file} has {len(numbers)} lines, but {root} has {len(paths)} "
                f"images. Give the ground truth of these images."
            )
        class_names = sorted(names)
        place = {name: label for label, name in enumerate(class_names)}
        labels = [place[names[number - 1]] for number in numbers]
        return Listing(tuple(map(as_text, class_names)), paths, labels, snapshot)


@dataclass(frozen=True)
class PathList:
    """A file of lines `path label`: a path relative to the folder, a label after the last blank.

    Labels are integers from 0 if the first is one, else names of classes. classes: a text file of
    one class a line. It names the integers in its order; without it their names are the integers.
    """

    file: Path
    classes: Path | None = None

    @property
    def options(self) -> str:
        """What `pskd index` is told to take these labels."""
        return _options({"--list": self.file, "--classes": self.classes})

    def listing(self, root: Path) -> Listing:
        """The samples of a folder.

        Raises:
            PskdError: a line cannot be used, or names no file; nothing is listed.
        """
        rows = list(self._rows(root))
        if not rows:
            raise PskdError(f"--list {self.file} has no line `path label`.")
        base = os.fsencode(root)
        images = Counter(os.path.dirname(path) for path, _, _ in rows)  # noqa: PTH120
        del images[b""]  # the root
        directories = [
            (name, count, os.stat(os.path.join(base, name)).st_mtime_ns)  # noqa: PTH116, PTH118
            for name, count in images.items()
        ]
        snapshot = take_snapshot(root, "files", directories)
        class_names, labels = self._labels([text for _, text, _ in rows], [n for *_, n in rows])
        samples = sorted(zip([path for path, _, _ in rows], labels, strict=True))
        return Listing(
            class_names=tuple(map(as_text, class_names)),
            paths=[path for path, _ in samples],
            labels=[label for _, label in samples],
            snapshot=snapshot,
        )

    def _rows(self, root: Path) -> Iterator[tuple[bytes, bytes, int]]:
        """(path, label, number) of each line."""
        base = os.fsencode(root)
        first: dict[bytes, int] = {}
        for number, line in _lines(self.file):
            place = f"{self.file}:{number}"
            parts = line.rsplit(maxsplit=1)
            if len(parts) != 2:
                raise PskdError(f"{place}: {shown(as_text(line))} is not `path label`.")
            path = os.path.normpath(parts[0])
            if path.startswith((b"/", b"../")):
                raise PskdError(f"{place}: {shown(as_text(path))} is not relative to {root}.")
            if not os.path.lexists(os.path.join(base, path)):  # noqa: PTH118
                raise PskdError(f"{place}: {root} has no {shown(as_text(path))}.")
            if path in first:
                raise PskdError(
                    f"{place}: {shown(as_text(path))} was listed in line {first[path]} already."
                )
            first[path] = number
            yield path, parts[1], number

    def _labels(self, texts: list[bytes], numbers: list[int]) -> tuple[list[bytes], list[int]]:
        """Names of the classes, and the label of each line."""
        known = None if self.classes is None else _classes_by_id(self.classes)
        places = [f"{self.file}:{number}" for number in numbers]
        if _INTEGER.fullmatch(texts[0]):
            most = MOST_CLASSES if known is None else len(known)
            labels = [_label(t, 0, most - 1, p) for t, p in zip(texts, places, strict=True)]
            return known or [b"%d" % k for k in range(max(labels) + 1)], labels
        class_names = sorted(known or set(texts))
        place = {name: label for label, name in enumerate(class_names)}
        for text, line in zip(texts, places, strict=True):
            if text not in place:
                raise PskdError(f"{line}: class {shown(as_text(text))} is not in {self.classes}.")
        return class_names, [place[text] for text in texts]


def _classes_by_id(path: Path) -> list[bytes]:
    """Names of the classes in the order of their ids.

    `meta.mat` of ImageNet's devkit, or a text file: the first word of each line.
    """
    if path.suffix == ".mat":
        return _leaves(path)
    names: dict[bytes, int] = {}
    for number, line in _lines(path):
        name = line.split()[0]
        if name in names:
            raise PskdError(
                f"{path}:{number}: class {shown(as_text(name))} is in line {names[name]} already."
            )
        names[name] = number
    if not names:
        raise PskdError(f"--classes {path} names no class.")
    return list(names)


def _leaves(path: Path) -> list[bytes]:
    """The WordNet ids of `meta.mat`: its leaves are the classes and have the ids 1..K."""
    from scipy.io import loadmat  # noqa: PLC0415  (rarely needed)

    try:
        synsets: Any = loadmat(str(path), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        ids = [int(k) for k in leaves["ILSVRC2012_ID"]]
        names = [as_bytes(str(name)) for name in leaves["WNID"]]
    except OSError as error:
        raise PskdError(f"--classes {path}: {error.strerror or error}.") from error
    except Exception as error:  # whatever scipy makes of other bytes
        raise PskdError(
            f"--classes {path} is not the meta.mat of the ILSVRC2012 devkit "
            f"({type(error).__name__}: {error})."
        ) from error
    if sorted(ids) != list(range(1, len(ids) + 1)) or len(set(names)) != len(names):
        raise PskdError(
            f"--classes {path}: its {len(ids)} leaves do not have the ids 1..{len(ids)}."
        )
    return [name for _, name in sorted(zip(ids, names, strict=True))]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a text file; lines of blanks are skipped."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PskdError(f"{path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.rstrip()  # a path may begin with a blank


def _label(text: bytes, low: int, high: int, place: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise PskdError(f"{place}: {shown(as_text(text))} is not an integer {low}..{high}.")
    if not low <= int(text) <= high:
        raise PskdError(f"{place}: {int(text)} is outside {low}..{high}.")
    return int(text)


def _options(options: dict[str, Path | None]) -> str:
    """Options for a shell, from any working directory."""
    return " ".join(
        f"{name} {shlex.quote(str(path.absolute()))}"
        for name, path in options.items()
        if path is not None
    )
