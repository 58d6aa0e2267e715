"""`pskd inspect`: what past predictions say of the training data, against plain Python."""

import base64
import csv
import io
import json
import math
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pskd.cli import main
from pskd.command_line import resolve
from pskd.data import digits, fashion_mnist, imagefolder
from pskd.data.catalog import DATASETS
from pskd.inspection import label_errors, scan
from pskd.inspection.findings import find
from pskd.inspection.source import open_run
from pskd.store import open_for_training, open_generation
from tests.flipped_fashion_mnist import SHARE, flipped
from tests.forked import ForkedJob, train
from tests.photos import make_folder

N = 300
FLAGS = ("--recipe=digits-pskd", f"--data.limit={N}", "--train.epochs=3", "--run.threads=1")
FILES = {
    "classes.csv",
    "confusion.csv",
    "flips.csv",
    "hardest.csv",
    "index.html",
    "label_errors.csv",
    "samples.npz",
    "summary.json",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three epochs on 300 digits, two ranks: hardly trained, so that there is much to find."""
    run_dir = tmp_path_factory.mktemp("inspect") / "run"
    job = train(run_dir, *FLAGS, "--optimizer.lr=0.02", "--schedule.milestones=[2]")
    assert job.process.returncode == 0, job.output()
    return run_dir


@pytest.fixture(scope="module")
def rows(run):
    """Rows of the last two epochs as lists of floats, by sample; all have one."""
    return [open_generation(run / "store" / f"gen-{e:06d}")[range(N)].tolist() for e in (1, 2)]


@pytest.fixture(scope="module")
def labels():
    return digits.load(None, False).train.labels_N[:N].tolist()


def written(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def store_of(directory, rows, *, dataset="", epoch=0):
    """A store of one epoch: {id: row} of `rows`, the others are absent. Returns the generation."""
    ids = [i for i, row in enumerate(rows) if row is not None]
    classes = len(rows[ids[0]])
    options = {"n": len(rows), "classes": classes, "encoding": "float32", "dataset": dataset}
    with open_for_training(directory, **options) as store:
        store.begin_epoch(epoch)
        for part in np.array_split(np.random.default_rng(0).permutation(ids), 3):
            store.remember(part, torch.tensor([rows[i] for i in part]))
        store.end_epoch()
    return open_generation(directory / f"gen-{epoch:06d}")


def argmax(values):
    return values.index(max(values))


def margin(row, label):
    return row[label] - max(p for k, p in enumerate(row) if k != label)


def confident_learning(rows, labels, classes):
    """(thresholds, joint, [(id, suggested)] the worst first), sample by sample, in float64."""
    known = [i for i, row in enumerate(rows) if row is not None]
    thresholds = []
    for k in range(classes):
        own = [rows[i][k] for i in known if labels[i] == k]
        thresholds.append(sum(own) / len(own) if own else math.inf)
    joint = [[0] * classes for _ in range(classes)]
    off = []
    for i in known:
        confident = [k for k in range(classes) if rows[i][k] >= thresholds[k]]
        if not confident:
            continue
        best = max(confident, key=lambda k: (rows[i][k], -k))
        joint[labels[i]][best] += 1
        if best != labels[i]:
            other = max(p for k, p in enumerate(rows[i]) if k != labels[i])
            off.append((np.float32(rows[i][labels[i]]) / np.float32(other), -other, i, best))
    return thresholds, joint, [(i, best) for _, _, i, best in sorted(off)]


def random_rows(seed, n, classes, absent):
    """Rows of all kinds, from flat to certain; some label has a low threshold, some a high one."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(2, classes - 1), n)  # the last of many classes has no sample
    logits = rng.normal(size=(n, classes)) * rng.uniform(0.1, 4, (n, 1))
    logits[np.arange(n), labels] += rng.uniform(-1, 3, n) + 2 * labels / classes
    probs = torch.from_numpy(logits).softmax(dim=1).float()
    rows = [None if rng.random() < absent else row for row in probs.tolist()]
    return rows, labels


@pytest.mark.parametrize(
    ("seed", "n", "classes", "absent"), [(0, 200, 2, 0), (1, 400, 5, 0.1), (2, 500, 30, 0.3)]
)
def test_label_errors_are_those_of_plain_python(tmp_path, monkeypatch, seed, n, classes, absent):
    monkeypatch.setattr(scan, "_BLOCK_BYTES", 4 * classes * 37)  # blocks of 37 rows
    rows, labels = random_rows(seed, n, classes, absent)
    generation = store_of(tmp_path, rows)
    judged = scan.judge(generation, labels)
    found = label_errors.find(generation, judged, labels)
    thresholds, joint, off = confident_learning(rows, labels.tolist(), classes)
    np.testing.assert_allclose(found.thresholds_C, thresholds, rtol=1e-6)
    assert found.joint_CC.tolist() == joint
    assert list(zip(found.ids.tolist(), found.suggested.tolist(), strict=True)) == off
    assert len(off) > n / 20
    count = [0] * classes
    for row, label in zip(rows, labels, strict=True):
        count[label] += row is not None
    parts = zip(range(classes), count, joint, strict=True)
    wrong = [n * (1 - row[j] / sum(row)) for j, n, row in parts if sum(row)]
    assert found.estimated(np.array(count)) == pytest.approx(sum(wrong))


def test_what_is_kept_of_each_sample_is_what_plain_python_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "_BLOCK_BYTES", 4 * 6 * 11)
    rows, labels = random_rows(3, 100, 6, 0.2)
    rows[7], rows[8] = [0.25, 0.25, 0.125, 0.125, 0.125, 0.125], [0, 0, 0, 0.5, 0, 0.5]
    labels[7], labels[8] = 1, 3  # of equal ones, the first is predicted
    judged = scan.judge(store_of(tmp_path, rows), labels)
    for i, row in enumerate(rows):
        assert judged.present_N[i] == (row is not None)
        if row is None:
            assert np.isnan(judged.own_N[i])
            assert judged.predicted_N[i] == judged.other_class_N[i] == -1
            continue
        own, others = row[labels[i]], [p if k != labels[i] else -1 for k, p in enumerate(row)]
        assert (judged.own_N[i], judged.other_N[i]) == pytest.approx((own, max(others)))
        assert judged.predicted_N[i] == argmax(row)
        assert judged.other_class_N[i] == argmax(others)
    for k in range(5):
        of_k = [row for row, label in zip(rows, labels, strict=True) if row and label == k]
        np.testing.assert_allclose(judged.mean_CC[k], np.mean(of_k, axis=0), rtol=1e-5)
    assert np.isnan(judged.mean_CC[5]).all()


def test_findings_of_a_run_are_those_of_plain_python(run, rows, labels):
    found = find(open_run(run, []))
    before, now = rows
    assert (found.epoch, found.before_epoch, found.skipped, found.judged) == (2, 1, 0, N)
    own = [row[label] for row, label in zip(now, labels, strict=True)]
    assert found.hardest.tolist() == sorted(range(N), key=lambda i: own[i])
    was, is_now = ([argmax(r) == k for r, k in zip(e, labels, strict=True)] for e in rows)
    rise = [now[i][k] - before[i][k] for i, k in enumerate(labels)]
    forgotten = [i for i in range(N) if was[i] and not is_now[i]]
    learned = [i for i in range(N) if not was[i] and is_now[i]]
    assert forgotten and learned
    assert found.forgotten.tolist() == sorted(forgotten, key=lambda i: rise[i])
    assert found.learned.tolist() == sorted(learned, key=lambda i: -rise[i])
    assert found.error == pytest.approx(1 - sum(is_now) / N)
    assert found.errors.ids.tolist() == [i for i, _ in confident_learning(now, labels, 10)[2]]
    for k, count, p_label, p_top, error, suspects in found.by_class():
        of_k = [i for i in range(N) if labels[i] == k]
        assert count == len(of_k)
        assert p_label == pytest.approx(np.mean([now[i][k] for i in of_k]), rel=1e-5)
        assert p_top == pytest.approx(np.mean([max(now[i]) for i in of_k]), rel=1e-5)
        assert error == pytest.approx(np.mean([not is_now[i] for i in of_k]))
        assert suspects == sum(labels[i] == k for i in found.errors.ids)
    pairs = found.confused(1000)
    assert len(pairs) == 90
    assert [p for _, _, p, _, _ in pairs] == sorted((p for _, _, p, _, _ in pairs), reverse=True)
    label, other, p, taken, share = pairs[0]
    of_label = [i for i in range(N) if labels[i] == label]
    assert p == pytest.approx(np.mean([now[i][other] for i in of_label]), rel=1e-5)
    assert taken == sum(argmax(now[i]) == other for i in of_label)
    assert share == pytest.approx(taken / len(of_label))


def test_the_command_prints_and_writes_what_was_found(run, rows, labels, capsys):
    assert main(["inspect", str(run), "--top", "4"]) == 0
    out = capsys.readouterr().out
    found, output = find(open_run(run, [])), run / "inspect"
    assert {path.name for path in output.iterdir()} == FILES
    hardest = written(output / "hardest.csv")
    assert [int(line["sample"]) for line in hardest] == found.hardest.tolist()
    first = hardest[0]
    i = int(first["sample"])
    row = rows[1][i]
    assert (first["label"], first["predicted"]) == (str(labels[i]), str(argmax(row)))
    figures = [float(first[key]) for key in ("p_label", "p_predicted", "margin")]
    expected = [row[labels[i]], max(row), margin(row, labels[i])]
    assert figures == pytest.approx(expected, abs=1e-6)
    errors = written(output / "label_errors.csv")
    assert [int(e["sample"]) for e in errors] == found.errors.ids.tolist()
    assert [int(e["suggested"]) for e in errors] == found.errors.suggested.tolist()
    flips = written(output / "flips.csv")
    assert [f["change"] for f in flips].count("forgotten") == len(found.forgotten)
    for flip in flips:
        assert (flip["label"] == flip["predicted"]) == (flip["change"] == "learned")
        before = rows[0][int(flip["sample"])][int(flip["label"])]
        assert float(flip["p_label_before"]) == pytest.approx(before, abs=1e-6)
    assert [c["class"] for c in written(output / "classes.csv")] == list("0123456789")
    assert len(written(output / "confusion.csv")) == 90
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["epoch"], summary["epoch_before"], summary["samples"]) == (3, 2, N)
    assert summary["label_errors"] == len(errors)
    assert [s["sample"] for s in summary["top"]["hardest"]] == found.hardest[:4].tolist()
    with np.load(output / "samples.npz") as arrays:
        assert arrays["label"].tolist() == labels
        assert arrays["predicted"].tolist() == [argmax(row) for row in rows[1]]
        assert np.flatnonzero(arrays["suggested"] >= 0).tolist() == sorted(found.errors.ids)
    assert f"{len(errors)} probable label errors" in out
    assert f"{len(found.forgotten)} samples forgotten" in out
    table = out[out.index("Hardest samples:") :].split("\n\n")[1].splitlines()
    assert [int(line.split("|")[1]) for line in table[2:]] == found.hardest[:4].tolist()


class Page(HTMLParser):
    """The text of a page, its images, and what it would fetch."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.images, self.fetched = [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "src":
                assert tag == "img"
                kind, _, content = value.partition(";base64,")
                self.images.append(Image.open(io.BytesIO(base64.b64decode(content))))
                assert kind == f"data:image/{self.images[-1].format.lower()}"
            elif name == "href" and not value.startswith(("#", "data:")):
                self.fetched.append(value)

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def test_the_page_shows_the_images_and_needs_nothing_else(run, capsys):
    assert main(["inspect", str(run)]) == 0
    page, found = Page(run / "inspect" / "index.html"), find(open_run(run, []))
    assert page.fetched == []
    lists = (found.errors.ids, found.hardest, found.forgotten, found.learned)
    shown = [i for ids in lists for i in ids[:40].tolist()]
    assert [t for t in page.texts if t.startswith("sample ")] == [f"sample {i}" for i in shown]
    images = digits.load(None, False).train.images_NHWC
    for sample, image in zip(shown, page.images, strict=True):
        assert np.asarray(image).tolist() == images[sample, :, :, 0].tolist()
    sections = ("Probable label errors", "Hardest samples", "Forgotten", "Learned", "Classes")
    assert set(sections) <= set(page.texts)
    worst = found.hardest[0]
    line = f"{found.labels_N[worst]} {found.now.own_N[worst]:.3f}"
    assert line in page.texts
    assert any("memorises its labels" in text for text in page.texts)


@pytest.fixture
def folder_run(tmp_path):
    """A run on a folder of 12 photos of 2 classes, and its directory."""
    root = tmp_path / "photos"
    make_folder(root / "train", classes=2, per_class=6, median_side=200)
    return on_folder(tmp_path, root)


def on_folder(tmp_path, root):
    flags = ("--data.name=imagefolder", f"--data.root={root}", "--data.held_out=2")
    run_dir = configured(tmp_path / "run", "--recipe=imagenet-resnet152-pskd", *flags)
    options = {"index_path": None, "val_index_path": None, "held_out": 2, "limit": 0}
    catalog = imagefolder.load(root, **options)
    rows = [[0.9, 0.1] if i % 2 else [0.3, 0.7] for i in range(10)]
    store_of(run_dir / "store", rows, dataset=catalog.fingerprint)
    return run_dir, root, catalog


def test_photos_are_shown_small_and_those_that_are_lost_are_named(folder_run, capsys):
    run_dir, root, catalog = folder_run
    lost = catalog.train.path(3)
    (root / lost).write_bytes(b"no image any more")
    assert main(["inspect", str(run_dir)]) == 0
    paths = [line["path"] for line in written(run_dir / "inspect" / "hardest.csv")]
    assert sorted(paths) == sorted(catalog.train.path(i) for i in range(10))
    page = Page(run_dir / "inspect" / "index.html")
    assert max(max(image.size) for image in page.images) == 112
    section = page.texts[page.texts.index("Hardest samples", page.texts.index("Classes") + 1) :]
    assert "1 image is gone, or cannot be decoded:" in section
    assert lost in section
    assert "sample 3" not in section
    assert "sample 2" in section


def test_names_that_are_no_text_are_shown_escaped_and_written_as_they_are(tmp_path, capsys):
    make_folder(tmp_path / "photos" / "train", classes=2, per_class=6, median_side=48)
    odd = os.fsdecode(b"caf\xe9\n")
    (tmp_path / "photos" / "train" / "class001").rename(tmp_path / "photos" / "train" / odd)
    run_dir, _, catalog = on_folder(tmp_path, tmp_path / "photos")
    sample = int(catalog.train.labels_N.argmin())
    Path(catalog.train.path(sample)).write_bytes(b"no image any more")
    assert main(["inspect", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "| 'caf\\udce9\\n' " in out
    page = Page(run_dir / "inspect" / "index.html")
    assert "'caf\\udce9\\n'" in page.texts
    lines = (run_dir / "inspect" / "hardest.csv").read_bytes()
    assert b'"caf\xe9\n"' in lines
    summary = json.loads((run_dir / "inspect" / "summary.json").read_text())
    assert summary["classes"] == [odd, "class000"]


def test_data_that_were_moved_are_named_and_others_refused(folder_run, tmp_path, capsys):
    run_dir, root, _ = folder_run
    moved = root.rename(tmp_path / "moved")
    text = refusal(capsys, run_dir)
    assert "holds no train/" in text
    assert "its store holds no labels" in text
    assert "--data.root DIR" in text
    assert main(["inspect", str(run_dir), "--data.root", str(moved)]) == 0
    capsys.readouterr()
    next((moved / "train").glob("*/*.JPEG")).rename(moved / "train" / "class000" / "other.JPEG")
    text = refusal(capsys, run_dir, "--data.root", moved)
    assert "is about other samples than the training data" in text


def configured(run_dir, *flags):
    """A run directory with a configuration only."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(resolve(list(flags)).to_yaml())
    return run_dir


def refusal(capsys, *words):
    assert main(["inspect", *map(str, words)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    return captured.err


def test_runs_without_predictions_are_refused_with_the_reason(tmp_path, capsys):
    baseline = configured(tmp_path / "a", "--recipe=digits-baseline")
    assert "method baseline keeps no past predictions" in refusal(capsys, baseline)
    model = configured(tmp_path / "b", "--recipe=digits-pskd", "--method.teacher=model")
    assert "method.teacher model keeps no past predictions" in refusal(capsys, model)
    young = configured(tmp_path / "c", "--recipe=digits-pskd")
    (young / "store" / "gen-000000").mkdir(parents=True)
    text = refusal(capsys, young)
    assert "no past predictions of a finished epoch" in text
    assert f"train.py --run.dir {young}" in text
    assert "no run directory" in refusal(capsys, tmp_path)
    assert "--top is 0" in refusal(capsys, young, "--top", "0")
    assert "--train.epochs: `pskd inspect` does not read" in refusal(
        capsys, young, "--train.epochs", "3"
    )


@pytest.mark.parametrize(
    ("n", "classes", "part"),
    [
        (1437, 7, "is about 7 classes, but the training data have 10"),
        (1436, 10, "is about 1436 samples, but the training data have 1437"),
        (1437, 10, "is about other samples than the training data"),
    ],
)
def test_predictions_for_other_data_are_refused(tmp_path, capsys, n, classes, part):
    run_dir = configured(tmp_path / "run", "--recipe=digits-pskd")
    store_of(run_dir / "store", [[1 / classes] * classes] * n, dataset="another")
    assert part in refusal(capsys, run_dir)


def test_samples_without_a_row_are_left_out_and_counted(tmp_path, capsys):
    run_dir = configured(tmp_path / "run", "--recipe=digits-pskd", "--data.last_batch=drop")
    catalog = digits.load(None, False)
    rows = np.full((1437, 10), 0.05) + np.eye(10)[catalog.train.labels_N] * 0.5
    rows = [row if i % 10 else None for i, row in enumerate(rows.tolist())]
    store_of(run_dir / "store", rows, dataset=catalog.fingerprint)
    output = tmp_path / "elsewhere" / "deep"
    assert main(["inspect", str(run_dir), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "144 samples have no row yet and are left out" in out
    assert "Only one epoch is on disk" in out
    assert "forgotten" not in out
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["samples_without_a_row"], summary["forgotten"]) == (144, None)
    assert not {0, 10, 1430} & {int(line["sample"]) for line in written(output / "hardest.csv")}
    assert not (run_dir / "inspect").exists()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--mixing.name=cutmix"], "predictions for mixed images"),
        (["--erasing.name=cutout"], "images with a part erased"),
        (["--method.averaging=0.5"], "averages over epochs"),
        (["--store.encoding=top3"], "smaller probabilities are guesses"),
    ],
)
def test_what_the_rows_are_of_is_noted(tmp_path, capsys, flags, part):
    run_dir = configured(tmp_path / "run", "--recipe=digits-pskd", *flags)
    catalog = digits.load(None, False)
    store_of(run_dir / "store", [[0.1] * 10] * 1437, dataset=catalog.fingerprint)
    assert main(["inspect", str(run_dir)]) == 0
    assert part in capsys.readouterr().out
    assert any(part in note for note in json.loads((run_dir / "inspect" / "summary.json").read_text())["notes"])  # fmt: skip  # noqa: E501


def test_a_place_that_cannot_be_written_is_named(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = refusal(capsys, run, "--output", tmp_path / "file")
    assert f"{tmp_path / 'file'} cannot be written" in error
    assert error.endswith(" Name another place with --output.\n")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not fashion_mnist.DEBIAN.exists(), reason="install Debian's dataset-fashion-mnist"
)
def test_labels_that_were_flipped_are_found(tmp_path, monkeypatch):
    """10,000 images of Fashion-MNIST with 200 wrong labels, the recipe in half its epochs.

    Prints the figures that the README gives.
    """
    name = "flipped-fashion-mnist"
    monkeypatch.setitem(DATASETS, name, "tests.flipped_fashion_mnist")
    flags = ("--recipe=fashion-mnist-10k-pskd", f"--data.name={name}", "--train.epochs=6")
    job = ForkedJob(tmp_path / name, *flags, "--schedule.milestones=[3,5]", "--evaluation.every=6")
    assert job.process.wait(1500) == 0, job.output()
    assert main(["inspect", str(tmp_path / name)]) == 0
    wrong = set(flipped().tolist())
    precision, recall = {}, {}
    for kind in ("label_errors", "hardest"):
        lines = written(tmp_path / name / "inspect" / f"{kind}.csv")
        hits = np.cumsum([int(line["sample"]) in wrong for line in lines])
        for count in (100, 200, len(lines)):
            precision[kind, count] = hits[count - 1] / count
            recall[kind, count] = hits[count - 1] / len(wrong)
            figures = f"precision {precision[kind, count]:.3f}, recall {recall[kind, count]:.3f}"
            print(f"{kind}, first {count}: {figures}")  # noqa: T201
    everything = len(written(tmp_path / name / "inspect" / "label_errors.csv"))
    assert precision["label_errors", everything] > 4 * SHARE
    assert recall["label_errors", everything] > 0.55
    assert precision["label_errors", 100] > 45 * SHARE
    assert precision["label_errors", 200] > 25 * SHARE
    assert precision["hardest", 200] > 25 * SHARE


def overwritten(run, tmp_path, epoch):
    """A copy of a run of which a row of an epoch was damaged."""
    copy = tmp_path / f"of_{epoch}"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("inspect"))
    segment = max((copy / "store").glob(f"gen-{epoch:06d}/*.psk"), key=lambda p: p.stat().st_size)
    content = bytearray(segment.read_bytes())
    content[-40] ^= 1
    segment.write_bytes(content)
    return copy, segment


def test_damaged_rows_are_not_taken_for_label_errors(run, tmp_path, capsys):
    copy, segment = overwritten(run, tmp_path, 2)
    assert main(["inspect", str(copy)]) == 1
    error = capsys.readouterr().err
    assert f"{segment}: rows" in error
    assert "are damaged (crc differs). Restore the file from a copy; or remove" in error
    (copy / "store" / "gen-000002" / "manifest.json").unlink()  # the remedy
    assert main(["inspect", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "3 epochs are trained, but of the last one no predictions are there" in out
    copy, segment = overwritten(run, tmp_path, 1)
    assert main(["inspect", str(copy)]) == 0
    out = capsys.readouterr().out
    assert f"Nothing is known of flips. prediction store: {segment}: rows" in out


def test_where_the_data_lie_is_no_question_for_the_digits(run, capsys):
    assert main(["inspect", str(run), "--data.root", "elsewhere"]) == 1
    assert "--data.root: nothing reads it: they come with scikit-learn." in capsys.readouterr().err
