"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) through torchvision's readers: 32x32, colour."""

from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from pskd.data.catalog import DEFAULT_ROOT, Catalog, Split
from pskd.errors import PskdError


def load_cifar(
    name: str,
    reader: type[CIFAR10],
    root: Path | None,
    download: bool,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Catalog:
    """An existing copy below `root` is used; `download` fetches one.

    Raises:
        PskdError: no copy, or a damaged one; names the file.
    """
    base = root or DEFAULT_ROOT
    if not download:
        _check_files(name, reader, base)
    try:
        train = reader(str(base), train=True, download=download)
        test = reader(str(base), train=False)
    except (OSError, RuntimeError) as error:
        raise PskdError(
            f"data.name {name} could not be fetched to {base}: {' '.join(str(error).split())}. "
            f"Set data.root to a folder that holds {reader.base_folder}/."
        ) from error
    return Catalog(
        name=name,
        class_names=tuple(train.classes),
        mean=mean,
        std=std,
        train=_split(train),
        validation=_split(test),
    )


def _check_files(name: str, reader: Any, root: Path) -> None:
    """Which file is missing or differs: torchvision only says that something does."""
    folder = root / reader.base_folder
    remedy = (
        f"Set data.root to the folder that holds {reader.base_folder}/, "
        "or fetch it with --data.download true."
    )
    names = (reader.meta["filename"], reader.meta["md5"])
    for file, md5 in (*reader.train_list, *reader.test_list, names):
        path = folder / file
        if not path.is_file():
            raise PskdError(f"data.name {name}: no file {path}. {remedy}")
        if not check_integrity(str(path), md5):
            raise PskdError(
                f"{path} is damaged, or of another data set than {name} (md5 differs). {remedy}"
            )


def _split(reader: CIFAR10) -> Split:
    return Split(np.ascontiguousarray(reader.data), np.array(reader.targets, np.int64))
