"""The run directory: its paths, its lock, what is written into it (read by `run_records.py`).

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
import json
import os
import platform
import re
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy.typing as npt

from pskd.config import Config
from pskd.errors import PskdError
from pskd.files import (
    make_directory,
    read_run_json,
    write_arrays,
    write_atomically,
    write_json,
)
from pskd.run_records import changes, read_starts, saved_settings
from pskd.run_status import read_status


class Start(NamedTuple):
    """number: of this start of the run, from 0. run: the run's name. changes: of facts since."""

    number: int
    run: str
    changes: list[str]


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
            make_directory(self.path)
            lock = (self.path / "lock").open("a+")
        except (FileExistsError, NotADirectoryError) as error:
            raise PskdError(
                f"run directory {self.path} cannot be made: a file is in its place, or above it. "
                "Choose another with --run.dir."
            ) from error
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
        for pattern in (".*.tmp", "models/.*.tmp", "store/gen-*/.*.tmp"):
            for aside in self.path.glob(pattern):  # what killed processes left half written
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
        """As `files.write_json`."""
        write_json(self.path / name, value)

    def write_arrays(self, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """As `files.write_arrays`."""
        write_arrays(self.path / name, arrays)

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
        if not (self.path / "config.yaml").exists():
            return []
        saved = saved_settings(self.path)
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
        # Above those of segments too: env.json may have been lost, and their names are not reused.
        segments = (re.match(r"seg-(\d+)-", path.name) for path in self.store.glob("gen-*/seg-*"))
        taken = [*(start["start"] for start in starts), *(int(seg[1]) for seg in segments if seg)]
        number = 1 + max(taken, default=-1)
        entry = {
            "start": number,
            "run": name,
            "time": time.time(),
            "host": platform.node(),
            "command": sys.argv,
            "origin": origin,
            "facts": facts,
        }
        self.write_json("env.json", [*starts, entry])
        return Start(number, name, changed)

    def _heartbeat_age(self) -> str:
        status = read_status(self.path)
        return f"{time.time() - status['heartbeat']:.0f} s ago" if status else "never"


def _of_the_run(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what follows from the number of ranks, which may change."""
    return {k: v for k, v in settings.items() if k != "train_micro_batch_size_per_gpu"}


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
