"""`pskd report` and `pskd compare` of runs that are unfinished, older, damaged or none at all."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from pskd.cli import main
from tests.forked import ForkedJob, train
from tests.launches import result
from tests.pages import SECTIONS, parsed, words


def test_runs_without_predictions_share_one_notice(runs, tmp_path):
    paths = []
    for name in ("pskd", "baseline"):
        paths.append(tmp_path / name)
        ignored = shutil.ignore_patterns("checkpoints", "store", "evaluation.npz")
        shutil.copytree(runs / name, paths[-1], ignore=ignored)
    output = tmp_path / "c.html"
    assert main(["compare", *map(str, paths), "--html", str(output)]) == 0
    assert output.read_text().count('class="notice"') == 1
    text = words(parsed(output).text)
    assert "of pskd, baseline are left out: they were completed by an older version" in text
    assert all(f"`train.py --run.dir {path}`" in text for path in paths)


def test_settings_that_an_older_run_lacks_differ_only_where_the_other_has_no_default(
    runs, tmp_path
):
    older, newer = tmp_path / "older", tmp_path / "newer"
    for path in (older, newer):
        shutil.copytree(runs / "pskd", path, ignore=shutil.ignore_patterns("checkpoints", "store"))
    settings = yaml.safe_load((older / "config.yaml").read_text())
    settings["store"]["read"] = "off"
    (newer / "config.yaml").write_text(yaml.safe_dump(settings))
    del settings["engine"]["deterministic"], settings["tracking"], settings["store"]["read"]
    (older / "config.yaml").write_text(yaml.safe_dump(settings))
    output = tmp_path / "c.html"
    assert main(["compare", str(older), str(newer), "--html", str(output)]) == 0
    text = words(parsed(output).text)
    assert "Where the runs differ: key older newer store.read - off Learning curves" in text


def test_an_unfinished_run_is_reported_as_such(runs, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ("--recipe=digits-pskd", "--train.epochs=400", "--run.threads=1")
    job = ForkedJob(run, *flags, processes=None)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.02)
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(60) == 75, job.output()
    assert main(["report", str(run)]) == 0
    found = parsed(run / "report" / "index.html")
    done = len((run / "metrics.jsonl").read_text().splitlines())
    text = words(found.text)
    assert f"Unfinished: {done} of 400 epochs. The run is stopped" in text
    assert f"`train.py --run.dir {run}` resumes it" in text
    assert "are shown of complete runs only" in text
    assert found.headings == [s for s in SECTIONS if s not in SECTIONS[3:6]]
    assert main(["compare", str(runs / "pskd"), str(run), "--html", str(tmp_path / "c.html")]) == 1
    assert f"{run} is not complete (stopped in epoch {done + 1} of 400" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text("")
    assert main(["report", str(run)]) == 1
    assert f"{run} has no finished epoch yet (stopped in epoch" in capsys.readouterr().err


def test_a_run_of_an_older_version_says_what_is_left_out_and_how_to_get_it(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "pskd", run)
    (run / "evaluation.npz").unlink()
    (run / "preprocessing.json").unlink()
    output = tmp_path / "c.html"
    assert main(["compare", str(run), str(runs / "baseline"), "--html", str(output)]) == 0
    remedy = f"without evaluation.npz. `train.py --run.dir {run}` writes it"
    assert remedy in words(parsed(output).text)
    job = train(run, processes=None)  # the remedy
    assert job.process.returncode == 0, job.output()
    assert main(["report", str(run)]) == 0
    found = parsed(run / "report" / "index.html")
    assert found.headings == SECTIONS
    starts = found.text[found.text.rindex("Starts") :]
    assert words(starts).startswith("Starts start UTC host command changed 1 2")
    assert len(re.findall(r"\d\d:\d\d:\d\d", starts)) == 2


AGAIN, COPY = "Remove it: `train.py --run.dir", "Restore it from a copy"


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("metrics.jsonl", "{]", AGAIN),
        ("metrics.jsonl", "", AGAIN),
        ("result.json", "{", AGAIN),
        ("result.json", "[]", AGAIN),
        ("result.json", '{"last": {"epoch": 1}}', AGAIN),
        ("evaluation.npz", "no archive", AGAIN),
        ("preprocessing.json", "", AGAIN),
        ("preprocessing.json", "{}", AGAIN),
        ("env.json", "[1]", COPY),
        ("env.json", '[{"facts": {}}]', COPY),
        ("config.yaml", "a: [b", COPY),
        ("config.yaml", "- a", COPY),
    ],
)
def test_a_damaged_file_is_named(runs, tmp_path, capsys, name, content, remedy):
    run = tmp_path / "run"
    shutil.copytree(runs / "pskd", run, ignore=shutil.ignore_patterns("checkpoints", "store"))
    (run / name).write_text(content)
    for command in (["report", str(run)], ["compare", str(run), "--html", str(tmp_path / "c")]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {run / name} ")
        assert error.count("\n") == 1
        assert remedy in error


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize(
    ("last", "part"),
    [
        ({"nll": ...}, " has no nll in last. Remove it: `train.py"),
        ({"nll": "low", "epoch": None}, " has no epoch, nll in last. Remove it: `train.py"),
        (..., " lacks last. Remove it: `train.py"),
    ],
)
def test_what_a_result_lacks_is_named(runs, tmp_path, capsys, command, last, part):
    run = tmp_path / "run"
    shutil.copytree(runs / "pskd", run, ignore=shutil.ignore_patterns("checkpoints", "store"))
    content = result(run)
    if last is ...:
        del content["last"]
    else:
        content["last"] = {k: v for k, v in (content["last"] | last).items() if v is not ...}
    (run / "result.json").write_text(json.dumps(content))
    assert main([command, str(run)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {run / 'result.json'}{part}")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{]", "line 2 is no JSON"),
        ('{"epoch": 1, "images_per_s": 2}', "line 2 lacks top1_error"),
        (
            '{"epoch": 2, "images_per_s": 2, "top1_error": 1}',
            "line 2 is of epoch 3 and follows epoch 1",
        ),
    ],
)
def test_a_bad_line_of_the_metrics_is_named(runs, tmp_path, capsys, line, part):
    run = tmp_path / "run"
    shutil.copytree(runs / "pskd", run, ignore=shutil.ignore_patterns("checkpoints", "store"))
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (run / "metrics.jsonl").write_text(f"{first}\n{line}\n")
    assert main(["report", str(run)]) == 1
    assert f"{run / 'metrics.jsonl'} cannot be read ({part}). " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "change", "part"),
    [
        ("confidence", lambda a: np.where(np.arange(len(a)) == 3, np.nan, a), "nan at sample 3"),
        ("label", lambda a: a + 1, "a label is outside 0..9"),
        ("rank", lambda a: 0 * a, "it is not the one that the run wrote: sha256 differs"),
        ("nll", lambda a: a[:5], "its arrays have different lengths"),
    ],
)
def test_predictions_that_are_not_those_of_the_result_are_refused(
    runs, tmp_path, capsys, key, change, part
):
    run = tmp_path / "run"
    shutil.copytree(runs / "pskd", run, ignore=shutil.ignore_patterns("checkpoints", "store"))
    with np.load(run / "evaluation.npz") as found:
        arrays = dict(found)
    arrays[key] = change(arrays[key])
    np.savez(run / "evaluation.npz", **arrays)
    for command in (["report", str(run)], ["compare", str(run), "--html", str(tmp_path / "c")]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {run / 'evaluation.npz'} cannot be read (")
        assert part in error
        assert "Remove it: `train.py" in error


def test_predictions_that_are_made_anew_are_those_of_the_run(runs, tmp_path, capsys):
    """Of a run that trains nothing, but counts its ECE in other bins."""
    run = tmp_path / "run"
    flags = ("--resume", str(runs / "pskd"), "--evaluation.ece_bins=15")
    job = train(run, *flags, processes=None)
    assert job.process.returncode == 0, job.output()
    assert main(["report", str(run)]) == 0, capsys.readouterr().err


def test_a_start_of_a_complete_run_takes_no_damage_for_its_own(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "pskd", run)
    with np.load(run / "evaluation.npz") as found:
        arrays = dict(found)
    np.savez(run / "evaluation.npz", **arrays | {"rank": 0 * arrays["rank"]})
    for _ in range(2):
        assert main(["report", str(run)]) == 1
        assert "it is not the one that the run wrote: sha256 differs" in capsys.readouterr().err
        job = train(run, processes=None)
        assert job.process.returncode == 0, job.output()
    (run / "evaluation.npz").unlink()  # the remedy
    job = train(run, processes=None)
    assert job.process.returncode == 0, job.output()
    assert main(["report", str(run)]) == 0


def test_an_empty_folder_holds_no_run(tmp_path, capsys):
    for command in ("report", "compare"):
        assert main([command, str(tmp_path)]) == 1
        assert f"{tmp_path} is no run directory" in capsys.readouterr().err


def test_what_cannot_be_written_and_bins_of_none(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run = str(runs / "pskd")
    assert main(["report", run, "--output", str(tmp_path / "file")]) == 1
    assert "Name another place with --output" in capsys.readouterr().err
    assert main(["compare", run, "--html", str(tmp_path)]) == 1
    assert "Name another place with --html" in capsys.readouterr().err
    assert main(["report", run, "--bins", "0"]) == 1
    assert "--bins is 0" in capsys.readouterr().err
    assert main(["compare", run, "--bins", "5"]) == 1
    assert "--bins 5 means nothing without --html" in capsys.readouterr().err
    assert main(["compare", run, f"{run}/../pskd"]) == 1
    both = f"{run} and {run}/../pskd are one run, which is named twice"
    assert both in capsys.readouterr().err
    assert main(["compare", run, run]) == 1
    assert capsys.readouterr().err == f"error: {run} is named twice: name each run once.\n"


def test_without_matplotlib_the_remedy_is_named(runs):
    program = "import sys; sys.modules['matplotlib'] = None; from pskd.cli import main; "
    line = [sys.executable, "-c", f"{program}sys.exit(main(['report', {str(runs / 'pskd')!r}]))"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "pskd[report]"' in done.stderr
    assert done.stderr.count("\n") == 1
