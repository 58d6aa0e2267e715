"""`pskd evaluate`: the predictions of a trained network, or of a file, and their figures.

On any number of ranks: the batches are those that the run itself evaluated in, dealt out whole, so
no figure depends on how many ranks share them.
"""

import dataclasses
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pskd import launch, world
from pskd.config import Config
from pskd.data.sections import described
from pskd.errors import PskdError
from pskd.evaluation.predictions import Figures, Predictions, figures, read, split, write
from pskd.evaluation.source import (
    Settings,
    Source,
    Subject,
    fitting,
    place_of,
    renormalised,
    settings,
    subject,
)
from pskd.failure import is_lost_peer, is_out_of_memory
from pskd.inference import choose_kernels
from pskd.loading import AnyCatalog, agreed_catalog, loader
from pskd.order import validation_ranges
from pskd.world import World

HELD_OUT = "held-out"

_DEFAULT_BINS = 10


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    logits: a file instead of a source. flags: `--section.field=value`. bins: None: the run's.
    fit_on: `held-out`, or a share of the samples. fit: a file of predictions to fit on. output:
    where the predictions go.
    """

    source: Source | None
    logits: Path | None
    flags: list[str]
    bins: int | None
    resamples: int
    fit_on: str | None
    fit: Path | None
    output: Path | None

    @property
    def share(self) -> float | None:
        """Of the samples, to fit on, if the request names one.

        Raises:
            PskdError: what it names is no share.
        """
        if self.fit_on in (None, HELD_OUT):
            return None
        try:
            share = float(str(self.fit_on))
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise PskdError(
                f"--fit-on is {self.fit_on}: use {HELD_OUT}, or a share of the samples above 0 "
                "and below 1."
            )
        return share


def evaluate(request: Request) -> Figures | None:
    """The figures, on rank 0; None on the others.

    Raises:
        PskdError: what cannot be evaluated, with the reason; on all ranks once they are together.
    """
    if request.fit_on is not None and request.fit is not None:
        raise PskdError("--fit-on and --fit both name samples to fit on: leave one out.")
    if request.logits is not None:
        return _of_file(request, request.logits)
    assert request.source is not None
    given = settings(request.source, request.flags)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    here = world.start(given.config.run.timeout_s)
    try:
        found = on_ranks(request, request.source, given, here)
    except RuntimeError as error:
        if is_lost_peer(error):
            reason = str(error).splitlines()[0]
            raise PskdError(f"lost another rank ({reason}). Start again.") from error
        if is_out_of_memory(error):
            raise PskdError(
                f"out of memory with evaluation.batch_size {given.config.evaluation.batch_size}: "
                "use a smaller one."
            ) from error
        raise
    world.stop(here)
    return found


def _of_file(request: Request, path: Path) -> Figures | None:
    """Without ranks: the first does it."""
    share = request.share
    if request.fit_on == HELD_OUT:
        raise PskdError("--fit-on held-out needs a run. With --logits, name --fit FILE.npz.")
    if launch.rank() > 0:
        return None
    predictions = read(path, "--logits")
    fit = None if request.fit is None else read(request.fit, "--fit")
    if share is not None:
        fit, predictions = split(predictions, share)
    bins = request.bins or _DEFAULT_BINS
    return figures(predictions, fit, bins=bins, resamples=request.resamples)


def _check_split(request: Request, given: Settings) -> None:
    """A temperature is never fitted on what is measured."""
    share = request.share
    if request.fit_on == HELD_OUT:
        if given.held_out is None:
            raise PskdError(
                f"--fit-on held-out: {request.source} held out no samples. Train with "
                "--data.held_out K, or name --fit FILE.npz with predictions for others."
            )
        if given.own and given.config.data.held_out:
            raise PskdError(
                "--fit-on held-out: these samples are the ones that are measured. Measure the "
                "test split: --data.held_out 0."
            )
    if share is not None and given.own:
        raise PskdError(
            f"--fit-on {share} would fit on the samples that the run is judged by. Use --fit-on "
            "held-out with a run of --data.held_out K, or --fit FILE.npz."
        )


def on_ranks(request: Request, source: Source, given: Settings, here: World) -> Figures | None:
    """Collective: `evaluate` for a network. given: from `settings`.

    Raises:
        AgreedError: as `evaluate`, on every rank.
    """
    with here.together():
        _check_split(request, given)
    config = given.config
    shares, threads = place_of(source)
    world.set_threads(config.run.threads or threads, here)
    choose_kernels(here.device, tf32=config.engine.tf32, deterministic=config.engine.deterministic)
    with here.together():
        judged = subject(source, given)
        judged.network.to(here.device).to(memory_format=judged.inference.layout)
    predictions = _predict(source, judged, given, here, shares)
    fit = None
    if request.fit_on == HELD_OUT:
        assert given.held_out is not None
        held_out = replace(given, config=replace(config, data=given.held_out), own=True)
        fit = _predict(source, judged, held_out, here, shares)
    found = None
    with here.together():
        if predictions is not None:
            if request.share is not None:
                fit, predictions = split(predictions, request.share)
            if request.fit is not None:
                fit = read(request.fit, "--fit")
            if request.output is not None:
                write(request.output, predictions)
            bins = request.bins or config.evaluation.ece_bins
            found = figures(predictions, fit, bins=bins, resamples=request.resamples)
    return found


def _predict(
    source: Source, judged: Subject, given: Settings, here: World, shares: int
) -> Predictions | None:
    """Logits of the validation samples, in their order, on rank 0."""
    config = given.config
    catalog = agreed_catalog(config.data, here, validation_only=True)
    with here.together():
        catalog = fitting(judged, catalog, given, str(source))
    logits, labels = [], []
    with here.together():
        data = loader(config, here, catalog, peers=False)
        full = config.evaluation.precision == "fp32"
        ranges = _own_ranges(catalog, config, here, shares)
        for images, labels_B in data.validation_of(ranges):
            images_BCHW = renormalised(judged, catalog, images)
            logits.append(judged.inference(judged.network, images_BCHW, full).cpu())
            labels.append(labels_B.cpu().clone())  # a decoder may write over them
        data.close()
    parts = here.collect((logits, labels))
    if here.rank > 0:
        return None
    what = described(dataclasses.asdict(config.data))
    return Predictions(
        torch.cat([batch for batches, _ in parts for batch in batches]),
        torch.cat([batch for _, batches in parts for batch in batches]),
        f"{source} on {what}",
        catalog.validation.digests(),
    )


def _own_ranges(catalog: AnyCatalog, config: Config, here: World, shares: int) -> list[range]:
    """This rank's part of the batches, which are those of `shares` ranks."""
    n, size = len(catalog.validation), config.evaluation.batch_size
    ranges = [part for rank in range(shares) for part in validation_ranges(n, rank, shares, size)]
    low, high = (k * len(ranges) // here.size for k in (here.rank, here.rank + 1))
    return ranges[low:high]
