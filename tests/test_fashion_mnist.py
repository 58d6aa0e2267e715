"""Fashion-MNIST: its real files and small ones in its format, fetched, damaged, trained on."""

import gzip
import hashlib
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from pskd.data import fashion_mnist
from pskd.data.arrays import ArrayData
from pskd.store.format import parse_header
from tests.data_files import NOWHERE, flip, read
from tests.launches import result, train
from tests.refusals import refusal

# --- Fashion-MNIST: the real files -----------------------------------------------------------


@pytest.fixture(scope="module")
def debian():
    folder = fashion_mnist.DEBIAN
    if not folder.is_dir():
        pytest.skip(f"no {folder}: install Debian's package dataset-fashion-mnist")
    return folder


@pytest.fixture(scope="module")
def real(debian):
    return read("fashion-mnist", debian)


@pytest.fixture(scope="module")
def decompressed(debian, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decompressed")
    for name in fashion_mnist.CHECKSUMS:
        (folder / name).write_bytes(gzip.decompress((debian / f"{name}.gz").read_bytes()))
    return folder


def test_fashion_mnist_is_what_its_paper_says(real):
    for split, n in ((real.train, 60_000), (real.validation, 10_000)):
        assert split.images_NHWC.shape == (n, 28, 28, 1)
        assert split.images_NHWC.dtype == np.uint8
        assert split.labels_N.dtype == np.int64
        assert np.bincount(split.labels_N).tolist() == [n // 10] * 10
    assert real.class_names == tuple(FashionMNIST.classes)


def test_mean_and_deviation_of_fashion_mnist_are_those_of_its_pixels(real):
    count_V = np.bincount(real.train.images_NHWC.ravel(), minlength=256)
    value_V = np.arange(256) / 255
    mean = np.average(value_V, weights=count_V)
    assert real.mean == (round(mean, 4),)
    assert real.std == (round(np.average((value_V - mean) ** 2, weights=count_V) ** 0.5, 4),)


def test_fashion_mnist_equals_what_torchvision_reads(real, decompressed):
    for prefix, split in (("train", real.train), ("t10k", real.validation)):
        images = read_image_file(str(decompressed / f"{prefix}-images-idx3-ubyte"))
        labels = read_label_file(str(decompressed / f"{prefix}-labels-idx1-ubyte"))
        assert np.array_equal(split.images_NHWC[..., 0], images.numpy())
        assert np.array_equal(split.labels_N, labels.numpy())


@pytest.mark.parametrize("layout", ["no root", "decompressed", "mix", "torchvision's"])
def test_every_layout_of_fashion_mnist_is_the_same_data(
    tmp_path, monkeypatch, debian, decompressed, real, layout
):
    root = decompressed
    if layout == "no root":
        monkeypatch.chdir(tmp_path)  # away from a data/ of the checkout
        root = None
    elif layout == "mix":
        root = tmp_path
        for k, name in enumerate(fashion_mnist.CHECKSUMS):
            file = debian / f"{name}.gz" if k % 2 else decompressed / name
            (root / file.name).symlink_to(file)
    elif layout == "torchvision's":
        root = tmp_path
        (root / "FashionMNIST").mkdir()
        (root / "FashionMNIST" / "raw").symlink_to(decompressed)
    assert read("fashion-mnist", root).fingerprint == real.fingerprint


# --- Fashion-MNIST: small files in its format ------------------------------------------------


def idx(array):
    """The original format, written anew."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return header + array.tobytes()


@pytest.fixture
def small(tmp_path, monkeypatch, website):
    """A folder of four small files, two of them gzipped; all four are on the website as well."""
    rng = np.random.default_rng(5)
    shapes = ((5, 4, 3), (5,), (2, 4, 3), (2,))
    arrays = [rng.integers(0, 10, shape, dtype=np.uint8) for shape in shapes]
    contents = dict(zip(fashion_mnist.CHECKSUMS, map(idx, arrays), strict=True))
    folder, remote = tmp_path / "small", tmp_path / "remote"
    folder.mkdir()
    remote.mkdir()
    for name, content in contents.items():
        packed = gzip.compress(content, mtime=0)
        (remote / f"{name}.gz").write_bytes(packed)
        if name.startswith("train"):
            (folder / f"{name}.gz").write_bytes(packed)
        else:
            (folder / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(fashion_mnist, "CHECKSUMS", sums)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    resources = [(f.name, hashlib.md5(f.read_bytes()).hexdigest()) for f in remote.iterdir()]
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{website}remote/"])
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(folder=folder, arrays=arrays)


def assert_small(catalog, arrays):
    for split, (images, labels) in (
        (catalog.train, arrays[:2]),
        (catalog.validation, arrays[2:]),
    ):
        assert np.array_equal(split.images_NHWC, images[..., None])
        assert split.labels_N.tolist() == labels.tolist()


def test_idx_files_are_parsed(small):
    assert_small(read("fashion-mnist", small.folder), small.arrays)


def test_without_root_the_folder_data_goes_before_debians(small):
    missing = refusal(read, "fashion-mnist")
    assert f"data.name fashion-mnist: no IDX files in data, data/FashionMNIST/raw, {Path.cwd()}/debian" in missing  # fmt: skip  # noqa: E501
    assert "install Debian's dataset-fashion-mnist" in missing
    small.folder.rename("debian")
    assert_small(read("fashion-mnist"), small.arrays)
    Path("data").mkdir()
    Path("data/t10k-labels-idx1-ubyte").touch()
    assert "data lacks train-images-idx3-ubyte" in refusal(read, "fashion-mnist")


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_a_root_without_idx_files_is_refused_whatever_else_is_installed(small, tmp_path, kind):
    small.folder.rename(fashion_mnist.DEBIAN)
    root = tmp_path / "root"
    if kind == "empty":
        root.mkdir()
    elif kind == "a file":
        root.touch()
    text = refusal(read, "fashion-mnist", root)
    assert f"no IDX files in {root}, {root}/FashionMNIST/raw. Set data.root" in text
    assert "--data.download true" in text


def test_a_missing_idx_file_is_named(small):
    (small.folder / "t10k-labels-idx1-ubyte").unlink()
    text = refusal(read, "fashion-mnist", small.folder)
    assert f"{small.folder} lacks t10k-labels-idx1-ubyte. Set data.root" in text


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("t10k-images-idx3-ubyte", flip, "sha256 differs"),
        ("t10k-labels-idx1-ubyte", lambda p: p.write_bytes(p.read_bytes()[:-1]), "sha256 differs"),
        ("t10k-labels-idx1-ubyte", lambda p: p.write_bytes(b""), "sha256 differs"),
        ("train-images-idx3-ubyte.gz", lambda p: flip(p, 0), "cannot be read: Not a gzipped file"),
        ("train-images-idx3-ubyte.gz", lambda p: flip(p, -6), "cannot be read: CRC check failed"),
        ("train-labels-idx1-ubyte.gz", lambda p: p.write_bytes(p.read_bytes()[:-9]), "cannot be"),
        ("train-labels-idx1-ubyte.gz", lambda p: p.write_bytes(b""), "sha256 differs"),
        (
            "train-images-idx3-ubyte.gz",
            # The first byte after the header: a block of the type that does not exist.
            lambda p: p.write_bytes(p.read_bytes()[:10] + b"\xff" + p.read_bytes()[11:]),
            "cannot be read",
        ),
    ],
)
def test_a_damaged_idx_file_is_named(small, name, damage, says):
    damage(small.folder / name)
    text = refusal(read, "fashion-mnist", small.folder)
    assert text.startswith(f"{small.folder / name} ")
    assert says in text
    assert "Set data.root" in text


def test_files_of_mnist_are_not_taken_for_fashion_mnist(small):
    """The same names, shapes and types; only the content tells."""
    name = "train-labels-idx1-ubyte"
    (small.folder / f"{name}.gz").write_bytes(gzip.compress(idx((small.arrays[1] + 1) % 10)))
    text = refusal(read, "fashion-mnist", small.folder)
    assert f"{name}.gz is damaged, or of another data set than Fashion-MNIST" in text


def test_fashion_mnist_is_fetched_once(small, tmp_path, monkeypatch):
    assert_small(read("fashion-mnist", tmp_path / "new", download=True), small.arrays)
    monkeypatch.setattr(FashionMNIST, "mirrors", [NOWHERE])
    assert_small(read("fashion-mnist", tmp_path / "new", download=True), small.arrays)
    assert_small(read("fashion-mnist", tmp_path / "new"), small.arrays)


def test_fashion_mnist_without_network_is_a_refusal(small, tmp_path, monkeypatch):
    monkeypatch.setattr(FashionMNIST, "mirrors", [NOWHERE])
    text = refusal(read, "fashion-mnist", tmp_path / "new", download=True)
    assert f"fashion-mnist could not be fetched to {tmp_path}/new" in text
    assert "refused" in text
    assert "Set data.root" in text


@pytest.mark.parametrize("damage", [Path.unlink, flip])
def test_an_interrupted_download_of_fashion_mnist_is_mended(small, tmp_path, damage):
    root = tmp_path / "new"
    read("fashion-mnist", root, download=True)
    for file in (root / "FashionMNIST" / "raw").glob("t10k-labels*"):
        damage(file)
    assert_small(read("fashion-mnist", root, download=True), small.arrays)


def test_a_failed_mend_of_fashion_mnist_keeps_the_intact_files(small, tmp_path, monkeypatch):
    root = tmp_path / "new"
    read("fashion-mnist", root, download=True)
    raw = root / "FashionMNIST" / "raw"
    for file in raw.glob("t10k-labels*"):
        flip(file)
    monkeypatch.setattr(FashionMNIST, "mirrors", [NOWHERE])
    refusal(read, "fashion-mnist", root, download=True)
    assert len([f for f in raw.iterdir() if not f.name.startswith("t10k-labels")]) == 6


def test_torch_takes_the_arrays_without_a_warning(small):
    catalog = read("fashion-mnist", small.folder)
    torch.set_warn_always(True)  # else once a process
    try:
        with warnings.catch_warnings(action="error"):
            ArrayData(catalog, torch.device("cpu"), seed=0, crop_padding=0, flip=False)
    finally:
        torch.set_warn_always(False)


# --- in a job --------------------------------------------------------------------------------


def test_a_job_trains_and_validates_on_the_subsets(tmp_path, debian):
    run_dir = tmp_path / "run"
    flags = ("--recipe=fashion-mnist-2k-pskd", "--data.limit=64", "--data.held_out=50")
    flags += ("--train.epochs=1", "--schedule.milestones=[]", "--train.batch_size=32")
    job = train(run_dir, *flags, "--train.seed=7", f"--data.root={debian}", processes=None)
    assert job.process.returncode == 0, job.output()
    (segment,) = run_dir.glob("store/*/*.psk")
    header = parse_header(segment.read_bytes())
    same = read("fashion-mnist", debian, limit=64, held_out=50, pad_to=32)
    assert (header.n, header.identity) == (64, same.fingerprint)
    assert result(run_dir)["last"]["top1_error"] % 2 == 0  # percent of 50 samples
