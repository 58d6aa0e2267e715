"""`pskd evaluate`: its arguments and the work. What takes long to import waits until asked for."""

import argparse
from pathlib import Path

from pskd.errors import PskdError
from pskd.fields import at_least, require

_RESAMPLES = 1000
_FEWEST = 100


def add_arguments(evaluate: argparse.ArgumentParser) -> None:
    """To the command's parser; `--data.name=NAME` and the like are taken apart before."""
    evaluate.description = (
        "On the run's own validation data, or on those that --data.name, --data.root and the like "
        "say, as for train.py; alone or under torchrun."
    )
    evaluate.add_argument(
        "source", nargs="?", type=Path, metavar="RUN | FILE.pth", help="a run, or an export of ours"
    )
    evaluate.add_argument("--model", metavar="NAME", help="the network of foreign --weights")
    evaluate.add_argument(
        "--weights",
        metavar="last | best | FILE.pth",
        help="of which epoch (default: last); with --model, a state dict",
    )
    evaluate.add_argument(
        "--logits",
        type=Path,
        metavar="FILE.npz",
        help="no network, but arrays `logits` (N, C) and `labels` (N,)",
    )
    evaluate.add_argument(
        "--bins", type=at_least(1, "--bins"), help="bins of the ECE (default: the run's, or 10)"
    )
    evaluate.add_argument(
        "--bootstrap",
        type=_resamples,
        metavar="B",
        help=f"resamples for 95 %% intervals (default: {_RESAMPLES}; 0 with --json)",
    )
    evaluate.add_argument(
        "--fit-on",
        metavar="held-out | SHARE",
        help="fit a temperature on the samples that the run held out, or on a share of other data",
    )
    evaluate.add_argument(
        "--fit", type=Path, metavar="FILE.npz", help="or on these logits and labels"
    )
    evaluate.add_argument(
        "--output",
        type=Path,
        metavar="FILE.npz",
        help="write logits (float32), labels, and which samples they are",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object only")


def _resamples(text: str) -> int:
    """An argparse type: so few that they tell nothing of an interval are refused."""
    count = at_least(0, "--bootstrap")(text)
    require(
        count == 0 or count >= _FEWEST,
        "--bootstrap",
        count,
        f"use 0 (no intervals), or {_FEWEST} or more, to take the middle 95 % of.",
    )
    return count


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, and print on rank 0. settings: flags of train.py, see evaluation/source.py.

    Raises:
        PskdError: what cannot be evaluated, with the reason.
    """
    _check_one_source(arguments)
    from pskd.evaluation.evaluate import Request, evaluate
    from pskd.evaluation.source import Source
    from pskd.report.evaluation import as_json, table

    source = None
    if arguments.logits is None:
        foreign = arguments.model is not None
        path = Path(arguments.weights) if foreign else arguments.source
        source = Source(path, arguments.weights or "last", arguments.model)
    resamples = arguments.bootstrap
    if resamples is None:  # as JSON the measures alone, unless more is asked for
        resamples = 0 if arguments.json else _RESAMPLES
    request = Request(
        source=source,
        logits=arguments.logits,
        flags=arguments.settings,
        bins=arguments.bins,
        resamples=resamples,
        fit_on=arguments.fit_on,
        fit=arguments.fit,
        output=arguments.output,
    )
    figures = evaluate(request)
    if figures is not None:
        print((as_json if arguments.json else table)(figures))


def _check_one_source(arguments: argparse.Namespace) -> None:
    """One network or file, and nothing that it leaves without effect."""
    named = [
        text
        for text, value in (
            ("RUN | FILE.pth", arguments.source),
            ("--model NAME --weights FILE.pth", arguments.model),
            ("--logits FILE.npz", arguments.logits),
        )
        if value is not None
    ]
    if not named and arguments.weights not in (None, "last", "best"):
        raise PskdError(
            f"--weights {arguments.weights} lacks --model NAME, the network that it holds. An "
            f"export of ours needs neither flag: `pskd evaluate {arguments.weights}`."
        )
    if len(named) != 1:
        what = f"{' and '.join(named)} are" if named else "nothing is"
        raise PskdError(
            f"{what} named: pskd evaluate takes one of RUN, FILE.pth, --model NAME --weights "
            "FILE.pth, or --logits FILE.npz."
        )
    if arguments.logits is not None:
        for flag, value in (("--weights", arguments.weights), ("--output", arguments.output)):
            if value is not None:
                raise PskdError(f"{flag} {value} means nothing with --logits: leave it out.")
        if arguments.settings:
            raise PskdError(f"{arguments.settings[0]} means nothing with --logits: leave it out.")
    elif arguments.model is not None:
        if arguments.weights in (None, "last", "best"):
            raise PskdError(f"--model {arguments.model} needs its weights: --weights FILE.pth.")
    elif arguments.weights not in (None, "last", "best"):
        raise PskdError(
            f"--weights {arguments.weights}: use last or best, or name the network with --model."
        )
    elif arguments.weights is not None and not arguments.source.is_dir():
        raise PskdError(
            f"--weights {arguments.weights} chooses an epoch of a run, and {arguments.source} is "
            "no directory: leave it out."
        )
