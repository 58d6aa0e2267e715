"""What the small files of a run directory say, for whoever reads them: each damage has one message.

Which files there are: `run_dir.py`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pskd.errors import PskdError
from pskd.files import read_run_json, rewritten, written_again, yaml_defect
from pskd.recipe import PUBLISHED_MEASURES
from pskd.run_status import read_status, standing

_IN_PREPROCESSING = ("class_names", "height", "width", "mean", "std")
_FORGET_STARTS = "Restore it from a copy; without it, the next start begins the list anew."
_IN_RESULT = ("epoch", *PUBLISHED_MEASURES)

Sections = Mapping[str, Mapping[str, Any]]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words; None stands for what is missing."""
    return [
        f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


def read_complete(run: Path, name: str) -> Any:
    """The content of a JSON file that every complete run has.

    Raises:
        PskdError: there is none, or it is damaged.
    """
    content = read_run_json(run / name)
    if content is None:
        saved_settings(run)  # is it a run at all
        if read_status(run).get("state") == "complete":
            raise PskdError(f"{run} is complete, but its {name} is gone. {rewritten(run)}")
        state, remedy = standing(run)
        raise PskdError(f"{run} is not complete ({state}; it has no {name} yet). {remedy}")
    return content


def read_result(run: Path) -> dict[str, Any]:
    """result.json of a complete run: the lines of its last and its best epoch, and more.

    Raises:
        PskdError: there is none, or it is damaged.
    """
    result = read_complete(run, "result.json")
    for name in ("last", "best"):
        line = result.get(name) if isinstance(result, dict) else None
        wrong = f"lacks {name}"
        if isinstance(line, dict):
            wrong = ", ".join(key for key in _IN_RESULT if not _is_measured(line, key))
            wrong = f"has no {wrong} in {name}" if wrong else ""
        if wrong:
            raise PskdError(f"{run / 'result.json'} {wrong}. {written_again(run)}")
    return dict(result)


def earlier_evaluation(run: Path) -> str | None:
    """The hash of evaluation.npz in result.json; None if there is none, or nothing to be read."""
    try:
        digest = read_result(run).get("evaluation_sha256")
    except PskdError:  # it is about to be written anew
        return None
    return None if digest is None else str(digest)


def read_preprocessing(run: Path) -> dict[str, Any] | None:
    """preprocessing.json (see `data/preprocessing.py`), or None: of an older version.

    Raises:
        PskdError: it is damaged.
    """
    about = read_run_json(run / "preprocessing.json")
    if about is None:
        return None
    lacking = [key for key in _IN_PREPROCESSING if not isinstance(about, dict) or key not in about]
    if lacking:
        path = run / "preprocessing.json"
        raise PskdError(f"{path} lacks {', '.join(lacking)}. {written_again(run)}")
    return dict(about)


def read_starts(run: Path) -> list[dict[str, Any]]:
    """The starts of env.json; none if it is not there.

    Raises:
        PskdError: it is damaged.
    """
    starts: list[dict[str, Any]] | None = read_run_json(run / "env.json")
    if starts is None:
        return []
    whole = isinstance(starts, list) and all(
        isinstance(start, dict)
        and isinstance(start.get("facts"), dict)
        and isinstance(start.get("start"), int)
        for start in starts
    )
    if not whole or not starts:
        path = run / "env.json"
        raise PskdError(f"{path} holds no starts of a run. {_FORGET_STARTS}")
    return starts


def _is_measured(line: Mapping[str, Any], key: str) -> bool:
    """A number; of fewer than five classes, there is no top-5 error."""
    value = line.get(key, "")
    if isinstance(value, int | float):
        return not math.isnan(value)
    return value is None and key == "top5_error"


def saved_settings(run: Path) -> Sections:
    """The sections of config.yaml.

    Raises:
        PskdError: there is none, or it is damaged.
    """
    path = run / "config.yaml"
    try:
        settings = yaml.safe_load(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PskdError(
            f"{run} is no run directory ({error.strerror}: config.yaml). Name one that training "
            "has made."
        ) from error
    except OSError as error:
        raise PskdError(f"{path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise PskdError(
            f"{path} cannot be read ({yaml_defect(error)}). {begun_anew(run)}"
        ) from error
    whole = isinstance(settings, dict) and isinstance(settings.get("run"), dict)
    if not whole or not all(isinstance(section, dict) for section in settings.values()):
        raise PskdError(f"{path} holds no sections of a run's configuration. {begun_anew(run)}")
    sections: Sections = settings
    return sections


def begun_anew(run: Path) -> str:
    """The remedy for a damaged config.yaml."""
    return (
        f"Restore it from a copy, or remove it and start `train.py --run.dir {run}` with the flags "
        "that the run began with, as env.json has them: that writes it again."
    )
