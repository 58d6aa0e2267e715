"""The run directory: its paths, its lock, its status, what is logged in it.

config.yaml      the resolved configuration; ds_config.json: DeepSpeed's
status.json      running | stopped | complete | failed, with reason, position, heartbeat
env.json         one entry for each start
metrics.jsonl    one line an epoch
preprocessing.json  how an image becomes the network's input, and the names of the classes
result.json      measures of last and best, hash of the weights
evaluation.npz   of each validation sample: label, prediction, confidence, nll, rank
checkpoints/     resumable states
models/          weights for plain torch
store/           past predictions
lock             held by rank 0 of the running job
"""

import fcntl
import io
import json
import logging
import math
import os
import platform
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

from pskd.config import Config
from pskd.errors import PskdError
from pskd.files import read_run_json, rewritten, write_atomically, written_again, yaml_defect
from pskd.recipe import PUBLISHED_MEASURES

HEARTBEAT_S = 5.0

_IN_PREPROCESSING = ("class_names", "height", "width", "mean", "std")
_FORGET_STARTS = "Restore it from a copy; without it, the next start begins the list anew."
_IN_RESULT = ("epoch", *PUBLISHED_MEASURES)

log = logging.getLogger("pskd")

Sections = Mapping[str, Mapping[str, Any]]


class Start(NamedTuple):
    """number: of this start of the run, from 0. run: the run's name. changes: of facts since."""

    number: int
    run: str
    changes: list[str]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words; None stands for what is missing."""
    return [
        f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


class RunDir:
    """Paths and small files of one run. Rank 0 writes them; lock and status, others as well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.store = path / "store"
        self.models = path / "models"
        self._lock: IO[str] | None = None

    def acquire(self, wait_s: float) -> None:
        """Make the directory and own it until this process ends, by a kernel lock.

        Raises:
            PskdError: not writable, or still owned after `wait_s` seconds (a dying owner needs
                a moment).
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise PskdError(
                f"run directory {self.path} cannot be written: {error.strerror}. "
                "Choose another with --run.dir, or change its permissions."
            ) from error
        deadline = time.monotonic() + wait_s
        while (owner := self._owner(lock, fcntl.LOCK_EX)) is not None:
            if time.monotonic() > deadline:
                raise self._in_use(owner)
            time.sleep(0.2)
        for directory in (self.path, self.models):  # what killed processes left half written
            for aside in directory.glob(".*.tmp"):
                aside.unlink()
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def check_free(self) -> None:
        """Look at the lock, and take nothing.

        Raises:
            PskdError: a job owns the directory.
            OSError: the lock cannot be read.
        """
        path = self.path / "lock"
        if path.exists():
            with path.open() as lock:
                owner = self._owner(lock, fcntl.LOCK_SH)
            if owner is not None:
                raise self._in_use(owner)

    def _owner(self, lock: IO[str], kind: int) -> str | None:
        """Take the lock, or say who has it."""
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            return lock.read().strip() or "an unknown process"
        return None

    def _in_use(self, owner: str) -> PskdError:
        return PskdError(
            f"run directory {self.path} is in use by {owner} "
            f"(last heartbeat {self._heartbeat_age()}). "
            "Stop that job, or choose another --run.dir."
        )

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file, atomically."""
        write_atomically(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def write_arrays(self, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace an .npz file, atomically; `numpy.load` reads it."""
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        write_atomically(self.path / name, content.getbuffer())

    def read_json(self, name: str) -> Any:
        """As `read_run_json`."""
        return read_run_json(self.path / name)

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace metrics.jsonl: exactly one line an epoch, after any restarts."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.path / "metrics.jsonl", text.encode())

    def differences(self, config: Config) -> list[str]:
        """What changes the result and differs from the configuration that the run began with.

        Raises:
            PskdError: the saved configuration is damaged.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            return []
        try:
            saved = dict(yaml.safe_load(path.read_text()))
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise PskdError(
                f"{path} is damaged ({yaml_defect(error)}). {_begun_anew(self.path)}"
            ) from error
        defaults = config.defaults()  # of keys that are younger than the run
        now, before = config.values("numerics"), {}
        for key in now:
            section, _, name = key.partition(".")
            before[key] = saved.get(section, {}).get(name, defaults[key])
        return changes(before, now)

    def check_same(self, config: Config) -> None:
        """Compare the configuration with the one that the run began with, if there is one.

        Raises:
            PskdError: a value that changes the result differs; names each.
        """
        changed = self.differences(config)
        if changed:
            raise PskdError(
                f"{self.path} holds a run of another configuration: {'; '.join(changed)}. "
                "Use the old values, or another --run.dir."
            )

    def reconcile(self, config: Config) -> None:
        """Save the configuration, or compare it with the one that the run began with.

        Raises:
            PskdError: a value that changes the result differs; names each.
        """
        self.check_same(config)
        write_atomically(self.path / "config.yaml", config.to_yaml().encode())

    def engine_differences(self, settings: dict[str, Any]) -> list[str]:
        """How DeepSpeed's settings differ from those that the run began with."""
        own = _of_the_run(settings)
        return changes(self.read_json("ds_config.json") or own, own)

    def reconcile_engine(self, settings: dict[str, Any]) -> None:
        """Save DeepSpeed's settings, or compare them with those that the run began with.

        Raises:
            PskdError: a setting differs, although the name of the file may not; names each.
        """
        changed = self.engine_differences(settings)
        if changed:
            raise PskdError(
                f"{self.path} holds a run of another DeepSpeed configuration: "
                f"{'; '.join(changed)}. Use the old values, or another --run.dir."
            )
        self.write_json("ds_config.json", _of_the_run(settings))

    def record_start(self, facts: dict[str, Any], origin: dict[str, Any] | None) -> "Start":
        """Append this start to env.json.

        facts: decide whether weights can be equal to the bit (design: same software, CPU
        instruction set, threads and world). origin: the other run that this one begins from.
        """
        starts = read_starts(self.path)
        changed = changes(starts[-1]["facts"], facts) if starts else []
        name = starts[0]["run"] if starts else secrets.token_hex(8)
        entry = {
            "start": len(starts),
            "run": name,
            "time": time.time(),
            "host": platform.node(),
            "command": sys.argv,
            "origin": origin,
            "facts": facts,
        }
        self.write_json("env.json", [*starts, entry])
        return Start(len(starts), name, changed)

    def _heartbeat_age(self) -> str:
        status = read_status(self.path)
        return f"{time.time() - status['heartbeat']:.0f} s ago" if status else "never"


class Status:
    """status.json: the truth about the run, for launch scripts and health checks.

    state: running | stopped | complete | failed. start: number of the start that wrote it.
    heartbeat: Unix time of the last progress, s.
    """

    def __init__(self, run: RunDir, epochs: int, start: int) -> None:
        self._run = run
        self._value: dict[str, Any] = {
            "state": "running",
            "reason": None,
            "epoch": 0,
            "epochs": epochs,
            "step": 0,
            "start": start,
            "host": platform.node(),
            "pid": os.getpid(),
        }
        self._next_beat = 0.0

    def beat(self, epoch: int, step: int) -> None:
        """Note progress; written at most every few seconds, and worth no failure."""
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_S
            try:
                self.write("running", None, epoch, step)
            except OSError as error:
                log.warning("no heartbeat in %s: %s", self._run.path, error.strerror)

    def write(self, state: str, reason: str | None, epoch: int, step: int) -> None:
        """Replace the file, unless a rank of this start has written there that it failed."""
        self._value.update(state=state, reason=reason, epoch=epoch, step=step)
        with _status_lock(self._run.path):
            now = read_status(self._run.path)
            if now.get("state") == "failed" and now.get("start") == self._value["start"]:
                return
            self._run.write_json("status.json", {**self._value, "heartbeat": time.time()})


def read_status(run: Path) -> dict[str, Any]:
    """What status.json says; nothing if it is missing, or damaged, as a full disk may leave it.

    Damage is mended by the next write, so that it keeps no run from going on.
    """
    try:
        status = json.loads((run / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def fail(path: Path, start: int, reason: str) -> str | None:
    """Any rank: say in status.json why this start of the run failed.

    Returns None if this rank was the first to say so, else the reason that stands there. A process
    left over from an earlier start says nothing.
    """
    run = RunDir(path)
    with _status_lock(path):
        now = read_status(path)
        known = now.get("start", -1)
        if known > start or (known == start and now["state"] != "running"):
            return str(now.get("reason") or "")
        failed = {**now, "state": "failed", "reason": reason, "start": start}
        failed["heartbeat"] = time.time()
        try:
            run.write_json("status.json", failed)
        except OSError:  # a full disk: there is no room for a second file, but in the old one
            (path / "status.json").write_text(json.dumps(failed))
        return None


def standing(run: Path) -> tuple[str, str]:
    """(how far a run is that has not ended well, how to finish it), in words."""
    status, resume = read_status(run), f"`train.py --run.dir {run}` resumes it."
    if "epochs" not in status:
        return "of unknown state", resume
    state, epochs = status["state"], status["epochs"]
    text = f"{state} in epoch {min(status['epoch'] + 1, epochs)} of {epochs}"
    if state == "running":
        text += f", last heartbeat {time.time() - status['heartbeat']:.0f} s ago"
        return text, f"Wait for its end; or if it was killed, {resume}"
    reason = status.get("reason")
    return (f"{text}: {str(reason).rstrip('.')}" if reason else text), resume


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
        isinstance(start, dict) and isinstance(start.get("facts"), dict) for start in starts
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
    except OSError as error:
        raise PskdError(
            f"{run} is no run directory ({error.strerror}: config.yaml). Name one that training "
            "has made."
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise PskdError(
            f"{path} cannot be read ({yaml_defect(error)}). {_begun_anew(run)}"
        ) from error
    whole = isinstance(settings, dict) and isinstance(settings.get("run"), dict)
    if not whole or not all(isinstance(section, dict) for section in settings.values()):
        raise PskdError(f"{path} holds no sections of a run's configuration. {_begun_anew(run)}")
    sections: Sections = settings
    return sections


def _begun_anew(run: Path) -> str:
    """The remedy for a damaged config.yaml."""
    return (
        f"Restore it from a copy, or remove it and start `train.py --run.dir {run}` with the flags "
        "that the run began with, as env.json has them: that writes it again."
    )


def _of_the_run(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what follows from the number of ranks, which may change."""
    return {k: v for k, v in settings.items() if k != "train_micro_batch_size_per_gpu"}


@contextmanager
def _status_lock(path: Path) -> Iterator[None]:
    with (path / "status.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def new_path(root: Path, label: str) -> Path:
    """Make `root/NNNN-label`, the next free number.

    Raises:
        PskdError: root cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        numbers = (re.match(r"\d+", p.name) for p in root.iterdir())
        number = 1 + max((int(n[0]) for n in numbers if n), default=0)
        while True:
            path = root / f"{number:04d}-{label}"
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise PskdError(
            f"run.root {root} cannot be written: {error.strerror}. Choose another --run.root."
        ) from error
