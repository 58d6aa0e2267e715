"""Whether a folder is one of classes, or of the splits `train` and `val`. No image is opened."""

import os
from pathlib import Path

from pskd.data.folder import as_text, enumerated, names_in, shown, walk
from pskd.errors import PskdError

SPLITS = (b"train", b"val")
_NO_CLASSES = (b"test",)  # often beside them, with images that have no labels


def splits_in(root: Path) -> tuple[list[str], list[str]]:
    """(splits to read, folders that are left out); no splits: the folder is one of classes.

    Its `train` and `val` are splits if they hold folders of images, or if there is nothing else.

    Raises:
        PskdError: it can be read both ways, or a folder cannot be listed.
    """
    names = names_in(root, "classes")
    if names == [*SPLITS]:
        return ["train", "val"], []
    nested = [name for name in SPLITS if name in names and _holds_folders_of_images(root, name)]
    if not nested:
        return [], []
    # A flat `val` beside `train`: its labels are asked for, or given.
    splits = [name for name in SPLITS if name in names] if b"train" in nested else nested
    others = [name for name in names if name not in splits]
    like_classes = [
        as_text(name) for name in others if name not in _NO_CLASSES and _holds_images(root, name)
    ]
    mixed = [as_text(name) for name in nested if _holds_images(root, name)]
    if mixed or (like_classes and len(nested) == 1):
        reasons = (
            f"images lie beside the folders in {enumerated(mixed)}"
            if mixed
            else (f"{enumerated(like_classes)} hold images as well")
        )
        first = shown(str(root / as_text(nested[0])))
        raise PskdError(
            f"{shown(str(root))} can be read in two ways, as {reasons}: as the splits "
            f"{enumerated([as_text(name) for name in splits])}, or as one folder of "
            f"{len(names)} classes. For the splits, name each (`pskd index {first}`); for the "
            "classes, rename that folder."
        )
    return [as_text(name) for name in splits], [as_text(name) for name in others]


def _holds_images(root: Path, name: bytes) -> bool:
    return bool(names_in(root / os.fsdecode(name), "files"))


def _holds_folders_of_images(root: Path, name: bytes) -> bool:
    folder = root / os.fsdecode(name)
    return any(
        images
        for below in names_in(folder, "classes")
        for _, images, _ in walk(os.fsencode(folder), below, ())
    )
