"""What the program says when it stops."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75  # stopped on request, resumable (EX_TEMPFAIL of sysexits.h)


class PskdError(Exception):
    """A refusal or failure that a user can act on: names the thing, the value and the remedy.

    Raised by the rank that knows. The entry point prints it once, without a traceback.
    """


class AgreedError(PskdError):
    """The same failure, known on every rank: rank 0 prints it, all end with exit code 1."""


@contextmanager
def together(gather: Callable[[str | None], list[str | None]]) -> Iterator[None]:
    """Run a block that may fail on some ranks: if it fails on one, it fails on all.

    gather: every rank's value, in rank order, on every rank.

    Raises:
        AgreedError: the message of the lowest rank that failed, on every rank.
    """
    message: str | None = None
    try:
        yield
    except (PskdError, OSError) as error:
        message = str(error)
    first = next((m for m in gather(message) if m is not None), None)
    if first is not None:
        raise AgreedError(first)
