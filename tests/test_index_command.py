"""`pskd index`, and the script that unpacks ImageNet and calls it."""

import io
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

from pskd.cli import main
from pskd.data.index import (
    NAME,
    load_or_build,
    open_index,
)
from pskd.data.index_check import check_same_classes
from tests.indices import image, rewritten_later
from tests.launches import ROOT

pytestmark = pytest.mark.usefixtures("cache")


def test_the_command_reports_what_it_found(folder, capsys):
    image(folder / "class001/large.png", (640, 480))
    for name in ("a.avif", "b.AVIF", "notes.txt", "README", ".hidden.avif", "x.psk"):
        (folder / "class000" / name).touch()
    (folder / "LICENSE").touch()
    assert main(["index", str(folder)]) == 0
    out, err = capsys.readouterr()
    index = open_index(folder / NAME, folder)
    pixels = int((index.widths_N.astype(int) * index.heights_N).sum())
    assert out.splitlines() == [
        f"{folder}: 13 images of 3 classes",
        f"  size         {index.bytes_N.sum() / 1e6:.1f} MB, {pixels / 1e6:.1f} megapixels",
        "  largest      640x480, class001/large.png",
        f"  fingerprint  {index.fingerprint}",
        f"  index        {folder}/{NAME}",
        "  no images    by their names, not read: .avif 2, .psk 1, .txt 1, no extension 2",
    ]
    assert err == ""
    (folder / "class001/bad.jpg").touch()
    assert main(["index", str(folder)]) == 1
    assert "class001/bad.jpg: empty" in capsys.readouterr().err
    assert main(["index", str(folder), "--drop-bad", "--workers", "1"]) == 0
    assert capsys.readouterr().out.endswith("  left out     1\n  class001/bad.jpg: empty\n")


def test_the_command_verifies_against_the_index_there_is(folder, capsys):
    assert main(["index", str(folder), "--verify"]) == 0
    assert "verified     every file decodes" in capsys.readouterr().out
    path = folder / "class002/image00001.JPEG"
    rewritten_later(path, path.read_bytes()[:-50])
    assert main(["index", str(folder), "--verify"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: 1 of 12 files are not as {folder}/{NAME} says, or do not decode:" in err
    assert "class002/image00001.JPEG: " in err
    assert f"`pskd index {folder} --drop-bad --verify`" in err
    assert main(["index", str(folder), "--verify", "--drop-bad"]) == 0
    assert "11 images of 3 classes" in capsys.readouterr().out
    assert main(["index", str(folder), "--verify"]) == 0


def test_the_command_indexes_train_and_val(flat, capsys):
    for name in ("n04", "n03", "n02", "n01"):
        image(flat / "set/train" / name / "x.JPEG")
    (flat / "val").rename(flat / "set/val")
    (flat / "set/.hidden").mkdir()
    assert main(["index", str(flat / "set")]) == 1
    out, err = capsys.readouterr()
    assert f"{flat}/set/train: 4 images of 4 classes" in out
    assert f"{flat}/set/val has no class folders" in err
    truth = ["--ground-truth", str(flat / "truth.txt"), "--classes", str(flat / "meta.mat")]
    assert main(["index", str(flat / "set"), *truth]) == 0
    assert f"{flat}/set/val: 6 images of 4 classes" in capsys.readouterr().out
    assert main(["index", str(flat / "set"), "--verify"]) == 0
    image(flat / "set/train/n05/x.JPEG")
    assert main(["index", str(flat / "set"), *truth]) == 1
    assert f"only in {flat}/set/train: n05." in capsys.readouterr().err
    for option in ("--list", "--index-path"):
        assert main(["index", str(flat / "set"), option, "x"]) == 1
        assert f"{option} is for one folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "read", "left_out"),
    [
        # A third folder beside the splits, with labels or without.
        (["train/a/1", "train/b/1", "val/a/1", "val/b/1", "test/1"], "train val", "test"),
        (["train/a/1", "train/b/1", "val/a/1", "val/b/1", "more/a/1"], "train val", "more"),
        (["train/a/1", "train/b/1"], "train", ""),
        (["train/a/1", "train/b/1", "test/1"], "train", "test"),
        (["val/a/1", "val/b/1", "test/x/1"], "val", "test"),
        # Classes of such names.
        (["train/1", "plane/1"], "", ""),
        (["train/1", "val/1", "plane/1"], "", ""),
        (["test/a/1", "plane/1"], "", ""),
    ],
)
def test_the_command_finds_the_splits_in_a_folder(tmp_path, capsys, caplog, files, read, left_out):
    root = tmp_path / "set"
    for file in files:
        image(root / f"{file}.png")
    assert main(["index", str(root)]) == 0
    out, _ = capsys.readouterr()
    reported = [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert reported == ([f"{root}/{name}" for name in read.split()] or [str(root)])
    said = f"{root}: only {' and '.join(read.split())} are read; left out: {left_out}"
    assert [m for m in caplog.messages if "only" in m] == ([said] if left_out else [])


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (["train/steam/1", "train/diesel/1", "plane/1"], "as plane hold images as well"),
        (["train/steam/1", "train/2", "plane/1"], "images lie beside the folders in train"),
    ],
)
def test_a_folder_that_can_be_read_in_two_ways_is_refused(tmp_path, capsys, files, why):
    for file in files:
        image(tmp_path / "set" / f"{file}.png")
    assert main(["index", str(tmp_path / "set")]) == 1
    err = capsys.readouterr().err
    assert why in err
    assert "as the splits train, or as one folder of 2 classes" in err
    assert f"`pskd index {tmp_path}/set/train`" in err
    assert not list(tmp_path.rglob(NAME))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--list=a", "--ground-truth=b"], "--list and --ground-truth exclude each other"),
        (["--ground-truth=b"], "--ground-truth needs --classes"),
        (["--classes=b"], "--classes goes with --ground-truth or --list"),
        (["--workers=0"], "--workers is 0"),
        (["--list=/none"], "/none cannot be read"),
    ],
)
def test_wrong_options_are_refused(folder, capsys, options, says):
    assert main(["index", str(folder), *options]) == 1
    assert says in capsys.readouterr().err
    assert not (folder / NAME).exists()


def test_the_command_says_why_it_builds_before_it_verifies(folder):
    command = [sys.executable, "-m", "pskd.cli", "index", folder, "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == f"looking at the images of {folder}: it has no index yet\n"
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""


def test_indexing_imports_no_torch(folder):
    program = (
        "import sys; from pskd.cli import main; main(['index', sys.argv[1]]); "
        "sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, folder], check=True, capture_output=True)


# --- scripts/imagenet_from_tars.sh -----------------------------------------------------------


def pack(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture
def tars(flat):
    """The three files of ImageNet, small; in val the images are stored in another order."""
    folder = flat / "tars"
    folder.mkdir()
    picture = image(flat / "picture.png").read_bytes()
    classes = {
        f"{name}.tar": pack(flat / "class.tar", {f"{name}_{k}.JPEG": picture for k in range(2)})
        for name in ("n02", "n01", "n04", "n03")
    }
    pack(folder / "ILSVRC2012_img_train.tar", classes)
    names = sorted((p.name for p in (flat / "val").iterdir()), reverse=True)
    pack(folder / "ILSVRC2012_img_val.tar", dict.fromkeys(names, picture))
    data = "ILSVRC2012_devkit_t12/data"
    devkit = {
        "ILSVRC2012_devkit_t12/readme.txt": b"read me",
        f"{data}/meta.mat": (flat / "meta.mat").read_bytes(),
        f"{data}/ILSVRC2012_validation_ground_truth.txt": (flat / "truth.txt").read_bytes(),
    }
    pack(folder / "ILSVRC2012_devkit_t12.tar.gz", devkit, "w:gz")
    return folder


def unpack(tars, out):
    return subprocess.run(
        [ROOT / "scripts/imagenet_from_tars.sh", tars, out],
        env={**os.environ, "PSKD": f"{sys.executable} -m pskd.cli"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imagenet_is_unpacked_and_indexed(tars, tmp_path):
    out = tmp_path / "a b" / "imagenet"
    done = unpack(tars, out)
    assert done.returncode == 0, done.stderr
    train, validation = load_or_build(out / "train"), load_or_build(out / "val")
    assert len(train) == 8
    assert train.labels_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert validation.labels_N.tolist() == [0, 2, 3, 1, 0, 2]
    check_same_classes(train, validation)
    assert sorted(p.name for p in out.iterdir()) == [".devkit", "train", "val"]
    assert sorted(p.name for p in (out / "train").iterdir()) == [NAME, "n01", "n02", "n03", "n04"]


def test_unpacking_goes_on_where_it_was_stopped(tars, tmp_path):
    out = tmp_path / "out"
    assert unpack(tars, out).returncode == 0
    inode = (out / "train/n02/n02_0.JPEG").stat().st_ino
    shutil.rmtree(out / "train/n04")
    (out / "train/.making").mkdir()
    (out / "train/.making/n04_0.JPEG").write_bytes(b"half")
    (out / "val").rename(out / ".val")
    (out / ".val/ILSVRC2012_val_00000001.JPEG").unlink()
    done = unpack(tars, out)
    assert done.returncode == 0, done.stderr
    assert len(load_or_build(out / "train")) == 8
    assert len(load_or_build(out / "val")) == 6
    assert (out / "train/n02/n02_0.JPEG").stat().st_ino == inode


def cut(path, part):
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: (t / "ILSVRC2012_img_val.tar").unlink(), "ILSVRC2012_img_val.tar is missing"),
        (lambda t: cut(t / "ILSVRC2012_img_train.tar", 0.4), "ILSVRC2012_img_train.tar cannot be"),
        (lambda t: cut(t / "ILSVRC2012_img_val.tar", 0.452), "ILSVRC2012_img_val.tar cannot be"),
        (lambda t: pack(t / "ILSVRC2012_img_val.tar", {"x": b""}), "img_val.tar has 1 images, but"),
        (lambda t: cut(t / "ILSVRC2012_devkit_t12.tar.gz", 0.4), "t12.tar.gz is not the devkit"),
        (
            lambda t: pack(t / "ILSVRC2012_img_train.tar", {"n01.tar": b"garbage" * 999}),
            "n01.tar in",
        ),
    ],
)
def test_damaged_tars_are_named(tars, tmp_path, damage, says):
    damage(tars)
    done = unpack(tars, tmp_path / "out")
    assert done.returncode == 1
    assert says in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out/val").exists()


def test_too_little_space_is_said_before_unpacking(tars, read_only_directory):
    subprocess.run(["mount", "-o", "remount,rw,size=100k", read_only_directory], check=True)
    pack(tars / "ILSVRC2012_img_val.tar", {"x.JPEG": bytes(2_000_000)})
    done = unpack(tars, read_only_directory)
    assert done.returncode == 1
    assert "MB are needed" in done.stderr
    assert not (read_only_directory / "train/n01").exists()
