"""Folders to be indexed, and indices, for tests."""

import numpy as np
from PIL import Image
from scipy.io import savemat

from pskd.data.folder import Snapshot, as_text
from pskd.data.index import (
    Index,
    build,
    open_index,
    save,
)


def image(path, size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.new("RGB", size).save(file, "PNG")
    return path


def relatives(index):
    return [index.relative(k) for k in range(len(index))]


def saved(root, **options):
    return open_index(save(build(root, **options)), root)


def rewritten_later(path, content):
    """Overwrite in place; the folder does not change."""
    before = path.parent.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(content)
    assert path.parent.stat().st_mtime_ns == before


def synthetic(root, paths, labels=None, class_names=("a",)):
    n = len(paths)
    numbers = np.arange(n)
    return Index(
        root=root,
        class_names=class_names,
        labels_N=np.zeros(n, "<i4") if labels is None else labels,
        widths_N=(numbers + 1).astype("<i4"),
        heights_N=(numbers + 2).astype("<i4"),
        bytes_N=(numbers * 2**33).astype("<i8"),
        fingerprint="0" * 64,
        dropped=((as_text(b"\xff\n"), "why"),),
        labels_from="--list 'a b'",
        snapshot=Snapshot("classes", "names", (("a", n, 5),)),
        paths=np.frombuffer(b"".join(paths), np.uint8),
        offsets_N=np.cumsum([0, *map(len, paths)]).astype("<i8"),
    )


def same(a, b):
    facts = ("class_names", "fingerprint", "dropped", "labels_from", "snapshot")
    arrays = ("labels_N", "widths_N", "heights_N", "bytes_N", "paths", "offsets_N")
    return all(getattr(a, f) == getattr(b, f) for f in facts) and all(
        np.array_equal(getattr(a, f), getattr(b, f)) and getattr(a, f).dtype == getattr(b, f).dtype
        for f in arrays
    )


# The devkit's ids are not in the order of the names; its first leaves come before other synsets.
SYNSETS = [
    (1, "n03", "kit fox", 0),
    (5, "n00", "fox", 2),
    (3, "n01", "grey fox", 0),
    (2, "n02", "red fox", 0),
    (4, "n04", "wolf", 0),
    (6, "n05", "entity", 3),
]


def write_meta(path):
    """In the layout of the devkit's meta.mat."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
    kinds += [("num_children", "O"), ("children", "O"), ("wordnet_height", "O")]
    kinds += [("num_train_images", "O")]
    synsets = np.zeros((len(SYNSETS), 1), kinds)
    for row, (number, name, words, children) in enumerate(SYNSETS):
        below = np.arange(children, dtype=np.float64)
        synsets[row, 0] = (number, name, words, "a gloss", children, below, 0, 1300)
    savemat(path, {"synsets": synsets})
    return path
