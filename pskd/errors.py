"""What the program says when it stops."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75  # stopped on request, resumable (EX_TEMPFAIL of sysexits.h)


class PskdError(Exception):
    """A refusal or failure that a user can act on: names the thing, the value and the remedy.

    Raised by the rank that knows. The entry point prints it once, without a traceback.
    """


class AgreedError(PskdError):
    """The same failure, known on every rank: rank 0 prints it, all end with exit code 1."""


class CommonError(PskdError):
    """What other ranks are about to meet as well, each for itself: the first of them speaks."""


class DamagedError(PskdError):
    """A file is missing, cut short or not what it was, so an older one may have to do.

    what: the file and its defect, without what to do about it.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} {remedy}")
        self.what = what
        self.remedy = remedy


class AgreedDamage(AgreedError):
    """A `DamagedError` of one rank, known on every rank."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what} {remedy}")
        self.what = what


def explained(error: OSError) -> str:
    """What the system refused, for a user."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"{what}. Start again when it is mended."


@contextmanager
def together(gather: Callable[[Any], list[Any]]) -> Iterator[None]:
    """Run a block that may fail on some ranks: if it fails on one, it fails on all.

    gather: every rank's value, in rank order, on every rank.

    Raises:
        AgreedDamage: some files are damaged, and nothing else is wrong.
        AgreedError: the message of the lowest rank that failed otherwise, on every rank.
    """
    failure: tuple[str, ...] = ()
    try:
        yield
    except DamagedError as error:
        failure = (error.what, error.remedy)
    except PskdError as error:
        failure = (str(error),)
    except OSError as error:
        failure = (explained(error),)
    failures = sorted((f for f in gather(failure) if f), key=len)  # stable: by rank
    if not failures:
        return
    if len(failures[0]) > 1:
        raise AgreedDamage(*failures[0])
    raise AgreedError(*failures[0])
