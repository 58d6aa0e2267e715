"""What the program says when it stops."""

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75  # stopped on request, resumable (EX_TEMPFAIL of sysexits.h)


class PskdError(Exception):
    """A refusal or failure that a user can act on: names the thing, the value and the remedy.

    Raised by the rank that knows. The entry point prints it once, without a traceback.
    """


class AgreedError(PskdError):
    """The same failure, known on every rank: rank 0 prints it, all end with exit code 1."""


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
