"""The scripts around recipes: a table reproduced, Tiny-ImageNet unpacked."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from pskd import recipe
from pskd.cli import main
from pskd.command_line import load
from pskd.data.index import load_or_build
from pskd.data.index_check import check_same_classes
from tests.launches import ROOT, result, status
from tests.photos import make_folder


def run_script(*arguments, **environment):
    return subprocess.run(
        [str(ROOT / "scripts" / arguments[0]), *map(str, arguments[1:])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- reproduce.sh --------------------------------------------------------------------------------


def printed(*arguments):
    done = run_script("reproduce.sh", arguments[0], "--print", *arguments[1:])
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if "--recipe" in line]


def flags_of(command):
    return command[command.index("--recipe") :]


def test_a_whole_table_is_printed_as_commands_that_are_accepted():
    commands = printed("cifar100", "--seeds", "0 7", "--root", "some where")
    names = recipe.table("cifar100")
    assert len(commands) == 2 * len(names)
    for command, name in list(zip(commands[::2], names, strict=True))[::5]:
        assert command[:2] == ["scripts/torchrun.sh", "--"]
        config = load(flags_of(command))
        assert (config.run.recipe, config.train.seed) == (name, 0)
        assert config.run.dir == f"some where/{name}-seed0"
        if name.endswith("tfkd_self"):
            base = name.replace("tfkd_self", "baseline")
            assert config.method.teacher == f"some where/{base}-seed0"
            assert names.index(base) < names.index(name)  # trained before it teaches
    assert [command[command.index("--train.seed") + 1] for command in commands[:2]] == ["0", "7"]


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (
            "--nodes 2 --node-rank 1 --master node0:29511 --processes 8",
            "scripts/torchrun.sh --nodes 2 --node-rank 1 --master node0:29511 --processes 8 --",
        ),
        ("--launcher deepspeed --hostfile hosts", "scripts/deepspeed.sh --hostfile hosts --"),
        ("--launcher python", "bin/python train.py"),
    ],
)
def test_nodes_and_launcher_are_options(options, start):
    (command,) = printed(
        "imagenet-resnet152-pskd", "--seeds", "0", *options.split(), "--", "--data.root", "a b"
    )
    assert start in " ".join(command)
    assert load(flags_of(command)).data.root == "a b"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "scripts/reproduce.sh TABLE"),
        (("cifar100", "--seed", "0"), "unknown option --seed"),
        (("cifar100", "--seeds"), "--seeds needs a value"),
        (("cifar100", "--seeds", "0,1", "--print"), "--seeds 0,1: give whole numbers, parted by"),
        (("--nope",), "TABLE comes first"),
        (("cifar100", "--launcher", "mpirun"), "use torchrun, deepspeed or python"),
        (("cifar100", "--nodes", "2"), "--nodes 2 needs --master"),
        (("cifar100", "--launcher", "python", "--nodes", "2"), "python takes no --nodes"),
        (("cifar1000", "--print"), "recipe 'cifar1000' is unknown"),
    ],
)
def test_bad_options_are_refused(arguments, says):
    done = run_script("reproduce.sh", *arguments)
    assert done.returncode != 0
    assert says in done.stdout + done.stderr


def test_a_table_is_trained_resumed_and_set_beside_the_published_one(tmp_path):
    flags = ("--train.epochs=1", "--schedule.milestones=[]", "--run.threads=1")
    arguments = ("digits-pskd", "--seeds", "0 1", "--root", tmp_path, "--launcher", "python", "--")
    done = run_script("reproduce.sh", *arguments, *flags)
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / f"digits-pskd-seed{seed}" for seed in (0, 1)]
    table = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [[cell.strip() for cell in row[:2]] for row in table[2:]] == [
        ["digits-pskd, schedule.milestones [], train.epochs 1", "2"]
    ]
    errors = [result(run)["last"]["top1_error"] for run in runs]
    assert table[2][2].split()[0] == f"{sum(errors) / 2:.2f}"
    # Again: what is complete is not started, what is not goes on.
    stamps = [(run / "env.json").stat().st_mtime_ns for run in runs]
    (runs[1] / "status.json").write_text(json.dumps({**status(runs[1]), "state": "stopped"}))
    again = run_script("reproduce.sh", *arguments, *flags)
    assert again.returncode == 0, again.stderr
    touched = [(run / "env.json").stat().st_mtime_ns for run in runs]
    assert [new != old for new, old in zip(touched, stamps, strict=True)] == [False, True]
    assert again.stdout.splitlines()[-3:] == done.stdout.splitlines()[-3:]


# --- torchrun.sh, deepspeed.sh -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "options", "says"),
    [
        ("torchrun.sh", "", "scripts/torchrun.sh [options]"),
        ("torchrun.sh", "--nodes 2 -- --run.dir x", "--nodes 2 needs --master"),
        ("torchrun.sh", "--nodes 2 --master a -- --run.dir x", "needs --node-rank R"),
        ("torchrun.sh", "--recipe digits-pskd", "flags of train.py go behind --"),
        ("torchrun.sh", "-- --recipe digits-pskd", "need --run.dir"),
        ("torchrun.sh", "--nodes 2 --master a --rendezvous mpi -- --run.dir x", "static or c10d"),
        (
            "torchrun.sh",
            "--nodes 2 --master nowhere.invalid --rendezvous c10d -- --run.dir x",
            "the master nowhere.invalid cannot be reached",
        ),
        ("deepspeed.sh", "", "scripts/deepspeed.sh [options]"),
        ("deepspeed.sh", "-- --recipe digits-pskd", "need --run.dir"),
        ("deepspeed.sh", "--no-ssh -- --run.dir x", "need --hostfile"),
        ("deepspeed.sh", "--hostfile missing -- --run.dir x", "missing cannot be read"),
        ("deepspeed.sh", "--hostfile {empty} -- --run.dir x", "names no node"),
        ("deepspeed.sh", "--hostfile {hosts} --no-ssh -- --run.dir x", "needs --node-rank R"),
        ("deepspeed.sh", "--hostfile {hosts} --node-rank 1 -- --run.dir x", "goes with --no-ssh"),
        ("deepspeed.sh", "--hostfile {hosts} --processes 2 -- --run.dir x", "leave --processes"),
        (
            "deepspeed.sh",
            "--hostfile {hosts} --no-ssh --node-rank 1 -- --run.dir x",
            "no address is known for nowhere.invalid",
        ),
    ],
)
def test_launchers_refuse_what_cannot_work(script, options, says, tmp_path):
    (tmp_path / "empty").write_text("# none\n\n")
    (tmp_path / "hosts").write_text("# two\nnowhere.invalid slots=1\nelsewhere.invalid slots=1\n")
    given = options.format(empty=tmp_path / "empty", hosts=tmp_path / "hosts")
    done = run_script(script, *given.split(), PSKD_BIN=str(Path(sys.executable).parent))
    assert done.returncode != 0
    assert says in done.stdout + done.stderr


@pytest.mark.parametrize(
    "name",
    [
        *("torchrun.sh", "deepspeed.sh", "docker.sh", "reproduce.sh", "run_until_done.sh"),
        *("imagenet_from_tars.sh", "tiny_imagenet_from_zip.sh"),
    ],
)
def test_scripts_explain_themselves(name):
    done = run_script(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"scripts/{name}" in done.stdout


def test_what_the_tests_need_is_enough_for_training_and_not_installed_again(tmp_path):
    """Until a requirement changes: then the interpreter is asked for, which is a bad one here."""
    for name in ("setup.sh", "common.sh"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    texts = [(tmp_path / name).read_bytes() for name in ("pyproject.toml", "requirements.lock")]
    (tmp_path / ".venv").mkdir()
    stamp = tmp_path / ".venv" / ".installed-cu13,report,dev"
    stamp.write_text(f"{hashlib.sha256(b''.join(texts)).hexdigest()}  -\n")

    def set_up(*extras):
        return subprocess.run(
            [tmp_path / "scripts" / "setup.sh", *extras],
            env={**os.environ, "PYTHON": "false", "PSKD_CUDA": "cu13", "PSKD_BIN": ""},
            capture_output=True,
            text=True,
            check=False,
        )

    for extras in ((), ("dev",)):
        done = set_up(*extras)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / "requirements.lock").write_bytes(texts[1] + b"# changed\n")
    assert "false is older than 3.11" in set_up().stderr
    (tmp_path / "requirements.lock").write_bytes(texts[1])
    stamp.rename(stamp.with_name(".installed-cu13,report"))
    assert set_up().returncode == 0
    assert "false is older than 3.11" in set_up("dev").stderr  # the tests need more


def test_without_slurm_its_script_says_who_runs_it():
    done = run_script("slurm.sbatch")
    assert done.returncode == 2
    assert "Slurm runs this: sbatch" in done.stderr


# --- compare --by-recipe -------------------------------------------------------------------------


def made_run(path, name, top1, top5=5.0, **settings):
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({"run": {"recipe": name}, **settings}))
    last = {"epoch": 1, "top1_error": top1, "top5_error": top5, "nll": 1, "ece": 2, "aurc": 3}
    (path / "result.json").write_text(json.dumps({"last": last, "best": last}))
    return str(path)


def test_mean_deviation_and_published_figure_of_each_recipe(tmp_path, capsys):
    runs = [
        made_run(tmp_path / f"{k}", "cifar100-preact_resnet18-pskd", top1)
        for k, top1 in enumerate((20.0, 21.0, 22.0))
    ]
    runs.append(made_run(tmp_path / "one", "digits-pskd", 3.0, top5=None))
    assert main(["compare", "--by-recipe", *runs]) == 0
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert rows[2][:4] == [
        "cifar100-preact_resnet18-pskd",
        "3",
        "21.00 ± 1.00 (20.82)",
        "5.00 ± 0.00 (5.10)",
    ]
    assert rows[3][:4] == ["digits-pskd", "1", "3.00", "-"]


def test_only_runs_that_differ_in_their_seed_make_a_mean(tmp_path, capsys):
    recipe = "digits-pskd"
    method = {"name": "pskd", "alpha_T": 0.8}
    runs = [
        made_run(
            tmp_path / f"{k}",
            recipe,
            10.0 + k,
            train={"seed": seed, "epochs": epochs},
            data={"name": "digits", "held_out": held_out},
            method=method,
        )
        for k, (seed, epochs, held_out) in enumerate([(0, 2, 0), (1, 2, 0), (0, 4, 0), (1, 4, 100)])
    ]
    assert main(["compare", "--by-recipe", *runs]) == 0
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert [row[:3] for row in rows[2:]] == [
        [f"{recipe}, train.epochs 2", "2", "10.50 ± 0.71"],
        [f"{recipe}, train.epochs 4", "1", "12.00"],
        [f"{recipe}, data.held_out 100, train.epochs 4", "1", "13.00"],
    ]
    assert main(["compare", "--by-recipe", *runs, made_run(tmp_path / "x", recipe, 1.0)]) == 0
    taught = [
        made_run(
            tmp_path / f"taught {seed}",
            "fashion-mnist-2k-tfkd_self",
            5.0,
            train={"seed": seed},
            method={"name": "tfkd_self", "teacher": f"runs/baseline-seed{seed}"},
        )
        for seed in (0, 1)
    ]
    capsys.readouterr()
    assert main(["compare", "--by-recipe", *taught]) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert row.startswith("| fashion-mnist-2k-tfkd_self | 2 ")
    again = made_run(tmp_path / "again", recipe, 1.0, train={"seed": 1, "epochs": 2}, method=method)
    assert main(["compare", "--by-recipe", *runs, again]) == 1
    assert f"{runs[1]} and {again} are runs of one recipe" in capsys.readouterr().err


def test_a_run_without_a_recipe_is_named(tmp_path, capsys):
    assert main(["compare", "--by-recipe", made_run(tmp_path / "run", None, 1.0)]) == 1
    assert f"{tmp_path / 'run'} began with no recipe" in capsys.readouterr().err


# --- Tiny-ImageNet -------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    """The archive, small: two classes of three images, four for validation."""
    source = tmp_path / "source"
    make_folder(source, classes=2, per_class=5, median_side=64)
    images = sorted(source.rglob("*.JPEG"))
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for k, image in enumerate(images[:6]):
            wnid = f"n0{k % 2}"
            name = f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{k}.JPEG"
            archive.writestr(name, image.read_bytes())
            boxes = f"tiny-imagenet-200/train/{wnid}/{wnid}_{k}_boxes.txt"
            archive.writestr(boxes, "0 0 1 1")
        lines = []
        for k, image in enumerate(images[6:]):
            archive.writestr(f"tiny-imagenet-200/val/images/val_{k}.JPEG", image.read_bytes())
            lines.append(f"val_{k}.JPEG\tn0{(k + 1) % 2}\t0\t0\t62\t62")
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "\n".join(lines) + "\n")
    return path


def unpack_tiny(path, out):
    pskd = f"{sys.executable} -m pskd.cli"
    return run_script("tiny_imagenet_from_zip.sh", path, out, PSKD=pskd)


def test_tiny_imagenet_is_unpacked_and_indexed(tiny, tmp_path):
    out = tmp_path / "a b" / "tiny"
    done = unpack_tiny(tiny, out)
    assert done.returncode == 0, done.stderr
    train, validation = load_or_build(out / "train"), load_or_build(out / "val")
    assert train.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert validation.labels_N.tolist() == [0, 0, 1, 1]
    check_same_classes(train, validation)
    assert sorted(p.name for p in out.parent.iterdir()) == ["tiny"]
    assert "is there already" in unpack_tiny(tiny, out).stderr


def test_a_damaged_archive_of_tiny_imagenet_is_named(tiny, tmp_path):
    out = tmp_path / "tiny"
    half = tmp_path / "half.zip"
    half.write_bytes(tiny.read_bytes()[:-200])
    done = unpack_tiny(half, out)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {half} cannot be unpacked")
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme", "hello")
    assert "is not Tiny-ImageNet" in unpack_tiny(other, out).stderr
    assert not out.exists()
    assert not list(tmp_path.glob("tiny.*"))
