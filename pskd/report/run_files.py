"""What a run directory says about a run, complete or not, for whoever looks at it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from pskd.data.sections import described
from pskd.errors import PskdError
from pskd.files import rewritten, sha256_of, written_again
from pskd.metrics import Records, check_records
from pskd.run_records import Sections, read_preprocessing, read_result, read_starts, saved_settings
from pskd.run_status import standing

_IN_LINE = ("epoch", "top1_error", "images_per_s")

Line = Mapping[str, Any]  # of metrics.jsonl


@dataclass(frozen=True)
class RunFiles:
    """The files, read.

    settings: of config.yaml, by section. lines: of finished epochs, at least one. best: the
    evaluated line of lowest top-1 error, if there is one. starts: of env.json. class_names: None
    for a run of an older version. records: of the last epoch's evaluation; None for a run that is
    not complete, or was completed by an older version.
    """

    path: Path
    settings: Sections
    lines: Sequence[Line]
    complete: bool
    best: Line | None
    starts: Sequence[Mapping[str, Any]]
    class_names: Sequence[str] | None
    records: Records | None

    @property
    def name(self) -> str:
        """Of the directory."""
        return self.path.resolve().name

    @property
    def recipe(self) -> str | None:
        """The recipe that the run began with."""
        return self.settings["run"].get("recipe")

    @property
    def data(self) -> str:
        """The samples that were evaluated, in words."""
        return described(self.settings["data"])

    @property
    def last(self) -> Line:
        """The last epoch that was evaluated; of a run without one, the last."""
        evaluated = [line for line in self.lines if line["top1_error"] is not None]
        return (evaluated or self.lines)[-1]

    @property
    def bins(self) -> int:
        """Of the ECE."""
        return bins_of(self.settings)


def bins_of(settings: Sections) -> int:
    """Of the ECE of a run, which an older version did not save."""
    return int(settings.get("evaluation", {}).get("ece_bins", 10))


def read(path: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        PskdError: it holds no run, or one without a finished epoch, or a file is damaged.
    """
    settings = saved_settings(path)
    result = read_result(path) if (path / "result.json").exists() else None
    lines = _lines(path / "metrics.jsonl")
    if not lines:
        if result is not None:
            file = path / "metrics.jsonl"
            if file.exists():
                raise PskdError(f"{file} is empty. {written_again(path)}")
            raise PskdError(f"{file}: no such file. {rewritten(path)}")
        state, remedy = standing(path)
        raise PskdError(f"{path} has no finished epoch yet ({state}). {remedy}")
    evaluated = [line for line in lines if line["top1_error"] is not None]
    preprocessing = read_preprocessing(path)
    class_names = None if preprocessing is None else preprocessing["class_names"]
    records = None
    if result is not None:
        classes = None if class_names is None else len(class_names)
        written = result.get("evaluation_sha256")
        records = _records(path / "evaluation.npz", written, classes, bins_of(settings))
    return RunFiles(
        path=path,
        settings=settings,
        lines=lines,
        complete=result is not None,
        best=min(evaluated, key=lambda line: line["top1_error"], default=None),
        starts=read_starts(path),
        class_names=class_names,
        records=records,
    )


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """A file that is not what it should be is named."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        what = getattr(error, "strerror", None) or error
        raise PskdError(f"{path} cannot be read ({what}). {written_again(path.parent)}") from error


def _lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    with _whole(path):
        texts = path.read_text().splitlines()
        lines = [_line(n, text) for n, text in enumerate(texts, start=1)]
        for number, (before, line) in enumerate(pairwise(lines), start=2):
            if line["epoch"] != before["epoch"] + 1:
                raise ValueError(
                    f"line {number} is of epoch {line['epoch'] + 1} and follows epoch "
                    f"{before['epoch'] + 1}"
                )
        return lines


def _line(number: int, text: str) -> Line:
    """Raises ValueError: names the line."""
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"line {number} is no JSON") from error
    lacking = [key for key in _IN_LINE if not isinstance(line, dict) or key not in line]
    if lacking:
        raise ValueError(f"line {number} lacks {', '.join(lacking)}")
    return dict(line)


def _records(path: Path, written: str | None, classes: int | None, bins: int) -> Records | None:
    """written: the hash that result.json has, if it has one. classes: their number, if known."""
    if not path.exists():
        return None
    with _whole(path), np.load(path, allow_pickle=False) as arrays:
        records = Records(
            confidence_N=torch.from_numpy(arrays["confidence"]),
            nll_N=torch.from_numpy(arrays["nll"]),
            rank_N=torch.from_numpy(arrays["rank"]).long(),
            label_N=torch.from_numpy(arrays["label"]).long(),
            prediction_N=torch.from_numpy(arrays["prediction"]).long(),
        )
        _check(records, classes, bins)
        if written is not None and sha256_of(path) != written:
            raise ValueError("it is not the one that the run wrote: sha256 differs")
        return records


def _check(records: Records, classes: int | None, bins: int) -> None:
    """Raises ValueError: no predictions of that many classes."""
    if len({len(column_N) for column_N in vars(records).values()}) > 1:
        raise ValueError("its arrays have different lengths")
    check_records(records, bins)
    classes = classes or 1 + int(max(records.label_N.max(), records.prediction_N.max()))
    for name, class_N in (("label", records.label_N), ("prediction", records.prediction_N)):
        if not 0 <= int(class_N.min()) <= int(class_N.max()) < classes:
            raise ValueError(f"a {name} is outside 0..{classes - 1}")
