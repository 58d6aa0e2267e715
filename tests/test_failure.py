"""What is said of each exception that can end a job, and by whom."""

import errno

import pytest
import torch

from pskd.config import TrainSection
from pskd.errors import AgreedError, CommonError, PskdError
from pskd.failure import repeats, understand

TRAIN = TrainSection(batch_size=96, accumulation=3)


@pytest.mark.parametrize(
    ("error", "parts", "speaker"),
    [
        (AgreedError("all know"), ["all know"], "rank 0"),
        (CommonError("others meet it too"), ["others meet it too"], "first"),
        (PskdError("I know"), ["I know"], "this"),
        (OSError(errno.ENOSPC, "No space left", "a/b"), ["a/b: No space left"], "this"),
        (RuntimeError("Connection closed by peer [::1]\nmore"), ["lost another rank"], "first"),
        (RuntimeError("Timed out waiting 5000ms"), ["lost another rank"], "first"),
        (torch.distributed.DistBackendError("NCCL"), ["lost another rank (NCCL)"], "first"),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            ["train.batch_size 96", "train.accumulation 3", "larger train.accumulation"],
            "this",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            ["out of memory with train.batch_size 96"],
            "this",
        ),
        (KeyboardInterrupt(), ["interrupted"], "first"),
    ],
)
def test_a_failure_is_explained(error, parts, speaker):
    failure = understand(error, TRAIN)
    assert failure.speaker == speaker
    for part in parts:
        assert part in failure.reason


def test_a_defect_of_the_program_comes_with_its_traceback():
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as error:
        reason = understand(error, TRAIN).reason
    assert "test_failure.py" in reason
    assert reason.endswith("ZeroDivisionError: by zero")


def test_ranks_that_share_a_full_disk_say_so_once():
    full = [f"cannot write rank-{r}: No space left on device. Free some space." for r in (0, 1)]
    assert repeats(full[1], full[0])
    assert not repeats(full[1], "lost another rank")
    assert not repeats("checkpoint damaged", full[0])
