"""What CONTRIBUTING.md adds from outside: its blocks are the files, its commands run."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pskd.command_line import load
from pskd.data.catalog import DATASETS
from pskd.methods.sections import METHODS
from pskd.models import MODELS
from pskd.store import open_generation
from pskd.store.registry import ENCODINGS
from tests.launches import DEADLINE_S, ROOT, metrics, result, status
from tests.refusals import refusal

DICTIONARIES = (DATASETS, MODELS, METHODS, ENCODINGS)

SECTION = (ROOT / "CONTRIBUTING.md").read_text().partition("## Add your own")[2]
FILES = {
    name: text
    for text, name in re.findall(r"```(?:python|yaml)\n(# (\S+): .*?)```", SECTION, flags=re.DOTALL)
}
COMMANDS = "".join(re.findall(r"```bash\n(.*?)```", SECTION, flags=re.DOTALL)).splitlines()


def execute(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A line of a shell there, in this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One of the user's own: every file of the section."""
    path = tmp_path_factory.mktemp("mine")
    for name, text in FILES.items():
        (path / name).write_text(text)
    return path


@pytest.fixture(scope="module")
def trained(folder):
    """The output of each command, in order."""
    outputs = []
    for command in COMMANDS:
        done = execute(folder, command)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    return outputs


def test_the_section_shows_one_of_each_and_how_they_are_run():
    recipe = yaml.safe_load(FILES["mine.yaml"])
    named = {recipe["data"]["name"], recipe["model"]["name"], recipe["method"]["name"]}
    named |= {recipe["store"]["encoding"]}
    assert {f"{name}.py" for name in named} | {"mine.py", "mine.yaml"} == set(FILES)
    assert len(named) == 4
    assert len(COMMANDS) == 2


def test_a_run_trains_with_all_of_them(folder, trained):
    run = folder / "runs" / "mine"
    assert status(run)["state"] == "complete"
    assert [line["epoch"] for line in metrics(run)] == [0, 1, 2]
    assert result(run)["last"]["top1_error"] < 10
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["method"] == {"name": "looking_back", "weight": 0.2}
    (verified, *_) = (line for line in trained[1].splitlines() if line.startswith("ok"))
    assert verified


@pytest.fixture
def entries(folder, monkeypatch):
    """As in mine.py, for this process and one test."""
    before = [dict(entries) for entries in DICTIONARIES]
    monkeypatch.syspath_prepend(folder)
    for name in FILES:
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    importlib.import_module("mine")
    yield
    for entries, old in zip(DICTIONARIES, before, strict=True):
        entries.clear()
        entries.update(old)


def test_its_rows_are_those_of_the_encoding(folder, trained, entries):
    generation = open_generation(folder / "runs" / "mine" / "store" / "gen-000002")
    assert {segment.header.encoding for segment in generation.segments} == {"linear8"}
    rows = generation[np.arange(500)]
    assert rows.sum(dim=1).sub(1).abs().max() < 1e-6
    assert (rows.argmax(dim=1).numpy() == np.arange(500) % 3).mean() > 0.9


def test_a_past_prediction_reaches_the_loss(folder, trained):
    """From the second epoch on; without the pull, the run is another one."""
    command = COMMANDS[0].replace("runs/mine", "runs/alone") + " --method.weight=0"
    done = execute(folder, command)
    assert done.returncode == 0, done.stdout + done.stderr
    with_pull, alone = (
        [line["train_loss"] for line in metrics(folder / "runs" / name)]
        for name in ("mine", "alone")
    )
    assert with_pull[0] == alone[0]
    assert with_pull[1] != alone[1]


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--method.wieght=1", "Did you mean 'method.weight'?"),
        ("--method.name=loking_back", "did you mean 'looking_back'?"),
        ("--store.encoding=linear9", "did you mean 'linear8'?"),
        ("--data.name=stripe", "did you mean 'stripes'?"),
        ("--model.name=two_layer", "did you mean 'two_layers'?"),
        ("--data.image_size=64", "only data.name imagefolder"),
    ],
)
def test_mistakes_are_met_as_with_what_is_built_in(folder, entries, flag, says):
    config = f"--config={folder / 'mine.yaml'}"
    assert load([config]).method.weight == 0.2
    assert says in refusal(load, [config, flag])


def test_without_the_entries_their_names_are_unknown(folder):
    says = refusal(load, [f"--config={folder / 'mine.yaml'}"])
    assert says.startswith("method.name 'looking_back' is unknown")
