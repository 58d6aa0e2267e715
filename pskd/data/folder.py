"""What a folder of images contains, by its directories alone: no image is opened.

Names are bytes, as Linux has them. As text (class names, JSON) they are UTF-8 with surrogate
escapes for bytes that are not, whatever the locale.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pskd.errors import PskdError
from pskd.words import counted

EXTENSIONS = (
    b".jpg",
    b".jpeg",
    b".jpe",
    b".png",
    b".bmp",
    b".webp",
    b".tif",
    b".tiff",
    b".ppm",
)
MOST_NAMED = 20  # so many things are named in a message

Layout = Literal["classes", "files"]


def as_text(name: bytes) -> str:
    """A name as text, without loss."""
    return name.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """The name that `as_text` was given."""
    return text.encode("utf-8", "surrogateescape")


def shown(name: str) -> str:
    """A name as people can read it, on one line."""
    return name if name.isprintable() else repr(name)


def enumerated(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(shown(name) for name in names[:MOST_NAMED]) + more


def is_image(name: bytes) -> bool:
    """Whether a file's name says that it is an image; hidden files are not."""
    return not name.startswith(b".") and name.lower().endswith(EXTENSIONS)


@dataclass(frozen=True)
class Snapshot:
    """How the directories looked when they were listed.

    names: sha256 of the names in the root that count: of class folders, or of images. The root's
    own time does not count, for an index is written there. directories: relative path, number of
    images, mtime_ns of each that was listed, except the root.
    """

    layout: Layout
    names: str
    directories: tuple[tuple[str, int, int], ...]

    def difference(self, root: Path) -> str | None:
        """What is not as it was, or None. Costs one listing of the root and a stat a directory."""
        if _digest(names_in(root, self.layout)) != self.names:
            what = "class folders" if self.layout == "classes" else "images"
            return f"other {what} lie in {root} than before"
        base = os.fsencode(root)
        for name, _, mtime_ns in self.directories:
            try:
                status = os.stat(os.path.join(base, as_bytes(name)))  # noqa: PTH116, PTH118
            except OSError as error:
                return f"folder {shown(name)}: {error.strerror}"
            if status.st_mtime_ns != mtime_ns:
                return f"folder {shown(name)} has changed"
        return None


@dataclass(frozen=True)
class Listing:
    """Samples in the order of their ids: sorted bytewise by path relative to the root."""

    class_names: tuple[str, ...]
    paths: list[bytes]
    labels: list[int]
    snapshot: Snapshot


def names_in(root: Path, layout: Layout) -> list[bytes]:
    """The names that count, sorted: of sub-directories, or of images. Hidden ones do not.

    Raises:
        PskdError: the folder is missing or cannot be listed.
    """
    counts: Callable[[os.DirEntry[bytes]], bool] = (
        is_directory if layout == "classes" else lambda entry: is_image(entry.name)
    )
    return sorted(entry.name for entry in entries(os.fsencode(root)) if counts(entry))


def take_snapshot(
    root: Path, layout: Layout, directories: list[tuple[bytes, int, int]]
) -> Snapshot:
    """The root as it is now, and the given directories."""
    named = tuple((as_text(name), files, mtime_ns) for name, files, mtime_ns in directories)
    return Snapshot(layout, _digest(names_in(root, layout)), named)


def list_classes(root: Path) -> Listing:
    """A folder of class folders; images may lie at any depth below a class.

    Links are followed. Files beside the class folders, hidden files and folders, and files of
    other extensions are no samples.

    Raises:
        PskdError: no class folder, a class without an image, or a folder that cannot be listed.
    """
    names = names_in(root, "classes")
    if not names:
        raise PskdError(
            f"{root} has no class folders. Give a folder DIR/<class>/<image>, or name the labels "
            f"of its images: `pskd index DIR --list FILE`, or for the validation images of "
            f"ImageNet `pskd index DIR --ground-truth FILE --classes FILE`."
        )
    directories: list[tuple[bytes, int, int]] = []
    samples: list[tuple[bytes, int]] = []
    empty = []
    for label, name in enumerate(names):
        before = len(samples)
        for relative, images, mtime_ns in walk(os.fsencode(root), name, ()):
            directories.append((relative, len(images), mtime_ns))
            samples.extend((b"%b/%b" % (relative, image), label) for image in images)
        if len(samples) == before:
            empty.append(as_text(name))
    refuse_classes_without_images(root, empty)
    samples.sort()
    return Listing(
        class_names=tuple(as_text(name) for name in names),
        paths=[path for path, _ in samples],
        labels=[label for _, label in samples],
        snapshot=take_snapshot(root, "classes", directories),
    )


def refuse_classes_without_images(root: Path, empty: list[str]) -> None:
    """Stop if there are any: an empty folder is more often a mistake than a class.

    Raises:
        PskdError: there are.
    """
    if empty:
        raise PskdError(
            f"{root}: {counted(len(empty), 'class folder')} without a usable image: "
            f"{enumerated(empty)}. Add images, or remove the folders."
        )


def is_directory(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is a directory or a link to one, and not hidden."""
    try:
        return not entry.name.startswith(b".") and entry.is_dir()
    except OSError:  # a link to itself: found to be no image later
        return False


def entries(directory: bytes) -> Iterator[os.DirEntry[bytes]]:
    """What lies in a directory.

    Raises:
        PskdError: it is missing, no directory, or cannot be listed.
    """
    try:
        with os.scandir(directory) as found:
            yield from found
    except OSError as error:
        path = shown(as_text(directory))
        raise PskdError(f"Folder {path} cannot be listed: {error.strerror}.") from error


def walk(
    root: bytes, relative: bytes, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[bytes, list[bytes], int]]:
    """(relative path, names of images, mtime_ns) of a directory and of all below it."""
    path = os.path.join(root, relative)  # noqa: PTH118
    status = os.stat(path)  # before the listing: what is added meanwhile changes it  # noqa: PTH116
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise PskdError(f"{shown(as_text(path))} is a link to a folder above it. Remove the link.")
    images, below = [], []
    for entry in entries(path):
        if is_directory(entry):
            below.append(entry.name)
        elif is_image(entry.name):
            images.append(entry.name)
    yield relative, images, status.st_mtime_ns
    for name in below:
        yield from walk(root, b"%b/%b" % (relative, name), (*above, identity))


def other_files(root: Path, snapshot: Snapshot) -> dict[str, int]:
    """How many files are no images by their names, by extension, where images were looked for.

    Hidden ones do not count; "no extension" stands for those without one.

    Raises:
        PskdError: a folder cannot be listed.
    """
    names = [b"", *(as_bytes(name) for name, _, _ in snapshot.directories)]
    counts: Counter[str] = Counter()
    for name in names:
        for entry in entries(os.path.join(os.fsencode(root), name)):  # noqa: PTH118
            if not (entry.name.startswith(b".") or is_image(entry.name) or is_directory(entry)):
                extension = os.path.splitext(as_text(entry.name))[1].lower()  # noqa: PTH122
                counts[extension or "no extension"] += 1
    return dict(sorted(counts.items()))


def _digest(names: list[bytes]) -> str:
    return hashlib.sha256(b"\0".join(names)).hexdigest()
