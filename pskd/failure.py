"""What a failure means, and which rank has to say it."""

import errno
import os
import traceback
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from pskd.config import TrainSection
from pskd.errors import AgreedError, CommonError, PskdError, explained

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Failure(NamedTuple):
    """reason: one message for status.json and the log. speaker: who logs it.

    `rank 0`: all ranks know. `this`: only this rank knows. `first`: several ranks see the same
    from outside; the first to write status.json speaks.
    """

    reason: str
    speaker: Literal["rank 0", "this", "first"]


def repeats(reason: str, earlier: str) -> bool:
    """Whether an earlier failure says it already: ranks that share a disk find it full together."""
    return any(os.strerror(e) in reason and os.strerror(e) in earlier for e in _FULL)


def understand(error: BaseException, train: TrainSection) -> Failure:
    """Explain any exception that ends a job. A defect of the program comes with its traceback."""
    text = str(error)
    match error:
        case AgreedError():
            return Failure(text, "rank 0")
        case CommonError():
            return Failure(text, "first")
        case PskdError():
            return Failure(text, "this")
        case KeyboardInterrupt():
            return Failure("interrupted before training began", "first")
        case OSError():
            return Failure(explained(error), "this")
        case RuntimeError() if is_out_of_memory(error):
            return Failure(_out_of_memory(text, train), "this")
        case RuntimeError() if is_lost_peer(error):
            first_line = text.splitlines()[0]
            return Failure(
                f"lost another rank ({first_line}). Nothing that was saved is lost: start again "
                "to resume.",
                "first",
            )
    return Failure("".join(traceback.format_exception(error)).strip(), "this")


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or silent."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _out_of_memory(text: str, train: TrainSection) -> str:
    return (
        f"out of memory with train.batch_size {train.batch_size} and train.accumulation "
        f"{train.accumulation} ({text.splitlines()[0]}). The same batch needs less with a larger "
        "train.accumulation or with more ranks, in a new run."
    )
