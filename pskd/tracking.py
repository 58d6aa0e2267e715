"""The lines of metrics.jsonl for other programs: CSV, TensorBoard, Weights & Biases.

metrics.jsonl is the truth. A start writes all of them anew from the history, so that they too hold
exactly one line an epoch, whatever was killed. Only a server of Weights & Biases keeps what it has:
a start goes on in the same run there, by the run's name, with the epochs that it lacks.
"""

import csv
import importlib.util
import io
import shutil
from pathlib import Path
from typing import Any, Protocol

from pskd.config import Config, TrackingSection
from pskd.errors import PskdError
from pskd.files import write_atomically

Line = dict[str, Any]


class Tracker(Protocol):
    """Takes the lines of a run, on rank 0."""

    def begin(self, lines: list[Line]) -> None:
        """The epochs so far, before the first that is new."""

    def add(self, line: Line) -> None:
        """One more epoch."""

    def close(self) -> None:
        """The run ends, or stops."""


def check(section: TrackingSection) -> None:
    """Before anything else is done.

    Raises:
        PskdError: a package that the configuration asks for is not installed.
    """
    for key, wanted in (("tensorboard", section.tensorboard), ("wandb", section.wandb != "off")):
        if wanted and importlib.util.find_spec(key) is None:
            value = str(getattr(section, key)).lower()
            raise PskdError(
                f"tracking.{key} {value} needs the package {key}, which is not installed: "
                f'pip install "pskd[{key}]", or leave the option out.'
            )


def trackers(config: Config, run_dir: Path, name: str) -> list[Tracker]:
    """Those that the configuration asks for. name: of the run, the same at every start.

    Raises:
        PskdError: Weights & Biases refuses.
    """
    section = config.tracking
    found: list[Tracker] = []
    if section.csv:
        found.append(_Csv(run_dir / "metrics.csv"))
    if section.tensorboard:
        found.append(_TensorBoard(run_dir / "tensorboard"))
    if section.wandb != "off":
        found.append(_Wandb(section, run_dir, name, config.flat()))
    return found


class _Csv:
    """One row an epoch; what an epoch does not have is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[Line] = []

    def begin(self, lines: list[Line]) -> None:
        self._lines = list(lines)
        self._write()

    def add(self, line: Line) -> None:
        self._lines.append(line)
        self._write()

    def close(self) -> None:
        pass

    def _write(self) -> None:
        text = io.StringIO()
        columns = dict.fromkeys(key for line in self._lines for key in line)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._lines)
        write_atomically(self._path, text.getvalue().encode())


class _TensorBoard:
    """A curve for each number; a step is an epoch, the first is 0."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def begin(self, lines: list[Line]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (an optional package)

        if self._directory.exists():
            shutil.rmtree(self._directory)
        self._writer = SummaryWriter(str(self._directory))
        for line in lines:
            self._add(line)
        self._writer.flush()

    def add(self, line: Line) -> None:
        self._add(line)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, line: Line) -> None:
        for key, value in _numbers(line).items():
            self._writer.add_scalar(key, value, line["epoch"])


class _Wandb:
    """One run there for a run here; its step is the epoch."""

    def __init__(
        self, section: TrackingSection, run_dir: Path, name: str, configuration: dict[str, Any]
    ) -> None:
        import wandb  # noqa: PLC0415  (an optional package)

        if section.wandb == "offline":  # a kill may have cut them off, or lost them altogether
            for earlier in run_dir.glob("wandb/offline-run-*"):
                shutil.rmtree(earlier)
        try:
            self._run = wandb.init(
                dir=run_dir,
                project=section.wandb_project,
                id=name,
                name=run_dir.name,
                resume="allow",
                mode="online" if section.wandb == "online" else "offline",
                config=configuration,
                settings=wandb.Settings(silent=True, console="off", init_timeout=60),
            )
        except (wandb.Error, OSError, TimeoutError) as error:
            raise PskdError(
                f"tracking.wandb {section.wandb}: {' '.join(str(error).split())}. Log in with "
                "`wandb login` or WANDB_API_KEY, or use --tracking.wandb offline."
            ) from error

    def begin(self, lines: list[Line]) -> None:
        for line in lines[self._run.step :]:  # offline: 0; else what follows the server's last
            self.add(line)

    def add(self, line: Line) -> None:
        self._run.log(_numbers(line), step=line["epoch"])

    def close(self) -> None:
        self._run.finish()


def _numbers(line: Line) -> dict[str, float]:
    """What can be drawn: of an epoch without evaluation there are no measures."""
    return {
        key: value
        for key, value in line.items()
        if key != "epoch" and isinstance(value, int | float)
    }
