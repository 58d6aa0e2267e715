"""The measures of some predictions, with intervals, and beside them those at a fitted temperature.

Letters: N samples, C classes.
"""

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from pskd.data.catalog import smallest_hashes
from pskd.errors import PskdError
from pskd.evaluation import bootstrap, temperature
from pskd.files import named_by, write_arrays
from pskd.metrics import Accumulator, Records, check_values, measures, per_sample
from pskd.words import counted

_BLOCK_ROWS = 4096
_SAMPLES = "pskd_samples"
_TELLING = 20  # labels, at least, to know samples by
_EXPECTED = (
    "Name one with the arrays `logits` (N, C), floating-point, and `labels` (N,), integers, as "
    "numpy.savez writes it."
)


class Predictions(NamedTuple):
    """logits_NC: floating. labels_N: integers. source: what messages call them.

    digests_N: by which samples are known again (see `data/catalog.py`); None in a file that another
    program wrote.
    """

    logits_NC: Tensor
    labels_N: Tensor
    source: str
    digests_N: npt.NDArray[np.uint64] | None = None

    def take(self, rows_N: npt.NDArray[Any]) -> "Predictions":
        """Some samples, in the order given."""
        rows = torch.from_numpy(rows_N)
        digests_N = None if self.digests_N is None else self.digests_N[rows_N]
        return Predictions(self.logits_NC[rows], self.labels_N[rows], self.source, digests_N)


@dataclass(frozen=True)
class Part:
    """Measures, in their units, and their 95 % intervals, if asked for."""

    measures: dict[str, float | None]
    intervals: dict[str, bootstrap.Interval | None] | None


@dataclass(frozen=True)
class Figures:
    """source: what was evaluated, in words.

    fitted_on: what the temperature was fitted on, if it was; then `scaled` is at that one.
    """

    source: str
    samples: int
    classes: int
    bins: int
    resamples: int
    raw: Part
    temperature: float | None
    fitted_on: str | None
    scaled: Part | None


def read(path: Path, flag: str) -> Predictions:
    """`logits` (N, C) and `labels` (N,) of an .npz file of any framework, values checked.

    Also the samples' digests (N,), of a file that `write` wrote.

    flag: which named it.

    Raises:
        PskdError: no such file, or not of that content.
    """
    source = f"{flag} {path}"
    try:
        arrays = np.load(path, allow_pickle=False)
    except OSError as error:
        raise PskdError(f"{source}: {error.strerror or error}. {_EXPECTED}") from error
    except (ValueError, EOFError, BadZipFile, UnpicklingError):
        arrays = None
    if not isinstance(arrays, NpzFile):  # a .npy file is another array of numpy
        raise PskdError(f"{source} is no .npz file. {_EXPECTED}")
    with arrays:
        logits_NC, labels_N = (_tensor(arrays, name, source) for name in ("logits", "labels"))
        digests_N = _tensor(arrays, _SAMPLES, source).numpy() if _SAMPLES in arrays else None
    if digests_N is not None and not (
        digests_N.dtype == np.uint64 and digests_N.shape == labels_N.shape
    ):
        raise PskdError(f"{source}: `{_SAMPLES}` is not what `pskd evaluate` writes. {_EXPECTED}")
    predictions = Predictions(logits_NC, labels_N, source, digests_N)
    _check(predictions)
    return predictions


def write(path: Path, predictions: Predictions) -> None:
    """An .npz file of `logits` (float32), `labels` (int32) and, if known, `pskd_samples` (uint64).

    Raises:
        PskdError: it cannot be written.
    """
    arrays: dict[str, Any] = {
        "logits": predictions.logits_NC.float().numpy(),
        "labels": predictions.labels_N.to(torch.int32).numpy(),
    }
    if predictions.digests_N is not None:
        arrays[_SAMPLES] = predictions.digests_N
    with named_by("--output", path):
        write_arrays(path, arrays)


def _tensor(arrays: NpzFile, name: str, source: str) -> Tensor:
    if name not in arrays:
        raise PskdError(f"{source} lacks `{name}`. {_EXPECTED}")
    try:
        values = arrays[name]
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise PskdError(
            f"{source}: `{name}` is damaged, or of Python objects. {_EXPECTED}"
        ) from error
    try:
        return torch.from_numpy(values)
    except (TypeError, ValueError) as error:  # text; numbers of another machine's byte order
        what = {"U": "text", "S": "text"}.get(values.dtype.kind, values.dtype.str)
        raise PskdError(f"{source}: `{name}` is of {what}. {_EXPECTED}") from error


def split(predictions: Predictions, share: float) -> tuple[Predictions, Predictions]:
    """(to fit on, to measure): a share of the samples, those of smallest hash, and the others.

    Raises:
        PskdError: one of them would be empty.
    """
    n = len(predictions.labels_N)
    count = round(share * n)
    if not 0 < count < n:
        raise PskdError(
            f"--fit-on {share} of {counted(n, 'sample')} leaves none to "
            f"{'measure' if count else 'fit on'}."
        )
    chosen = smallest_hashes("temperature", n, count)
    fit = predictions.take(chosen)._replace(source=f"{predictions.source} (a share of {share})")
    return fit, predictions.take(np.setdiff1d(np.arange(n), chosen))


def figures(
    predictions: Predictions, fit: Predictions | None, *, bins: int, resamples: int
) -> Figures:
    """fit: other samples, which the temperature is fitted on. resamples: 0 for no intervals.

    Raises:
        PskdError: values that have no measure, or samples to fit on that are not others.
    """
    _check(predictions)
    classes = predictions.logits_NC.shape[1]
    found, scaled = None, None
    raw = _part(predictions, 1.0, bins, resamples)
    if fit is not None:
        _check(fit)
        _check_others(predictions, fit)
        found = temperature.fit(fit.logits_NC, fit.labels_N, fit.source)
        scaled = _part(predictions, found, bins, resamples)
    return Figures(
        source=predictions.source,
        samples=len(predictions.labels_N),
        classes=classes,
        bins=bins,
        resamples=resamples,
        raw=raw,
        temperature=found,
        fitted_on=None
        if fit is None
        else f"{counted(len(fit.labels_N), 'sample')} of {fit.source}",
        scaled=scaled,
    )


def _part(predictions: Predictions, t: float, bins: int, resamples: int) -> Part:
    classes = predictions.logits_NC.shape[1]
    records = _records(predictions, t)
    try:
        found = measures(records, classes, bins)
    except ValueError as error:
        raise PskdError(f"{predictions.source}: {error}.") from error
    if not resamples:
        return Part(found, None)
    return Part(found, bootstrap.intervals(records, classes, bins, resamples))


def _records(predictions: Predictions, t: float) -> Records:
    """Of logits / t, divided in float64, a block at a time."""
    if t == 1.0:
        return per_sample(predictions.logits_NC, predictions.labels_N)
    accumulator = Accumulator()
    for logits_BC, labels_B in zip(
        torch.split(predictions.logits_NC, _BLOCK_ROWS),
        torch.split(predictions.labels_N, _BLOCK_ROWS),
        strict=True,
    ):
        accumulator.update(logits_BC.double() / t, labels_B)
    return accumulator.records()


def _check(predictions: Predictions) -> None:
    try:
        check_values(predictions.logits_NC, predictions.labels_N)
    except ValueError as error:
        raise PskdError(f"{predictions.source}: {error}.") from error


def _check_others(predictions: Predictions, fit: Predictions) -> None:
    """Refuse to fit on what is measured: by the logits, as files and splits have many names."""
    if fit.logits_NC.shape[1] != predictions.logits_NC.shape[1]:
        raise PskdError(
            f"{fit.source} has {fit.logits_NC.shape[1]} classes, {predictions.source} has "
            f"{predictions.logits_NC.shape[1]}: fit on predictions of the same network."
        )
    if predictions.digests_N is not None and fit.digests_N is not None:
        measured: set[Any] = set(predictions.digests_N.tolist())
        fitted: set[Any] = set(fit.digests_N.tolist())
    else:
        measured, fitted = _rows(predictions), _rows(fit)
    common = len(measured & fitted)
    if 2 * common >= min(len(measured), len(fitted)):  # a few may be twins
        raise PskdError(
            f"{fit.source}: {common} of its samples are among those that are measured, "
            f"{predictions.source}. A temperature is fitted on other samples: name held-out ones."
        )
    if _same_order(predictions.labels_N.long(), fit.labels_N.long()):
        raise PskdError(
            f"{fit.source}: its labels are those of what is measured, {predictions.source}, in the "
            "same order. A temperature is fitted on other samples: name held-out ones."
        )


def _same_order(labels_N: Tensor, others_N: Tensor) -> bool:
    """Whether the same labels follow each other as only those of the same samples do.

    Sorted labels may be those of two splits with as many samples of each class.
    """
    changes = int((labels_N.diff() != 0).sum())
    return (
        torch.equal(labels_N, others_N)
        and len(labels_N) >= _TELLING
        and changes >= 2 * len(np.unique(labels_N.numpy()))
    )


def _rows(predictions: Predictions) -> set[bytes]:
    """A hash of each sample's logits and label."""
    logits_NC = predictions.logits_NC.float().contiguous().numpy()
    labels = predictions.labels_N.tolist()
    return {
        hashlib.blake2b(row.data, digest_size=16, salt=label.to_bytes(8, "little")).digest()
        for row, label in zip(logits_NC, labels, strict=True)
    }
