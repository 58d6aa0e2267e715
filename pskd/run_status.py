"""status.json: how a run stands, for launch scripts, health checks and whoever looks at it.

running | stopped | complete | failed, with reason, position and heartbeat.
"""

import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pskd.files import rewritten, write_json

HEARTBEAT_S = 5.0

log = logging.getLogger("pskd")


class Status:
    """status.json: the truth about the run, for launch scripts and health checks.

    state: running | stopped | complete | failed. start: number of the start that wrote it.
    heartbeat: Unix time of the last progress, s.
    """

    def __init__(self, run: Path, epochs: int, start: int) -> None:
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
                log.warning("no heartbeat in %s: %s", self._run, error.strerror)

    def write(self, state: str, reason: str | None, epoch: int, step: int) -> None:
        """Replace the file, unless a rank of this start has written there that it failed."""
        self._value.update(state=state, reason=reason, epoch=epoch, step=step)
        with _status_lock(self._run):
            now = read_status(self._run)
            if now.get("state") == "failed" and now.get("start") == self._value["start"]:
                return
            write_json(self._run / "status.json", {**self._value, "heartbeat": time.time()})


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
    with _status_lock(path):
        now = read_status(path)
        known = now.get("start", -1)
        if known > start or (known == start and now["state"] != "running"):
            return str(now.get("reason") or "")
        failed = {**now, "state": "failed", "reason": reason, "start": start}
        failed["heartbeat"] = time.time()
        try:
            write_json(path / "status.json", failed)
        except OSError:  # a full disk: there is no room for a second file, but in the old one
            (path / "status.json").write_text(json.dumps(failed))
        return None


def standing(run: Path) -> tuple[str, str]:
    """(how far a run is that has not ended well, how to finish it), in words."""
    status, resume = read_status(run), f"`train.py --run.dir {run}` resumes it."
    text = str(status.get("state", "of unknown state"))
    if text == "complete":
        return "complete, but has lost what says so", rewritten(run)
    if "epochs" in status:  # a start that failed early has none
        epochs = status["epochs"]
        text += f" in epoch {min(status['epoch'] + 1, epochs)} of {epochs}"
    if status.get("state") == "running":
        text += f", last heartbeat {time.time() - status['heartbeat']:.0f} s ago"
        return text, f"Wait for its end; or if it was killed, {resume}"
    reason = status.get("reason")
    return (f"{text}: {str(reason).rstrip('.')}" if reason else text), resume


@contextmanager
def _status_lock(path: Path) -> Iterator[None]:
    with (path / "status.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
