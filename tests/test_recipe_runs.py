"""Every recipe trains two steps with its real network: small images, small batches, one process."""

import shutil

import pytest
import torch

from pskd import models, recipe
from pskd.store import open_generation
from pskd.weights import export_weights
from tests.forked import train
from tests.launches import metrics, result
from tests.photos import make_folder

SMALL = (
    "--train.epochs=1",
    "--train.batch_size=4",
    "--schedule.milestones=[]",
    "--optimizer.lr=0.001",  # batches of four are noisy
    "--data.limit=8",
    "--data.held_out=4",
    "--run.threads=2",
)
ARRAYS = ("--data.name=digits", "--data.pad_to=0", "--data.crop_padding=1")
SIDES = {"imagenet": 32, "tiny": 32}  # pixels; bfloat16 is slow on a CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of ten classes."""
    root = tmp_path_factory.mktemp("photos")
    make_folder(root / "train", classes=10, per_class=2, median_side=80)
    return root


def small_data(name, folder):
    """Flags that give a recipe little data of its own kind; digits have ten classes as well."""
    side = SIDES.get(name.partition("-")[0])
    if side is None:
        return ARRAYS
    return (
        f"--data.root={folder}",
        f"--data.image_size={side}",
        f"--data.validation_resize={side}",
        "--data.threads=1",
    )


LARGE = ("resnext29", "a240", "densenet", "resnet101", "resnet152", "tiny")  # 10 s or more each


def in_every_run(name):
    """Each method with the small networks; the rest is slow."""
    small = ("preact_resnet18" in name or "fashion-mnist-2k" in name) and "tiny" not in name
    return small or (name.endswith("-pskd") and not any(part in name for part in LARGE))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if in_every_run(name) else pytest.mark.slow)
        for name in recipe.names()
    ],
)
def test_two_steps(name, folder, tmp_path):
    run_dir = tmp_path / "run"
    flags = [*SMALL, *small_data(name, folder)]
    if name.endswith("tfkd_self"):
        model = recipe_model(name)
        torch.manual_seed(1)
        export_weights(tmp_path / "teacher.pth", models.build(model, 10), {})
        flags.append(f"--method.teacher={tmp_path / 'teacher.pth'}")
    job = train(run_dir, f"--recipe={name}", *flags, processes=None)
    assert job.process.returncode == 0, job.output()
    (line,) = metrics(run_dir)
    assert line["train_loss"] > 0
    assert result(run_dir)["last"] == line
    if "-pskd" in name and not name.endswith("-model"):
        assert open_generation(run_dir / "store/gen-000000").present_N.sum() == 8
    shutil.rmtree(tmp_path)  # up to a gigabyte of weights and momentum


def recipe_model(name):
    sections = [part.sections for part in recipe.read(name).parts]
    return [s["model"]["name"] for s in sections if "model" in s][-1]
