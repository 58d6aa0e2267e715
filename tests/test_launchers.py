"""The same command under every launcher: the same weights to the bit."""

import os

import pytest
import torch

from pskd.errors import PskdError
from pskd.world import choose_device
from tests.launches import result, train

BRIEF = ("--recipe=digits-pskd", "--train.epochs=2", "--schedule.milestones=[1]")


def weights(run_dir, *flags, **options):
    job = train(run_dir, *BRIEF, *flags, **options)
    assert job.process.returncode == 0, job.output()
    return result(run_dir)["weights_sha256"]


@pytest.mark.slow
def test_one_rank_trains_the_same_bits_under_python_torchrun_and_deepspeed(tmp_path):
    # The launchers export thread counts of their own; ours is what counts.
    plain = {"processes": None, "env": {"OMP_NUM_THREADS": "2"}}
    expected = weights(tmp_path / "python", **plain)
    assert weights(tmp_path / "torchrun", processes=1) == expected
    assert weights(tmp_path / "deepspeed", processes=1, launcher="deepspeed") == expected


def test_two_ranks_train_the_same_bits_under_torchrun_and_deepspeed(tmp_path):
    expected = weights(tmp_path / "torchrun", processes=2)
    assert weights(tmp_path / "deepspeed", processes=2, launcher="deepspeed") == expected


@pytest.mark.parametrize(("local_rank", "gpus", "device"), [(0, 0, "cpu"), (1, 2, "cuda:1")])
def test_each_rank_has_a_gpu_where_there_are_some(local_rank, gpus, device):
    assert choose_device(local_rank, 2, gpus) == torch.device(device)


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(PskdError, match=r"3 ranks on a node with 2 GPUs. Start at most 2 "):
        choose_device(2, 3, 2)


def test_no_launcher_variable_is_needed():
    assert "RANK" not in os.environ  # or the plain python above would not be plain
