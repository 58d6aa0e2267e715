"""Every command of the README runs: here, or as the main commands of continuous integration."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pskd.command_line import load
from pskd.data.catalog import DATASETS, FOLDER
from tests.photos import make_folder

ROOT = Path(__file__).parents[1]
MAIN = ("scripts/demo.sh", "scripts/test.sh")  # set up the environment; run by .ci/run


def commands() -> list[str]:
    """The lines of the README's shell blocks, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_continuous_integration_runs_the_two_main_commands():
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in MAIN:
        assert command in ci
        assert any(line.split("#")[0].strip() == command for line in commands())


def test_every_other_command_of_the_readme_works(tmp_path):
    others = [line for line in commands() if line.split("#")[0].strip() not in MAIN]
    assert others
    (tmp_path / "scripts").mkdir()
    scripts = [f"scripts/{name}.sh" for name in ("common", "run_until_done", "torchrun")]
    for name in ("train.py", "ds_configs", *scripts):
        (tmp_path / name).symlink_to(ROOT / name)
    table = tmp_path / "scripts" / "reproduce.sh"  # it works in the folder where it lies
    table.write_text(f'exec {ROOT}/scripts/reproduce.sh "$@"')
    table.chmod(0o755)
    environment = tmp_path / ".venv" / "bin"
    environment.mkdir(parents=True)
    # The environment that the tests run in is the one that the scripts have made.
    (environment / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 5)), rng.integers(0, 5, 20)
    np.savez(tmp_path / "logits.npz", logits=logits, labels=labels)
    for split, seed in (("train", 0), ("val", 1)):
        make_folder(tmp_path / "photos" / split, classes=2, per_class=12, seed=seed, median_side=90)
    script = "\n".join(["set -ex", *others])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PSKD_BIN": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| digits " in done.stdout
    assert (tmp_path / "runs/digits/result.json").exists()


def long_commands() -> list[str]:
    """Commands that train for hours: their flags are checked; what they train, other tests do."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("command", long_commands())
def test_the_long_commands_of_the_readme_are_accepted(command):
    launcher, _, flags = command.partition(" train.py ")
    assert launcher == "torchrun --standalone --nproc-per-node 2"
    recipe = load(shlex.split(flags)).run.recipe
    assert recipe is not None
    assert "pskd" in recipe


def test_there_is_one_for_each_data_set():
    named = {
        load(shlex.split(c.partition(" train.py ")[2])).data.name
        for c in [*commands(), *long_commands()]
        if " train.py " in c
    }
    assert named == {*DATASETS, FOLDER}


@pytest.mark.parametrize("name", ["pskd/store/format.py", "scripts/reproduce.sh", "LICENSE"])
def test_files_that_the_readme_names_exist(name):
    assert (ROOT / name).exists()
    assert Path(name).name in (ROOT / "README.md").read_text()
