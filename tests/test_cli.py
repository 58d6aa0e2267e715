"""The `pskd` command."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pskd import command_line, entry, job
from pskd.cli import main
from pskd.metrics import summarize


@pytest.mark.parametrize("argv", [[], ["--local_rank=0"]])  # the second by deepspeed
def test_a_train_without_arguments_is_told_what_is_the_least(capsys, argv):
    assert entry.main(argv) == 1
    assert capsys.readouterr().err.startswith("error: nothing is given to train: --recipe NAME")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--schedule.milestones=[2,3,9]"], "[3, 9] are not reached in 3 epochs"),
        (["--schedule.milestones=[1,2]"], None),
        (["--schedule.milestones=[]"], None),
        (["--schedule.name=cosine"], None),  # the default's are read by nobody then
    ],
)
def test_milestones_that_are_not_reached_are_said(caplog, flags, says):
    caplog.set_level(logging.INFO, "pskd")
    job._say_what_is_not_reached(command_line.load(["--train.epochs=3", *flags]))
    assert [says in message for message in caplog.messages] == ([] if says is None else [True])


@pytest.fixture
def logits_file(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "logits.npz"
    np.savez(path, logits=rng.normal(size=(50, 7)), labels=rng.integers(0, 7, 50))
    return path


def test_evaluate_prints_only_the_measures_as_json(logits_file, capsys):
    assert main(["evaluate", "--logits", str(logits_file), "--json"]) == 0
    arrays = np.load(logits_file)
    expected = summarize(arrays["logits"], arrays["labels"])
    assert json.loads(capsys.readouterr().out) == expected
    assert list(expected) == ["top1_error", "top5_error", "nll", "ece", "aurc", "eaurc"]


def test_evaluate_for_people_takes_the_number_of_bins(logits_file, capsys):
    assert main(["evaluate", "--logits", str(logits_file), "--bins", "15"]) == 0
    arrays = np.load(logits_file)
    ece = summarize(arrays["logits"], arrays["labels"], 15)["ece"]
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| ECE %"))
    assert f" {ece:.2f} " in row


def test_one_sample_of_one_class_is_counted_in_the_singular(tmp_path, capsys):
    np.savez(tmp_path / "one.npz", logits=np.zeros((1, 1)), labels=np.array([0]))
    words = ["--logits", str(tmp_path / "one.npz"), "--bins", "1", "--bootstrap", "100"]
    assert main(["evaluate", *words]) == 0
    out = capsys.readouterr().out
    assert f"Of --logits {tmp_path / 'one.npz'}: 1 sample, 1 class, 1 bin of the ECE." in out
    assert "of 100 bootstrap resamples of" in out


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"logits": np.zeros((2, 3))}, "labels"),
        ({"logits": np.zeros((2, 3)), "labels": np.array([0, 3])}, "3 at sample 1"),
        ({"logits": np.full((2, 3), np.nan), "labels": np.array([0, 1])}, "NaN"),
        (
            {"logits": np.zeros((1, 2)), "labels": np.array([{}], dtype=object)},
            "`labels` is damaged, or of Python objects. Name one with",
        ),
        (
            {"logits": np.zeros((1, 2)), "labels": np.array(["cat"])},
            "`labels` is of text. Name one with",
        ),
        ({"labels": np.array([0])}, " lacks `logits`. Name one with"),
        ({"logits": np.zeros((0, 2)), "labels": np.zeros(0, int)}, ": there are no samples: "),
        ({"logits": np.zeros((1, 2)), "labels": np.zeros(1)}, "the labels are float64: give"),
    ],
)
def test_evaluate_names_what_is_wrong_with_the_file(tmp_path, capsys, arrays, part):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    assert main(["evaluate", "--logits", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(path) in captured.err
    assert part in captured.err
    assert_one_line(captured.err)


def assert_one_line(error):
    """Of our own words."""
    assert error.count("\n") == 1
    assert ".." not in error
    assert "pickle" not in error
    assert "numpy.ndarray" not in error


def write_text(path):
    path.write_text("# a heading\n")


def write_one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros((2, 3)))


def write_half_an_archive(path):
    np.savez(path, logits=np.zeros((20, 3)), labels=np.zeros(20, int))
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("flag", ["--logits", "--fit"])
@pytest.mark.parametrize(
    ("write", "part"),
    [
        (write_text, " is no .npz file. "),
        (write_one_array, " is no .npz file. "),
        (write_half_an_archive, " is no .npz file. "),
        (Path.touch, " is no .npz file. "),
        (Path.mkdir, ": Is a directory. "),
        (lambda path: None, ": No such file or directory. "),
    ],
)
def test_what_is_no_file_of_logits_is_refused_with_what_it_should_be(
    logits_file, tmp_path, capsys, flag, write, part
):
    path = tmp_path / "x.npz"
    write(path)
    words = [flag, str(path)]
    if flag == "--fit":
        words += ["--logits", str(logits_file)]
    assert main(["evaluate", *words]) == 1
    error = capsys.readouterr().err
    assert f"error: {flag} {path}{part}Name one with the arrays `logits`" in error
    assert_one_line(error)


@pytest.mark.parametrize(
    ("words", "usage", "part"),
    [
        (["report", "a", "b"], "pskd report ", "unrecognized arguments: b"),
        (["report", "a", "--bin", "3"], "pskd report ", "unrecognized arguments: --bin 3"),
        (["evaluate", "a", "--bin", "3"], "pskd evaluate ", "unrecognized arguments: --bin 3"),
        (["store", "info", "a", "b"], "pskd store info ", "unrecognized arguments: b"),
        (["export", "a", "--data.name=b"], "pskd export ", "take settings such as --data.name=b"),
        *(
            ([command], f"pskd {command} ", "the following arguments are required: ")
            for command in ("report", "compare", "inspect", "export", "import", "index")
        ),
        ([], "pskd ", "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_use_shows_that_of_the_command_and_ends_as_other_refusals(
    capsys, words, usage, part
):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"usage: {usage}")
    assert part in error


def measured(top1, epoch, top5=1.5):
    return {
        "epoch": epoch,
        "top1_error": top1,
        "top5_error": top5,
        "nll": 0.12345,
        "ece": 3.0,
        "aurc": 7.0,
    }


def test_compare_shows_the_last_epoch_first_and_the_best_beside_it(tmp_path, capsys):
    for name, top5 in (("a", 1.5), ("b", None)):
        (tmp_path / name).mkdir()
        result = {"last": measured(5.0, 9, top5), "best": measured(4.0, 6, top5)}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
        (tmp_path / name / "config.yaml").write_text("run: {recipe: null}")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert rows[2] == ["a", "10", "5.00", "1.50", "0.1235", "3.00", "7.00", "4.00 (7)"]
    assert rows[3][3] == "-"


def test_compare_of_an_unfinished_run_says_how_to_finish_it(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run: {recipe: null}")
    assert main(["compare", str(tmp_path)]) == 1
    assert f"train.py --run.dir {tmp_path}" in capsys.readouterr().err


def test_who_reads_may_have_gone(tmp_path):
    """As in `pskd recipes | head -1`: no traceback."""
    command = subprocess.Popen(
        [sys.executable, "-m", "pskd.cli", "recipes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait() == 1
