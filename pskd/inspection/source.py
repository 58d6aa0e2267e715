"""What is looked at: the finished generations of a run, and the samples they are about."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pskd import command_line
from pskd.config import Config
from pskd.errors import DamagedError, PskdError
from pskd.ignored_options import ignored
from pskd.loading import AnyCatalog, local_catalog
from pskd.run_dir import RunDir
from pskd.run_records import saved_settings
from pskd.run_status import read_status, standing
from pskd.store.generation import (
    MANIFEST,
    Generation,
    finished_epochs,
    generation_name,
    open_generation,
)

_READ = ("data.root", "data.index_path", "data.val_index_path")


class Past(NamedTuple):
    """Predictions that a run made in an epoch, 0-based."""

    epoch: int
    rows: Generation


@dataclass(frozen=True)
class Source:
    """last: of the newest finished epoch. before: of the finished one before it, if still there.

    trained: epochs that the run has finished, as its status says. lost: what is wrong with the
    generation before, if it cannot be used.
    """

    run: Path
    config: Config
    catalog: AnyCatalog
    last: Past
    before: Past | None
    trained: int
    lost: str | None


def open_run(run: Path, flags: list[str]) -> Source:
    """flags: `--data.root=DIR` and the like, where the data are now.

    Raises:
        PskdError: no run; its method keeps no predictions; no epoch is finished; rows are damaged;
            the data cannot be read, or are not those that it trained.
    """
    keys = [flag.removeprefix("--").partition("=")[0] for flag in flags]
    for key in keys:
        if key not in _READ:
            raise PskdError(f"--{key}: `pskd inspect` does not read it, only {', '.join(_READ)}.")
    config = command_line.over(f"{run}/config.yaml", dict(saved_settings(run)), flags)
    for key, _, reason in ignored(config.flat(), config.method.keeps_predictions):
        if key in keys:
            raise PskdError(f"--{key}: nothing reads it: {reason}. Leave it out.")
    store = RunDir(run).store
    epochs = finished_epochs(store)
    if not epochs:
        raise _no_predictions(run, config)
    pasts = [Past(e, open_generation(store / generation_name(e))) for e in epochs[-2:]]
    last = pasts[-1]
    try:  # nothing is fetched: other data would come in the place of what is missing
        catalog = local_catalog(replace(config.data, download=False))
    except PskdError as error:
        raise PskdError(
            f"the training samples of {run} cannot be read, and its store holds no labels: {error} "
            "If the data were moved, name their place with --data.root DIR."
        ) from error
    for past in pasts:
        _check_same(run, catalog, past)
    before = pasts[0] if len(pasts) > 1 else None
    damage = _damage(last)  # what is damaged would look like a label error
    if damage is not None:
        raise PskdError(
            f"{damage} Restore the file from a copy; or remove {run}/store/"
            f"{generation_name(last.epoch)}/{MANIFEST}, and the epoch before is inspected."
        )
    lost = None if before is None else _damage(before)
    if lost is not None:
        before = None
    trained = read_status(run).get("epoch", last.epoch + 1)
    return Source(run, config, catalog, last, before, trained, lost)


def _damage(past: Past) -> str | None:
    """Every row is compared with its checksum."""
    try:
        past.rows.verify()
    except DamagedError as error:
        return error.what
    return None


def _no_predictions(run: Path, config: Config) -> PskdError:
    method = config.method
    if not method.keeps_predictions:
        teacher = getattr(method, "teacher", None)
        chosen = "" if teacher is None else f" with method.teacher {teacher}"
        return PskdError(
            f"{run}: method {method.name}{chosen} keeps no past predictions. `pskd inspect` reads "
            "those of method pskd with method.teacher table."
        )
    state, remedy = standing(run)
    if read_status(run).get("state") == "complete":
        remedy = "Train it again in another --run.dir, or restore its store/ from a copy."
    return PskdError(f"{run} holds no past predictions of a finished epoch ({state}). {remedy}")


def _check_same(run: Path, catalog: AnyCatalog, past: Past) -> None:
    """Rows are matched with labels by number."""
    rows, name = past.rows, generation_name(past.epoch)
    for what, stored, found in (
        ("classes", rows.classes, catalog.num_classes),
        ("samples", rows.n, len(catalog.train)),
    ):
        if stored != found:
            raise PskdError(
                f"{run}/store/{name} is about {stored} {what}, but the training data have {found}. "
                "Name the data that the run was trained on with --data.root DIR."
            )
    if any(segment.header.identity != catalog.fingerprint for segment in rows.segments):
        raise PskdError(
            f"{run}/store/{name} is about other samples than the training data, which have as many "
            "(fingerprints differ). Name those of the run with --data.root DIR."
        )
