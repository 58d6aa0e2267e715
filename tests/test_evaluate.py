"""`pskd evaluate`: figures of runs, exports, foreign weights and files, on any number of ranks."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pskd import models
from pskd.cli import main
from pskd.data import colour
from pskd.data.sections import DataSection
from pskd.errors import AgreedError, PskdError
from pskd.evaluation import source as subject
from pskd.evaluation import temperature
from pskd.evaluation.evaluate import Request, on_ranks
from pskd.evaluation.source import Source, Subject, renormalised, settings
from pskd.export import export
from pskd.metrics import MEASURES, summarize
from pskd.report.evaluation import table
from tests.forked import train
from tests.launches import ROOT, overwrite_weights, result
from tests.photos import make_folder

ASKED = Request(None, None, [], None, 0, None, None, None)
BRIEF = ("--recipe=digits-baseline", "--train.epochs=2", "--schedule.milestones=[1]")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs on the digits, two ranks, 301 samples held out."""
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    job = train(run_dir, *BRIEF, "--data.held_out=301", "--run.threads=1")
    assert job.process.returncode == 0, job.output()
    return run_dir


def on_pool(world, path, *, which="last", model=None, flags=(), **asked):
    """The figures on rank 0, or the message of a refusal."""
    source, flags = Source(Path(path), which, model), list(flags)
    request = replace(ASKED, source=source, flags=flags, **asked)
    try:
        return on_ranks(request, source, settings(source, flags), world)
    except AgreedError as error:
        return str(error)


def evaluated(pool, world, path, **asked):
    """As `on_pool`, by keyword."""
    found = pool(world).run(call, path, asked)
    assert all(each == found[0] for each in found[1:]) or found[1:] == [None] * (world - 1)
    return found[0]


def call(world, path, asked):
    return on_pool(world, path, **asked)


@pytest.mark.parametrize("which", ["last", "best"])
def test_figures_of_a_run_are_its_own_to_the_bit_on_any_number_of_ranks(pool, run, tmp_path, which):
    outputs = []
    for world in (1, 2):
        file = tmp_path / f"{world}.npz"
        found = evaluated(pool, world, run, which=which, output=file, resamples=50)
        assert found.raw.measures == {name: result(run)[which][name] for name in MEASURES}
        assert (found.samples, found.classes, found.bins) == (301, 10, 10)
        outputs.append((found, file.read_bytes()))
    assert outputs[0] == outputs[1]
    with np.load(file) as arrays:
        assert (arrays["logits"].dtype, arrays["labels"].dtype) == (np.float32, np.int32)
        assert summarize(arrays["logits"], arrays["labels"]) == found.raw.measures
        if which == "last":
            written = np.load(run / "evaluation.npz")
            assert written["label"].tolist() == arrays["labels"].tolist()
            assert written["prediction"].tolist() == arrays["logits"].argmax(1).tolist()


def test_an_export_has_the_figures_of_its_run_to_the_bit(pool, run, tmp_path):
    expected = {name: result(run)["last"][name] for name in MEASURES}
    inside, _ = export(run, which="last", kind="state-dict", output=None)
    assert evaluated(pool, 1, inside).raw.measures == expected
    assert evaluated(pool, 1, run / "models" / "checkpoint_2.pth").raw.measures == expected
    # Elsewhere it knows no run; in batches like those of the two ranks, it is the same still.
    away = tmp_path / "away.pth"
    shutil.copy(inside, away)
    shutil.copy(f"{inside}.json", f"{away}.json")
    flags = ["--data.name=digits", "--data.held_out=301", "--evaluation.batch_size=150"]
    found = evaluated(pool, 1, away, flags=[*flags, "--run.threads=1"]).raw.measures
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_export_that_was_moved_knows_its_data(pool, run, tmp_path):
    path, _ = export(run, which="best", kind="state-dict", output=tmp_path / "moved.pth")
    found = evaluated(pool, 1, path)
    expected = {name: pytest.approx(result(run)["best"][name]) for name in MEASURES}
    assert found.raw.measures == expected
    assert found.source == f"{path} on digits, 301 held out"
    overwrite_weights(path)
    message = evaluated(pool, 1, path)
    assert message.startswith(f"{path} is damaged: its weights are not those that were written")
    assert message.endswith("Restore it from a copy, export it again, or name other weights.")


def test_a_run_in_bfloat16_of_averaged_weights_has_its_own_figures_to_the_bit(pool, tmp_path):
    run = tmp_path / "run"
    ema = ("--model.ema_decay=0.5", "--evaluation.weights=ema", "--engine.channels_last=true")
    flags = (*BRIEF, *ema, "--deepspeed_config=bf16", "--data.limit=400", "--run.threads=1")
    job = train(run, *flags, "--evaluation.ece_bins=15", processes=None)
    assert job.process.returncode == 0, job.output()
    expected = {name: result(run)["last"][name] for name in MEASURES}
    found = evaluated(pool, 2, run)
    assert (found.raw.measures, found.bins) == (expected, 15)
    full = evaluated(pool, 1, run, flags=["--evaluation.precision=fp32"]).raw.measures
    assert full != expected
    assert full == pytest.approx(expected, rel=0.05)


def test_a_network_of_nan_is_refused_on_all_ranks(pool, run, tmp_path):
    content = torch.load(run / "models" / "checkpoint_2.pth", weights_only=True)
    content["net"]["linear.bias"][3] = float("nan")
    del content["weights_sha256"]
    torch.save(content, tmp_path / "nan.pth")
    message = evaluated(pool, 2, tmp_path / "nan.pth", flags=["--data.name=digits"])
    assert f"{tmp_path / 'nan.pth'} on digits: the logits hold 360 NaN or +inf" in message


def test_a_temperature_is_fitted_on_what_the_run_held_out(pool, run, tmp_path):
    test, held_out = tmp_path / "test.npz", tmp_path / "held-out.npz"
    evaluated(pool, 1, run, output=held_out)
    flags = ["--data.held_out=0"]
    found = evaluated(
        pool, 1, run, flags=flags, fit_on="held-out", output=test, bins=15, resamples=20
    )
    assert (found.samples, found.bins) == (360, 15)
    with np.load(held_out) as arrays:
        expected = temperature.fit(*map(torch.from_numpy, (arrays["logits"], arrays["labels"])), "")
    assert found.temperature == expected
    assert found.fitted_on.startswith("301 samples of")
    with np.load(test) as arrays:
        scaled = arrays["logits"].astype(np.float64) / expected
        assert found.scaled.measures == summarize(scaled, arrays["labels"], 15)
    assert found.scaled.measures["nll"] < found.raw.measures["nll"]
    low, high = found.scaled.intervals["nll"]
    assert low < found.scaled.measures["nll"] < high
    # The same by files.
    assert evaluated(pool, 1, run, flags=flags, fit=held_out).temperature == expected


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ({"fit_on": "held-out"}, ["are the ones that are measured", "--data.held_out 0"]),
        ({"fit_on": "0.3"}, ["would fit on the samples that the run is judged by", "held-out"]),
        ({"flags": ["--data.pad_to=32"], "bins": 15, "fit": "nowhere.npz"}, ["nowhere.npz: No s"]),
        (
            {"output": "nowhere/x.npz"},
            ["nowhere/x.npz cannot be written", "Name another place with --output."],
        ),
        (
            {"model": "preact_resnet8_w16", "path": "models/checkpoint_2.pth"}
            | {"flags": ["--data.name=fashion-mnist", "--data.root=nowhere"]},
            ["nowhere"],
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_the_remedy(pool, run, asked, parts):
    asked = {**asked, "path": run / asked.get("path", "")}
    for name in ("fit", "output"):
        if name in asked:
            asked[name] = Path(asked[name])
    message = evaluated(pool, 1, asked.pop("path"), **asked)
    assert isinstance(message, str)
    for part in parts:
        assert part in message


def test_the_samples_that_are_measured_are_refused_under_any_name(pool, run, tmp_path):
    file = tmp_path / "copy.npz"
    evaluated(pool, 1, run, output=file)
    best = tmp_path / "of_another_network.npz"
    evaluated(pool, 1, run, which="best", output=best)
    arrays = dict(np.load(best))
    arrays["logits"] = arrays["logits"] + np.arange(10, dtype=np.float32)
    np.savez(best, **arrays)
    order = np.random.default_rng(0).permutation(301)
    mixed = tmp_path / "in_another_order.npz"
    np.savez(mixed, **{name: array[order] for name, array in arrays.items()})
    foreign = tmp_path / "of_another_program.npz"
    np.savez(foreign, logits=arrays["logits"], labels=arrays["labels"].astype(np.uint32))
    for fit in (file, best, mixed):
        message = evaluated(pool, 1, run, fit=fit)
        assert f"--fit {fit}: 301 of its samples are among those that are measured" in message
    message = evaluated(pool, 1, run, fit=foreign)
    assert f"--fit {foreign}: its labels are those of what is measured, {run} (last)" in message
    np.savez(mixed, **arrays | {"pskd_samples": np.arange(301)})
    assert "`pskd_samples` is not what `pskd evaluate` writes" in evaluated(pool, 1, run, fit=mixed)


def test_as_many_samples_of_each_class_in_order_may_be_others(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("test", "validation"):
        labels = np.repeat(np.arange(5), 10)
        logits = rng.normal(size=(50, 5)) + 2 * np.eye(5)[labels]
        np.savez(tmp_path / f"{name}.npz", logits=logits, labels=labels)
    words = ["evaluate", "--logits", str(tmp_path / "test.npz"), "--fit"]
    assert main([*words, str(tmp_path / "validation.npz")]) == 0, capsys.readouterr().err
    assert main([*words, str(tmp_path / "test.npz")]) == 1
    assert "50 of its samples are among those that are measured" in capsys.readouterr().err


def test_the_table_says_what_was_evaluated(pool, run, folder):
    told = table(evaluated(pool, 1, run))
    assert f"Of {run} (last) on digits, 301 held out: 301 samples, 10 classes" in told
    photos = folder / "photos"
    told = table(evaluated(pool, 1, folder / "two.pth", model="resnet18", flags=flags_for(photos)))
    assert f"Of {folder / 'two.pth'} on imagefolder {photos}: 26 samples, 2 classes" in told


@pytest.mark.parametrize(
    "name", ["result.json", "preprocessing.json", "ds_config.json", "models/checkpoint_2.pth"]
)
def test_a_damaged_file_of_a_run_is_named(pool, run, tmp_path, name):
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged, ignore=shutil.ignore_patterns("checkpoints", "store"))
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    message = evaluated(pool, 1, damaged)
    assert isinstance(message, str)
    assert message.startswith(f"{damaged / name} ")
    if name != "ds_config.json":
        assert message.endswith(
            f"Remove it: `train.py --run.dir {damaged}` writes it again, without training again "
            "what is trained."
        )


def test_an_unfinished_run_says_what_it_has(pool, run, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "result.json").unlink()
    status = json.loads((unfinished / "status.json").read_text())
    status.update(state="stopped", epoch=0)
    (unfinished / "status.json").write_text(json.dumps(status))
    message = evaluated(pool, 2, unfinished)
    assert message.startswith(f"{unfinished} is not complete (stopped in epoch 1 of 2), so")
    assert f"`train.py --run.dir {unfinished}` resumes it. Or evaluate --weights best" in message
    expected = {name: result(run)["best"][name] for name in MEASURES}
    assert evaluated(pool, 1, unfinished, which="best").raw.measures == expected
    status.update(state="complete", epoch=2)
    (unfinished / "status.json").write_text(json.dumps(status))
    message = evaluated(pool, 1, unfinished)
    assert message.startswith(f"{unfinished} is complete, but its result.json is gone")
    assert f"`train.py --run.dir {unfinished}` writes it again" in message
    assert " of 2" not in message
    (unfinished / "status.json").write_text("")
    assert "is not complete (of unknown state), so" in evaluated(pool, 1, unfinished)
    (unfinished / "models" / "checkpoint_best.pth").unlink()
    message = evaluated(pool, 1, unfinished)
    assert "is not complete (of unknown state; it has no result.json yet)" in message
    assert "--weights best" not in message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """13 photos of each of two classes, and the state dict of a network that has seen none."""
    path = tmp_path_factory.mktemp("folder")
    make_folder(path / "photos" / "val", classes=2, per_class=13, seed=1, median_side=60)
    torch.manual_seed(0)
    torch.save(models.build("resnet18", 2).state_dict(), path / "two.pth")
    torch.save(models.build("resnet18", 3).state_dict(), path / "three.pth")
    return path


def flags_for(folder, *more):
    sizes = ["--data.image_size=32", "--data.validation_resize=40", "--evaluation.batch_size=8"]
    return ["--data.name=imagefolder", f"--data.root={folder}", *sizes, "--run.threads=1", *more]


def test_foreign_weights_on_a_folder_have_one_result_on_any_number_of_ranks(pool, folder, tmp_path):
    """Of val/ alone, and of a folder of classes; no sample twice, none left out."""
    found = []
    for world, root in ((1, "photos"), (2, "photos/val")):
        file = tmp_path / f"{len(found)}.npz"
        asked = {"flags": flags_for(folder / root), "model": "resnet18", "output": file}
        each = evaluated(pool, world, folder / "two.pth", **asked)
        found.append((replace(each, source=""), file.read_bytes()))
    assert found[0] == found[1]
    assert found[0][0].samples == 26
    with np.load(file) as arrays:
        assert arrays["labels"].tolist() == [0] * 13 + [1] * 13


def test_a_share_of_other_data_is_fitted_on_and_not_measured(pool, folder):
    asked = {"flags": flags_for(folder / "photos"), "model": "resnet18", "fit_on": "0.5"}
    found = evaluated(pool, 1, folder / "two.pth", **asked)
    if isinstance(found, str):  # a network that has learnt nothing may be worse than chance
        assert f"no temperature fits the 13 samples of {folder / 'two.pth'} on imagefolder" in found
        assert "(a share of 0.5): " in found
    else:
        assert found.samples == 13
        assert found.fitted_on.startswith(f"13 samples of {folder / 'two.pth'} on imagefolder")
        assert found.fitted_on.endswith("(a share of 0.5)")


def test_other_classes_and_folders_without_images_are_refused(pool, run, folder, tmp_path):
    asked = {"flags": flags_for(folder / "photos"), "model": "resnet18"}
    message = evaluated(pool, 1, folder / "three.pth", **asked)
    assert "tells 3 classes apart, but data.name imagefolder has 2" in message
    message = evaluated(pool, 2, run, flags=flags_for(folder / "photos"))
    assert "tells 10 classes apart, but data.name imagefolder has 2" in message
    empty = tmp_path / "empty"
    empty.mkdir()
    message = evaluated(pool, 1, folder / "two.pth", model="resnet18", flags=flags_for(empty))
    assert f"{empty} has no class folders" in message


def test_classes_in_another_order_are_refused_and_other_names_are_said(caplog):
    section = DataSection(name="imagefolder")
    with pytest.raises(PskdError, match="in another order: class 1 is 'cat' to it and 'dog' in"):
        subject._check_names(["ant", "cat", "dog"], ("ant", "dog", "cat"), "RUN", section)
    assert not caplog.messages
    subject._check_names(["ant", "cat"], ("0", "cat"), "RUN", section)
    assert "matched by number: class 0 is 'ant' to it and '0' in the data" in caplog.text
    subject._check_names(["ant", "cat"], ("ant", "cat"), "RUN", section)
    assert len(caplog.messages) == 1


def test_images_of_a_folder_are_normalised_as_the_network_was_trained():
    about = {"mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}
    judged = Subject(torch.nn.Identity(), 2, about, None)
    pixels = torch.rand(2, 3, 4, 4)

    def normal(mean, std):
        mean, std = (torch.tensor(list(v))[:, None, None] for v in (mean, std))
        return (pixels - mean) / std

    images = normal(colour.MEAN, colour.STD)
    expected = normal(about["mean"], about["std"])
    torch.testing.assert_close(renormalised(judged, None, images), expected)
    same = replace(judged, preprocessing={"mean": list(colour.MEAN), "std": list(colour.STD)})
    assert renormalised(same, None, images) is images


# --- the command


@pytest.mark.slow
def test_several_ranks_print_one_json_object(run):
    done = launched(2, str(run), "--json", "--bootstrap", "100")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = {name: result(run)["last"][name] for name in MEASURES}
    assert {name: found[name] for name in MEASURES} == expected
    assert found["bootstrap"] == {"resamples": 100, "seed": 0}
    assert set(found["intervals"]) == set(MEASURES)
    assert done.stderr == ""


@pytest.mark.slow
def test_a_refusal_is_said_once_and_ends_all_ranks(run, tmp_path):
    for words in (
        [str(tmp_path)],
        [str(run), "--fit-on", "held-out"],
        [str(run), "--optimizer.lr=1"],
    ):
        done = launched(2, *words)
        assert done.returncode != 0
        assert done.stdout == ""
        assert done.stderr.count("error: ") == 1, done.stderr


def launched(processes, *words):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "pskd.cli", "evaluate", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "nothing is named"),
        (["--weights", "x.pth"], "--weights x.pth lacks --model NAME, the network that it holds."),
        (["{run}", "--logits", "x.npz"], "RUN | FILE.pth and --logits FILE.npz are named"),
        (["--model", "resnet18"], "--model resnet18 needs its weights"),
        (["{run}", "--weights", "x.pth"], "use last or best"),
        (["{run}/models/checkpoint_2.pth", "--weights", "best"], "leave it out"),
        (["--logits", "x.npz", "--data.name", "digits"], "--data.name=digits means nothing"),
        (["--logits", "x.npz", "--output", "y.npz"], "--output y.npz means nothing"),
        (["--logits", "x.npz", "--fit-on", "held-out"], "needs a run"),
        (["--logits", "x.npz", "--fit-on", "2"], "--fit-on is 2"),
        (["--logits", "x.npz", "--bins", "0"], "--bins is 0"),
        (["--logits", "x.npz", "--bootstrap", "-1"], "--bootstrap is -1"),
        (["--logits", "x.npz", "--bootstrap", "1"], "use 0 (no intervals), or 100 or more"),
        (["{run}", "--optimizer.lr", "1"], "does not read it"),
        (["{run}", "--data.nam", "x"], "Did you mean 'data.name'?"),
        (["{run}", "--data.name", "cifra10"], "did you mean 'cifar10'?"),
        (["nowhere"], "nowhere: no such run or file"),
        (["{run}/models"], "is no run directory"),
        (["--model", "resnet18", "--weights", "{run}/evaluation.npz"], "holds no weights"),
        (["--model", "resnet18", "--weights", "{run}/models/checkpoint_2.pth"], "--data.name NAME"),
        ([str(ROOT / "README.md")], f"{ROOT / 'README.md'} holds no weights"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(run, capsys, words, part):
    assert main(["evaluate", *(word.format(run=run) for word in words)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert part in captured.err


def test_other_commands_take_no_settings(run, capsys):
    with pytest.raises(SystemExit):
        main(["export", str(run), "--data.name", "digits"])
    refused = "only evaluate, inspect, doctor take settings such as --data.name=digits"
    assert refused in capsys.readouterr().err


def test_a_file_is_evaluated_with_intervals_and_temperature(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("test", "fit"):
        labels = rng.integers(0, 6, 200)
        logits = rng.normal(size=(200, 6)) + 2 * np.eye(6)[labels]
        np.savez(tmp_path / name, logits=3 * logits, labels=labels)
    test, fit = str(tmp_path / "test.npz"), str(tmp_path / "fit.npz")
    assert main(["evaluate", "--logits", test, "--fit", fit]) == 0
    out = capsys.readouterr().out
    assert "95 % interval" in out
    assert "T minimises the NLL of 200 samples of --fit" in out
    assert "the middle 95 % of 1000 bootstrap resamples of the samples, seed 0" in out
    assert main(["evaluate", "--logits", test, "--fit-on", "0.25", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["temperature"] > 1
    assert found["scaled"]["top1_error"] == found["top1_error"]
    assert "intervals" not in found
    assert main(["evaluate", "--logits", test, "--fit", test]) == 1
    assert "200 of its samples are among those that are measured" in capsys.readouterr().err
    np.savez(fit, logits=np.zeros((3, 4)), labels=np.zeros(3, int))
    assert main(["evaluate", "--logits", test, "--fit", fit]) == 1
    assert "has 4 classes" in capsys.readouterr().err
