"""Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 images of clothing, 28x28, grey.

Read from a folder of its four IDX files, gzipped or not: as torchvision fetches them, or as
Debian's package `dataset-fashion-mnist` installs them.
"""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pskd.data.catalog import DEFAULT_ROOT, Catalog, Split
from pskd.errors import PskdError

# sha256 of the decompressed originals: MNIST has files of the same names, shapes and types.
CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_REMEDY = (
    "Set data.root to a folder with the four IDX files (gzipped or not), install Debian's "
    "dataset-fashion-mnist, or fetch them with --data.download true."
)


def load(root: Path | None, download: bool) -> Catalog:
    """An existing copy is used; `download` fetches one into `root`.

    Raises:
        PskdError: no copy, an incomplete one, or files that are not Fashion-MNIST.
    """
    base = root or DEFAULT_ROOT
    folders = [base, _fetched(base), *([DEBIAN] if root is None else [])]
    folder = next((f for f in folders if any(_find(f, name) for name in CHECKSUMS)), None)
    if folder is None and download:
        folder = _download(base)
    if folder is None:
        looked = ", ".join(str(f) for f in folders)
        raise PskdError(f"data.name fashion-mnist: no IDX files in {looked}. {_REMEDY}")
    if download and folder == _fetched(base):
        _mend(base)
    images_NHW, labels_N, test_images_NHW, test_labels_N = (_read(folder, n) for n in CHECKSUMS)
    return Catalog(
        name="fashion-mnist",
        class_names=_CLASSES,
        mean=(0.2860,),
        std=(0.3530,),
        train=Split(images_NHW[..., None], labels_N.astype(np.int64)),
        validation=Split(test_images_NHW[..., None], test_labels_N.astype(np.int64)),
    )


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _download(root: Path) -> Path:
    from torchvision.datasets import FashionMNIST  # noqa: PLC0415  (a second, and rarely needed)

    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise PskdError(
            f"data.name fashion-mnist could not be fetched to {root}: "
            f"{' '.join(str(error).split())}. {_REMEDY}"
        ) from error
    return _fetched(root)


def _fetched(root: Path) -> Path:
    """Where torchvision puts the files."""
    return root / "FashionMNIST" / "raw"


def _mend(root: Path) -> None:
    """Fetch again what an interrupted download left: torchvision takes any file for a whole one."""
    folder = _fetched(root)
    damaged = []
    for name in CHECKSUMS:
        try:
            _read(folder, name)
        except PskdError:
            damaged.append(name)
    for name in damaged:
        (folder / name).unlink(missing_ok=True)
        (folder / f"{name}.gz").unlink(missing_ok=True)
    if damaged:
        _download(root)


def _read(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """An IDX file: 0, 0, 8 (unsigned bytes), number of dimensions, each big-endian, the bytes."""
    path = _find(folder, name)
    if path is None:
        raise PskdError(f"data.name fashion-mnist: {folder} lacks {name}. {_REMEDY}")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise PskdError(f"{path} cannot be read: {error}. {_REMEDY}") from error
    if hashlib.sha256(content).hexdigest() != CHECKSUMS[name]:
        raise PskdError(
            f"{path} is damaged, or of another data set than Fashion-MNIST (sha256 differs). "
            f"{_REMEDY}"
        )
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    start = 4 + 4 * dimensions
    return np.frombuffer(content, np.uint8, math.prod(shape), start).reshape(shape).copy()
