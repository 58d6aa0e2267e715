"""Fixtures that several files share."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.photos import make_folder, make_nasty
from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(W)`: W processes joined over gloo, started once and used by many tests."""
    pools: dict[int, Pool] = {}

    def of(size: int) -> Pool:
        if size not in pools:
            pools[size] = Pool(size)
        return pools[size]

    yield of
    for each in pools.values():
        each.close()


@pytest.fixture
def read_only_directory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system mounted read-only."""
    path = tmp_path / "read-only"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=1M", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """105 images of 7 classes to train, 203 others to validate; of about 64 pixels."""
    from tests.decoding import load

    root = tmp_path_factory.mktemp("photos")
    make_folder(root / "train", classes=7, per_class=15, median_side=64)
    make_folder(root / "val", classes=7, per_class=29, median_side=64, seed=1)
    return load(root)


@pytest.fixture
def small(tmp_path):
    """24 images of 3 classes, for damage. One folder is both splits."""
    from tests.decoding import load

    files = make_folder(tmp_path / "train", classes=3, per_class=8, median_side=80)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    return load(tmp_path), files


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 photos of about 350 pixels, both splits."""
    from tests.decoding import load

    root = tmp_path_factory.mktemp("larger")
    make_folder(root / "train", classes=4, per_class=10, median_side=350)
    (root / "val").symlink_to(root / "train")
    return load(root)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache directory, for this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pskd"


@pytest.fixture
def folder(tmp_path):
    """Three classes of four small images."""
    make_folder(tmp_path / "folder", classes=3, per_class=4, median_side=24)
    return tmp_path / "folder"


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A folder of one class of files that need care, and what they are."""
    root = tmp_path_factory.mktemp("nasty")
    return root, make_nasty(root / "class")


@pytest.fixture
def flat(tmp_path):
    """Six validation images, their ground truth, and both files of classes."""
    from tests.indices import image, write_meta

    numbers = [3, 1, 4, 2, 3, 1]
    for k in range(6):
        image(tmp_path / "val" / f"ILSVRC2012_val_{k + 1:08}.JPEG")
    (tmp_path / "truth.txt").write_text("".join(f"{k}\n" for k in numbers))
    write_meta(tmp_path / "meta.mat")
    (tmp_path / "synsets.txt").write_text("n03 kit fox\nn02 red fox\nn01\nn04 wolf, or so\n\n")
    return tmp_path


@pytest.fixture
def make(tmp_path):
    """Makes worlds on one directory, and ends them."""
    from tests.store_worlds import World

    made = []

    def make(size=1, start=0, state=None, **options):
        made.append(World(tmp_path / "store", size, start, state, **options))
        return made[-1]

    yield make
    for world in made:
        world.end()


@pytest.fixture
def store_dir(tmp_path):
    return tmp_path / "store"


@pytest.fixture(scope="module")
def forks():
    from tests.digits_runs import Forks

    return Forks()


@pytest.fixture
def website(tmp_path, monkeypatch):
    """The URL of a web server for what a test puts into tmp_path."""

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def on_meta(monkeypatch):
    """Networks without values, which cost no time. One whose control flow reads a value raises."""
    import torch
    from torchvision.models.regnet import BlockParams

    widths = BlockParams.from_init_params.__func__  # regnet computes its widths with tensors

    def from_init_params(cls, **arguments):
        with torch.device("cpu"):
            return widths(cls, **arguments)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(from_init_params))
    with torch.device("meta"):
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two complete runs on the digits: PS-KD and the baseline."""
    from tests.forked import train

    directory = tmp_path_factory.mktemp("report")
    brief = ("--train.epochs=2", "--schedule.milestones=[1]", "--run.threads=1")
    for name in ("pskd", "baseline"):
        job = train(directory / name, f"--recipe=digits-{name}", *brief, processes=None)
        assert job.process.returncode == 0, job.output()
    return directory
