"""What a run directory says about a run, complete or not, for whoever looks at it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from pskd.errors import PskdError
from pskd.files import read_run_json, written_again
from pskd.metrics import Records
from pskd.report.origin import described
from pskd.run_dir import Sections, read_result, read_status, saved_settings

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
    status: Mapping[str, Any]
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
        return int(self.settings.get("evaluation", {}).get("ece_bins", 10))


def read(path: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        PskdError: it holds no run, or one without a finished epoch, or a file is damaged.
    """
    settings = saved_settings(path)
    lines = _lines(path / "metrics.jsonl")
    if not lines:
        raise PskdError(
            f"{path} has no finished epoch yet: `train.py --run.dir {path}` goes on with it."
        )
    complete = (path / "result.json").exists()
    if complete:
        read_result(path)
    evaluated = [line for line in lines if line["top1_error"] is not None]
    preprocessing = read_run_json(path / "preprocessing.json")
    return RunFiles(
        path=path,
        settings=settings,
        lines=lines,
        complete=complete,
        status=read_status(path),
        best=min(evaluated, key=lambda line: line["top1_error"], default=None),
        starts=read_run_json(path / "env.json") or [],
        class_names=None if preprocessing is None else preprocessing["class_names"],
        records=_records(path / "evaluation.npz") if complete else None,
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
        return [_line(n, text) for n, text in enumerate(path.read_text().splitlines(), start=1)]


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


def _records(path: Path) -> Records | None:
    if not path.exists():
        return None
    with _whole(path), np.load(path, allow_pickle=False) as arrays:
        return Records(
            confidence_N=torch.from_numpy(arrays["confidence"]),
            nll_N=torch.from_numpy(arrays["nll"]),
            rank_N=torch.from_numpy(arrays["rank"]).long(),
            label_N=torch.from_numpy(arrays["label"]).long(),
            prediction_N=torch.from_numpy(arrays["prediction"]).long(),
        )
