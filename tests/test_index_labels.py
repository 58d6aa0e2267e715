"""pskd.data.labels: labels of an index that stand in files, and not in the names of folders."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from pskd.data.index import (
    build,
    load_or_build,
    out_of_date,
)
from pskd.data.index_check import check_same_classes
from pskd.data.labels import GroundTruth, PathList
from tests.indices import SYNSETS, image, relatives, same, saved, synthetic, write_meta
from tests.refusals import refusal

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("classes", ["meta.mat", "synsets.txt"])
def test_labels_of_the_ground_truth_are_those_of_the_train_folder(flat, classes):
    labels = GroundTruth(flat / "truth.txt", flat / classes)
    index = load_or_build(flat / "val", labels=labels)
    assert index.class_names == ("n01", "n02", "n03", "n04")
    assert index.labels_N.tolist() == [0, 2, 3, 1, 0, 2]
    assert relatives(index) == [b"ILSVRC2012_val_%08d.JPEG" % k for k in range(1, 7)]
    assert out_of_date(index) is None
    for name in ("n04", "n03", "n02", "n01"):
        image(flat / "train" / name / "x.JPEG")
    check_same_classes(build(flat / "train"), index)


def test_a_labelled_index_is_found_without_its_files_but_not_renewed(flat):
    labels = GroundTruth(flat / "truth.txt", flat / "synsets.txt")
    index = load_or_build(flat / "val", labels=labels)
    assert same(load_or_build(flat / "val"), index)
    image(flat / "val/extra.jpg")
    text = refusal(load_or_build, flat / "val")
    assert "out of date: other images lie in" in text
    command = f"pskd index {flat}/val --ground-truth {flat}/truth.txt --classes {flat}/synsets.txt"
    assert f"Run `{command}`." in text
    assert "has 6 lines, but" in refusal(load_or_build, flat / "val", labels=labels)
    (flat / "val/extra.jpg").unlink()
    other = GroundTruth(flat / "truth.txt", flat / "meta.mat")
    assert load_or_build(flat / "val", labels=other).labels_from == other.options


def test_bad_files_keep_the_labels_of_the_others(flat):
    (flat / "val/ILSVRC2012_val_00000002.JPEG").write_bytes(b"")
    labels = GroundTruth(flat / "truth.txt", flat / "meta.mat")
    text = refusal(build, flat / "val", labels=labels)
    assert f"--classes {flat}/meta.mat --drop-bad`" in text
    index = build(flat / "val", labels=labels, drop_bad=True)
    assert index.labels_N.tolist() == [0, 3, 1, 0, 2]
    assert index.class_names == ("n01", "n02", "n03", "n04")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("truth.txt", b"3\n1\n4\n2\n3\n", "has 5 lines, but"),
        ("truth.txt", b"3\n1\n4\n2\n3\n5\n", "truth.txt:6: 5 is outside 1..4."),
        ("truth.txt", b"3\n0\n4\n2\n3\n1\n", "truth.txt:2: 0 is outside 1..4."),
        ("truth.txt", b"3\n1\nfox\n2\n3\n1\n", "truth.txt:3: fox is not an integer 1..4."),
        ("truth.txt", b"3\n1\n1_0\n2\n3\n1\n", "truth.txt:3: 1_0 is not an integer 1..4."),
        ("truth.txt", b"9" * 9999, "is not an integer 1..4."),
        ("truth.txt", None, "truth.txt cannot be read: No such file or directory."),
        ("synsets.txt", None, "synsets.txt cannot be read: No such file or directory."),
        ("synsets.txt", b"\n", "synsets.txt names no class."),
        ("synsets.txt", b"a\nb\na\n", "synsets.txt:3: class a is in line 1 already."),
        ("meta.mat", None, "meta.mat: No such file or directory."),
        ("meta.mat", b"not a mat file", "is not the meta.mat of the ILSVRC2012 devkit"),
        ("meta.mat", b"", "is not the meta.mat of the ILSVRC2012 devkit"),
    ],
)
def test_mistakes_in_the_ground_truth_are_named(flat, name, content, says):
    (flat / name).unlink()
    if content is not None:
        (flat / name).write_bytes(content)
    classes = flat / (name if name != "truth.txt" else "synsets.txt")
    text = refusal(build, flat / "val", labels=GroundTruth(flat / "truth.txt", classes))
    assert says in text
    assert str(flat / name) in text


def test_leaves_with_other_ids_are_refused(flat, monkeypatch):
    monkeypatch.setattr("tests.indices.SYNSETS", [s for s in SYNSETS if s[0] != 2])
    write_meta(flat / "meta.mat")
    labels = GroundTruth(flat / "truth.txt", flat / "meta.mat")
    assert "its 3 leaves do not have the ids 1..3" in refusal(build, flat / "val", labels=labels)


def test_the_ground_truth_is_for_flat_folders_only(flat):
    image(flat / "val/n01/x.JPEG")
    labels = GroundTruth(flat / "truth.txt", flat / "meta.mat")
    assert "has folders: n01" in refusal(build, flat / "val", labels=labels)


@pytest.fixture
def listed(tmp_path):
    def write_list(text, classes=None):
        (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        if classes is not None:
            (tmp_path / "classes.txt").write_text(classes)
        return PathList(
            tmp_path / "list.txt", None if classes is None else tmp_path / "classes.txt"
        )

    for name in ("b.png", "a b.png", " c#.png", "x/y/d.png", "x/e.data"):
        image(tmp_path / "listed" / name)
    return tmp_path / "listed", write_list


@pytest.mark.parametrize(
    ("text", "classes", "names", "labels"),
    [
        ("b.png 2\n\n./x//e.data 0\r\na b.png\t0\n", None, ("0", "1", "2"), [0, 2, 0]),
        ("b.png 1\nx/e.data 0\na b.png 0\n", "dog\ncat\nant\n", ("dog", "cat", "ant"), [0, 1, 0]),
        ("b.png dog\nx/e.data cat\na b.png 7\n", None, ("7", "cat", "dog"), [0, 2, 1]),
        ("b.png dog\nx/e.data cat\na b.png cat", "dog\ncat\na", ("a", "cat", "dog"), [1, 2, 1]),
    ],
)
def test_labels_of_a_list(listed, text, classes, names, labels):
    root, write_list = listed
    index = saved(root, labels=write_list(text, classes))
    assert relatives(index) == [b"a b.png", b"b.png", b"x/e.data"]
    assert index.class_names == names
    assert index.labels_N.tolist() == labels
    assert out_of_date(index) is None


def test_the_fingerprint_tells_names_of_classes_apart(listed):
    root, write_list = listed
    indexes = [build(root, labels=write_list(f"b.png {name}\n")) for name in ("cat", "dog")]
    assert indexes[0].fingerprint != indexes[1].fingerprint
    assert np.array_equal(indexes[0].labels_N, indexes[1].labels_N)


def test_a_list_takes_odd_paths_and_notices_changes(listed):
    root, write_list = listed
    image(root / os.fsdecode(b"\xff.png"))
    time.sleep(0.02)
    labels = write_list(b" c#.png 1\n\xff.png 0\nx/y/d.png 1\n")
    index = saved(root, labels=labels)
    assert relatives(index) == [b" c#.png", b"x/y/d.png", b"\xff.png"]
    assert [row[:2] for row in index.snapshot.directories] == [("x/y", 1)]
    (root / "x/y/d.png").unlink()
    assert out_of_date(index) == "folder x/y has changed"
    assert f"--list {root.parent}/list.txt`" in refusal(load_or_build, root)


@pytest.mark.parametrize(
    ("text", "classes", "says"),
    [
        ("b.png 0\nnone.png 1\n", None, "list.txt:2: "),
        ("b.png 0\nnone.png 1\n", None, "has no none.png."),
        ("b.png 0\n\na b.png cat\n", None, "list.txt:3: cat is not an integer 0..999999."),
        ("b.png 0\na b.png -1\n", None, "list.txt:2: -1 is outside 0..999999."),
        ("b.png 1000000\n", None, "list.txt:1: 1000000 is outside 0..999999."),
        ("b.png 0\na b.png 2\n", "cat\ndog\n", "list.txt:2: 2 is outside 0..1."),
        ("b.png cat\na b.png ant\n", "cat\ndog\n", "list.txt:2: class ant is not in"),
        ("b.png 0\n./b.png 0\n", None, "list.txt:2: b.png was listed in line 1 already."),
        ("b.png 0\nb.png\n", None, "list.txt:2: b.png is not `path label`."),
        ("/b.png 0\n", None, "list.txt:1: /b.png is not relative to"),
        ("x/../../b.png 0\n", None, "list.txt:1: ../b.png is not relative to"),
        ("\n \n", None, "list.txt has no line `path label`."),
    ],
)
def test_mistakes_in_a_list_are_named(listed, text, classes, says):
    root, write_list = listed
    assert says in refusal(build, root, labels=write_list(text, classes))


def test_different_classes_are_named():
    def index(*names):
        return synthetic(Path("/", "".join(names)), [b"x"], class_names=names)

    check_same_classes(index("a", "b"), index("a", "b"))
    text = refusal(check_same_classes, index("a", "b", "n\n"), index("b", "d"))
    assert "only in '/abn\\n': a, 'n\\n'; only in /bd: d." in text
    text = refusal(check_same_classes, index("a", "b"), index("b", "a"))
    assert "label 0 is a in the first and b in the second" in text
    many = [f"c{k:02}" for k in range(25)]
    assert "c20 and 4 more." in refusal(check_same_classes, index(*many), index("c00"))
