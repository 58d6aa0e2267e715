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
import yaml

from pskd import recipe
from pskd.errors import PskdError
from pskd.metrics import Records

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
    settings: Mapping[str, Mapping[str, Any]]
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
        """The samples that were evaluated, in words; runs that differ here do not compare."""
        section = self.settings["data"]
        held_out = section.get("held_out")
        root = f" {section['root']}" if section["name"] == "imagefolder" else ""
        return f"{section['name']}{root}{f', {held_out} held out' if held_out else ''}"

    @property
    def last(self) -> Line:
        """The last epoch that was evaluated; of a run without one, the last."""
        evaluated = [line for line in self.lines if line["top1_error"] is not None]
        return (evaluated or self.lines)[-1]

    @property
    def bins(self) -> int:
        """Of the ECE."""
        return int(self.settings.get("evaluation", {}).get("ece_bins", 10))


def published(name: str | None) -> Mapping[str, float]:
    """The published figures of a recipe of the package; none for others."""
    return recipe.read(name).published if name in recipe.names() else {}


def read(path: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        PskdError: it holds no run, or one without a finished epoch, or a file is damaged.
    """
    settings = _yaml(path / "config.yaml", path)
    lines = _lines(path / "metrics.jsonl")
    if not lines:
        raise PskdError(
            f"{path} has no finished epoch yet: `train.py --run.dir {path}` goes on with it."
        )
    result = _json(path / "result.json")
    evaluated = [line for line in lines if line["top1_error"] is not None]
    preprocessing = _json(path / "preprocessing.json")
    return RunFiles(
        path=path,
        settings=settings,
        lines=lines,
        complete=result is not None,
        status=_json(path / "status.json") or {},
        best=min(evaluated, key=lambda line: line["top1_error"], default=None),
        starts=_json(path / "env.json") or [],
        class_names=None if preprocessing is None else preprocessing["class_names"],
        records=_records(path / "evaluation.npz") if result is not None else None,
    )


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """A file that is not what it should be is named."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        what = getattr(error, "strerror", None) or error
        raise PskdError(
            f"{path} cannot be read ({what}): `train.py --run.dir {path.parent}` writes what is "
            "missing, without training a complete run again."
        ) from error


def _yaml(path: Path, run: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        settings = yaml.safe_load(path.read_text())
        settings["run"], settings["data"]["name"]
    except OSError as error:
        raise PskdError(
            f"{run} is no run directory ({error.strerror}: config.yaml): name one that training "
            "has made."
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise PskdError(f"{path} cannot be read: {error}. Restore it.") from error
    checked: Mapping[str, Mapping[str, Any]] = settings
    return checked


def _lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    with _whole(path):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["epoch"], line["top1_error"]
    return lines


def _json(path: Path) -> Any:
    if not path.exists():
        return None
    with _whole(path):
        return json.loads(path.read_text())


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
