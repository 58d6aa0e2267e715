"""The whole on GPUs: train, kill, resume, evaluate, doctor. `scripts/test.sh -m gpu` runs it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.launches import (
    DEADLINE_S,
    ROOT,
    Job,
    assert_same_result,
    cut_back,
    metrics,
    result,
    train,
)

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="no NVIDIA GPU")]

EPOCHS = 3
FLAGS = (
    "--recipe=digits-pskd",
    "--data.limit=512",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[2]",
    "--checkpoint.every_steps=3",
    "--checkpoint.keep=100",
)
# With one GPU a single process; else two, over NCCL.
PROCESSES = min(GPUS, 2)


def trained(run_dir, *flags):
    job = train(run_dir, *FLAGS, *flags, processes=PROCESSES)
    assert job.process.returncode == 0, job.output()
    return run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("gpu") / "run")


def launched(*command):
    """The output of a command of pskd, under torchrun if there are several GPUs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run(
        [sys.executable, *(launcher if PROCESSES > 1 else []), "-m", "pskd.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_training_is_on_the_gpu(finished):
    (start,) = json.loads((finished / "env.json").read_text())
    assert start["facts"]["device"] == torch.cuda.get_device_name(0)
    assert len(metrics(finished)) == EPOCHS


@pytest.mark.parametrize("name", ["000001-00000003", "000002-00000000"])
def test_a_resumed_run_has_the_same_weights(finished, tmp_path, name):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    cut_back(run_dir, name)
    trained(run_dir)
    assert_same_result(run_dir, finished, EPOCHS)


@pytest.mark.parametrize("method", ["baseline", "label_smoothing", "cskd", "tfkd_reg"])
def test_every_method_trains(tmp_path, method):
    run_dir = tmp_path / "run"
    job = Job(
        run_dir,
        "--recipe=digits-baseline",
        *FLAGS[1:],
        f"--method.name={method}",
        processes=PROCESSES,
    )
    assert job.wait() == 0, job.output()
    assert result(run_dir)["last"]["top1_error"] < 90


@pytest.mark.parametrize(
    "flags",
    [
        ("--engine.deepspeed_config=bf16",),
        ("--engine.deepspeed_config=fp16",),
        ("--engine.deepspeed_config=fp32-zero1",),
        ("--engine.channels_last=true", "--optimizer.implementation=fused"),
        ("--engine.tf32=true", "--engine.deterministic=false"),
        ("--engine.compile=true",),
        ("--method.teacher=model",),
        ("--model.ema_decay=0.9", "--evaluation.weights=ema"),
        pytest.param(
            ("--model.sync_batchnorm=true",),
            marks=pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs"),
        ),
    ],
    ids=" ".join,
)
def test_it_trains_with(tmp_path, flags):
    assert result(trained(tmp_path / "run", *flags))["last"]["top1_error"] < 90


def test_evaluate_gives_the_figures_of_the_run(finished):
    found = json.loads(launched("evaluate", str(finished), "--json"))
    last = result(finished)["last"]
    assert found == {key: last[key] for key in found}


def test_doctor_finds_nothing_wrong(tmp_path):
    page = launched("doctor", "--recipe", "digits-pskd", "--run.dir", str(tmp_path / "run"))
    assert "WRONG" not in page
    assert "cuda" in page
