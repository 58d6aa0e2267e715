"""`pskd evaluate | compare`: what one does beside training."""

import argparse
import json
import math
import sys
from pathlib import Path
from zipfile import BadZipFile

from pskd.errors import EXIT_COMPLETE, EXIT_FAILED, PskdError


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except PskdError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILED
    return EXIT_COMPLETE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pskd", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    evaluate = commands.add_parser("evaluate", help="the measures of saved logits")
    evaluate.add_argument(
        "--logits",
        type=Path,
        required=True,
        metavar="FILE.npz",
        help="arrays `logits` (N, C) and `labels` (N,)",
    )
    evaluate.add_argument("--bins", type=int, default=10, help="bins of the ECE (default: 10)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object only")
    evaluate.set_defaults(run=_evaluate)
    compare = commands.add_parser("compare", help="a table of complete runs")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    compare.set_defaults(run=_compare)
    return parser


def _evaluate(arguments: argparse.Namespace) -> None:
    import numpy as np  # noqa: PLC0415

    from pskd.metrics import summarize  # noqa: PLC0415

    path = arguments.logits
    try:
        with np.load(path, allow_pickle=False) as arrays:
            logits_NC, labels_N = arrays["logits"], arrays["labels"]
        result = summarize(logits_NC, labels_N, arguments.bins)
    except OSError as error:
        raise PskdError(f"--logits {path}: {error.strerror or error}.") from error
    except KeyError as error:
        raise PskdError(f"--logits {path} lacks an array: {error.args[0]}.") from error
    except (ValueError, TypeError, BadZipFile) as error:
        raise PskdError(f"--logits {path}: {error}.") from error
    if arguments.json:
        # JSON has no infinity.
        finite = {k: v if v is None or math.isfinite(v) else None for k, v in result.items()}
        print(json.dumps(finite))
        return
    for name, value in result.items():
        print(f"{name:11} {'-' if value is None else format(value, '.4f')}")


def _compare(arguments: argparse.Namespace) -> None:
    from pskd.report.compare import comparison  # noqa: PLC0415

    print(comparison(arguments.runs))


if __name__ == "__main__":
    sys.exit(main())
