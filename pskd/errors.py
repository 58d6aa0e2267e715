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
