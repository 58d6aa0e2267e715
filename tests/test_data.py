"""pskd.data: original files read right, all other files refused by name, subsets as asked for."""

import gzip
import hashlib
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100

from pskd import command_line
from pskd.data.catalog import Catalog, Split
from pskd.store import open_generation
from tests.data_files import NOWHERE, flip, read
from tests.launches import train
from tests.refusals import assert_refused, refusal
from tests.test_order import scalar_hash64

# --- digits: the file that scikit-learn ships ------------------------------------------------


def test_digits_are_what_scikit_learn_reads():
    catalog, expected = read("digits"), load_digits()
    images_NHWC, labels_N = (
        np.concatenate([getattr(split, name) for split in (catalog.train, catalog.validation)])
        for name in ("images_NHWC", "labels_N")
    )
    assert (images_NHWC[..., 0] == np.rint(expected.images * (255 / 16))).all()
    assert (images_NHWC.dtype, images_NHWC.shape) == (np.uint8, (1797, 8, 8, 1))
    assert (labels_N == expected.target).all()
    assert labels_N.dtype == np.int64
    assert catalog.class_names == tuple(str(name) for name in expected.target_names)
    assert len(catalog.validation.labels_N) == 360


def test_a_start_on_digits_imports_neither_scikit_learn_nor_scipy():
    code = (
        "import sys; from pskd import assembly; from pskd.data.catalog import load; "
        "load('digits', root=None, download=False, held_out=0, limit=0, pad_to=0); "
        "print({'sklearn', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"  # DeepSpeed may say which accelerator it found


@pytest.mark.parametrize(
    "content",
    [None, b"no gzip", gzip.compress(b"0,1,2\n" * 99)[:-4]],
    ids=["no", "other", "cut off"],
)
def test_a_file_of_digits_that_is_missing_or_damaged_is_named(tmp_path, monkeypatch, content):
    file = tmp_path / "digits.csv.gz"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr("pskd.data.digits._FILE", str(file))
    message = refusal(read, "digits")
    assert message.startswith(f"data.name digits: cannot read {file}: ")
    assert "install it again" in message


# --- CIFAR: small files in its format --------------------------------------------------------


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch, website):
    """A few samples in the original layout; `reader` is torchvision's class, its checksums ours."""
    classes = int(request.param.removeprefix("cifar"))
    reader = CIFAR10 if classes == 10 else CIFAR100
    rng = np.random.default_rng(classes)
    folder = tmp_path / "copy" / reader.base_folder
    folder.mkdir(parents=True)

    def write(name, entry):
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def split(files):
        data, labels, listed = [], [], []
        for name, _ in files:
            data.append(rng.integers(0, 256, (4, 3072), dtype=np.uint8))
            new = rng.integers(0, classes, 4).tolist()
            labels += new
            kind = "labels" if classes == 10 else "fine_labels"
            entry = {"data": data[-1], kind: new, "coarse_labels": [0] * 4}
            listed.append([name, write(name, entry)])
        return np.vstack(data), labels, listed

    names = [f"class {c}" for c in range(classes)]
    entry = {reader.meta["key"]: names, "coarse_label_names": ["all"]}
    meta = reader.meta | {"md5": write(reader.meta["filename"], entry)}
    *expected_train, train_list = split(reader.train_list)
    *expected_test, test_list = split(reader.test_list)
    archive = tmp_path / reader.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, reader.base_folder)
    monkeypatch.setattr(reader, "train_list", train_list)
    monkeypatch.setattr(reader, "test_list", test_list)
    monkeypatch.setattr(reader, "meta", meta)
    monkeypatch.setattr(reader, "url", website + reader.filename)
    monkeypatch.setattr(reader, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return SimpleNamespace(
        name=request.param,
        reader=reader,
        root=folder.parent,
        folder=folder,
        class_names=tuple(names),
        expected=(expected_train, expected_test),
        remedy=f"Set data.root to the folder that holds {reader.base_folder}/, "
        "or fetch it with --data.download true.",
    )


def assert_cifar(catalog, cifar):
    assert catalog.class_names == cifar.class_names
    for split, (data_NP, labels) in zip(
        (catalog.train, catalog.validation), cifar.expected, strict=True
    ):
        # A row of the file: 1024 red pixels, line by line, then the green, then the blue ones.
        assert split.images_NHWC.shape == (len(labels), 32, 32, 3)
        for y, x, c in ((0, 0, 0), (0, 31, 1), (30, 2, 2)):
            assert np.array_equal(split.images_NHWC[:, y, x, c], data_NP[:, 1024 * c + 32 * y + x])
        assert split.labels_N.tolist() == labels
        assert split.labels_N.dtype == np.int64


FILES = {
    "train": lambda reader: reader.train_list[-1][0],
    "test": lambda reader: reader.test_list[0][0],
}
META = pytest.param(
    lambda reader: reader.meta["filename"],
    id="meta",
)
each_file = pytest.mark.parametrize(
    "file", [*(pytest.param(f, id=k) for k, f in FILES.items()), META]
)


def test_cifar_files_are_parsed(cifar):
    assert_cifar(read(cifar.name, cifar.root), cifar)


def test_a_missing_cifar_folder_is_named(cifar, tmp_path):
    first = tmp_path / "other" / cifar.reader.base_folder / cifar.reader.train_list[0][0]
    text = refusal(read, cifar.name, tmp_path / "other")
    assert text == f"data.name {cifar.name}: no file {first}. {cifar.remedy}"


@each_file
def test_a_missing_cifar_file_is_named(cifar, file):
    path = cifar.folder / file(cifar.reader)
    path.unlink()
    text = refusal(read, cifar.name, cifar.root)
    assert text == f"data.name {cifar.name}: no file {path}. {cifar.remedy}"


@each_file
def test_a_damaged_cifar_file_is_named(cifar, file):
    path = cifar.folder / file(cifar.reader)
    flip(path)
    text = refusal(read, cifar.name, cifar.root)
    assert text.startswith(f"{path} is damaged, or of another data set than {cifar.name}")
    assert cifar.remedy in text


def test_cifar_is_fetched_once_and_a_damaged_copy_again(cifar, tmp_path, monkeypatch):
    root = tmp_path / "new"
    assert_cifar(read(cifar.name, root, download=True), cifar)
    assert_cifar(read(cifar.name, root), cifar)
    flip(root / cifar.reader.base_folder / cifar.reader.test_list[0][0])
    assert_cifar(read(cifar.name, root, download=True), cifar)
    monkeypatch.setattr(cifar.reader, "url", NOWHERE)
    assert_cifar(read(cifar.name, root, download=True), cifar)


def test_cifar_without_network_is_a_refusal(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar.reader, "url", NOWHERE)
    text = refusal(read, cifar.name, tmp_path / "new", download=True)
    assert f"data.name {cifar.name} could not be fetched to {tmp_path}/new" in text
    assert "refused" in text


# --- catalog ---------------------------------------------------------------------------------


def toy(n=300, m=7, classes=3):
    """Samples whose pixels spell their row; those of the validation split go on counting."""
    rows_N = np.arange(n + m)
    images_NHWC = np.zeros((n + m, 2, 3, 1), np.uint8)
    images_NHWC[:, 0, 0, 0], images_NHWC[:, 1, 2, 0] = rows_N // 256, rows_N % 256
    return Catalog(
        name="toy",
        class_names=tuple("abcdefgh"[:classes]),
        mean=(0.5,),
        std=(0.5,),
        train=Split(images_NHWC[:n], rows_N[:n] % classes),
        validation=Split(images_NHWC[n:], rows_N[n:] % classes),
    )


def rows(split):
    """Which rows of `toy` these are; checks that each brought its label along."""
    found_N = split.images_NHWC[:, 0, 0, 0].astype(int) * 256 + split.images_NHWC[:, 1, 2, 0]
    assert np.array_equal(split.labels_N, found_N % 3)
    return found_N.tolist()


@pytest.fixture
def read_toy(monkeypatch):
    monkeypatch.setattr("pskd.data.digits.load", lambda root, download: toy())
    return lambda **options: read("digits", **options)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_named(split, label):
    labels_N = getattr(toy(), split).labels_N.copy()
    labels_N[4] = label
    bad = replace(getattr(toy(), split), labels_N=labels_N)
    title = "training" if split == "train" else split
    assert refusal(replace, toy(), **{split: bad}) == (
        f"data.name toy: label {label} of {title} sample 4 is outside 0..2. Fetch the data again."
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_more_images_than_labels_are_refused(split):
    whole = getattr(toy(), split)
    title = "training" if split == "train" else split
    text = refusal(replace, toy(), **{split: replace(whole, labels_N=whole.labels_N[:-1])})
    assert f"{title} split has {len(whole)} images but {len(whole) - 1} labels" in text


def test_limit_keeps_the_first_samples_and_the_validation_split(read_toy):
    catalog = read_toy(limit=5)
    assert rows(catalog.train) == [0, 1, 2, 3, 4]
    assert rows(catalog.validation) == list(range(300, 307))
    assert len(read_toy(limit=300).train) == 300
    assert refusal(read_toy, limit=301) == "data.limit 301 exceeds the 300 samples."


def test_held_out_samples_are_those_of_smallest_hash(read_toy):
    """No seed takes part: runs with other seeds are validated on the same samples."""
    by_hash = sorted(range(300), key=lambda row: scalar_hash64(0, "held-out", 0, row, 1))
    assert sorted(by_hash[:6]) == [10, 46, 122, 226, 233, 241]  # frozen: results are compared by it
    for count in (6, 40):
        catalog = read_toy(held_out=count)
        assert rows(catalog.validation) == sorted(by_hash[:count])
        assert rows(catalog.train) == sorted(by_hash[count:])


def test_limit_counts_what_is_left_after_holding_out(read_toy):
    left = rows(read_toy(held_out=40).train)
    both = read_toy(held_out=40, limit=100)
    assert rows(both.train) == left[:100]
    assert rows(both.validation) == rows(read_toy(held_out=40).validation)
    assert len(read_toy(held_out=40, limit=260).train) == 260
    assert "data.limit 261 exceeds the 260 samples" in refusal(read_toy, held_out=40, limit=261)


def test_holding_out_leaves_two_samples_at_least(read_toy):
    assert len(read_toy(held_out=298).train) == 2
    for count in (299, 300, 1000):
        text = refusal(read_toy, held_out=count)
        assert f"data.held_out {count} leaves fewer than 2 of 300 samples" in text


def test_padding_is_black_and_centred(read_toy):
    plain, padded = read_toy(), read_toy(pad_to=5)
    for name in ("train", "validation"):
        before, after = getattr(plain, name), getattr(padded, name)
        assert after.images_NHWC.shape == (len(before), 5, 5, 1)
        # 2x3 in 5x5: three more lines and two more columns; the odd line goes below.
        assert np.array_equal(after.images_NHWC[:, 1:3, 1:4], before.images_NHWC)
        assert after.images_NHWC.sum() == before.images_NHWC.sum()
        assert np.array_equal(after.labels_N, before.labels_N)
    assert "data.pad_to 2 is smaller than the images (2x3)" in refusal(read_toy, pad_to=2)


def test_the_fingerprint_tells_all_samples_apart(read_toy):
    assert read_toy().fingerprint == toy().fingerprint
    subsets = [
        read_toy(**options)
        for options in ({}, {"limit": 9}, {"held_out": 9}, {"held_out": 9, "limit": 9})
    ]
    subsets += [read_toy(pad_to=3), read_toy(pad_to=4), toy(classes=4)]
    for split in ("train", "validation"):
        for field in ("images_NHWC", "labels_N"):
            changed = getattr(getattr(toy(), split), field).copy()
            changed[0] = changed[0] ^ 1
            subsets.append(
                replace(toy(), **{split: replace(getattr(toy(), split), **{field: changed})})
            )
    subsets.append(replace(toy(), class_names=("a", "b", "d")))
    turned = replace(toy().train, images_NHWC=toy().train.images_NHWC.reshape(-1, 3, 2, 1))
    subsets.append(replace(toy(), train=turned))
    subsets.append(toy(n=299, m=8))
    assert len({catalog.fingerprint for catalog in subsets}) == len(subsets)


# --- in a job --------------------------------------------------------------------------------


TRAIN_ON_SMALL_FILES = """
import sys
from torchvision.datasets import CIFAR10, CIFAR100
from pskd.entry import main
for reader in (CIFAR10, CIFAR100):
    if reader.base_folder == {folder!r}:
        reader.train_list, reader.test_list, reader.meta = {lists!r}
sys.exit(main(sys.argv[1:]))
"""


def test_a_job_trains_on_cifar(cifar, tmp_path):
    """By the recipe of the README, with the small files' checksums and a small network."""
    reader = cifar.reader
    lists = (reader.train_list, reader.test_list, reader.meta)
    script = TRAIN_ON_SMALL_FILES.format(folder=reader.base_folder, lists=lists)
    flags = ["--recipe=cifar100-preact_resnet18-pskd", f"--data.name={cifar.name}"]
    flags += [f"--data.root={cifar.root}", "--model.name=preact_resnet8_w16"]
    flags += ["--train.epochs=2", "--schedule.milestones=[1]", "--train.batch_size=4"]
    done = subprocess.run(
        [sys.executable, "-c", script, *flags, f"--run.dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    samples = len(cifar.expected[0][1])
    rows = open_generation(tmp_path / "run" / "store" / "gen-000001")[np.arange(samples)]
    assert rows.shape == (samples, len(cifar.class_names))


def test_a_missing_data_folder_stops_a_job_before_it_has_a_directory(tmp_path):
    job = train(
        tmp_path / "run",
        "--recipe=cifar100-preact_resnet18-pskd",
        *("--data.root", "/nonexistent"),
        processes=None,
    )
    assert_refused(job, "no file /nonexistent/cifar-100-python/train", "Set data.root")
    assert not (tmp_path / "run").exists()


def test_ranks_take_turns_to_fetch(cifar, tmp_path, monkeypatch):
    """torchvision would truncate the archive that another rank unpacks. Ranks are threads here."""
    from pskd import loading
    from pskd.world import World

    barrier, box, spans = threading.Barrier(2, timeout=20), [None, None], []
    original = cifar.reader.download

    def download(reader):
        start = time.monotonic()
        original(reader)
        time.sleep(0.2)
        spans.append((start, time.monotonic()))

    class Rank(World):
        def gather(self, value):
            box[self.rank] = value
            barrier.wait()
            values = list(box)
            barrier.wait()
            return values

    def fingerprint(rank):
        place = {"rank": rank, "size": 2, "local_rank": rank, "local_size": 2}
        here = Rank(**place, device=torch.device("cpu"), control=None, timeout=None)
        return loading.catalog_and_plan(config, here)[0].fingerprint

    monkeypatch.setattr(cifar.reader, "download", download)
    flags = (f"--data.root={tmp_path}/new", "--data.download=true", "--train.batch_size=4")
    config = command_line.load([f"--data.name={cifar.name}", *flags])
    with ThreadPoolExecutor(2) as ranks:
        assert set(ranks.map(fingerprint, range(2))) == {read(cifar.name, cifar.root).fingerprint}
    assert all(a[1] <= b[0] for a, b in pairwise(sorted(spans)))
