"""A checkpoint is a transaction: the state of the whole run, whole or not there at all.

    checkpoints/latest                       name of the newest
    checkpoints/<epoch>-<step>/state.pt      what was registered; loads with weights_only=True
    checkpoints/<epoch>-<step>/manifest.json serial number, store list, sha256 of state.pt

Written aside, fsynced, renamed, `latest` last. <epoch>-<step> is the next step to train.
"""

import io
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from pskd.errors import PskdError
from pskd.files import (
    read_manifest,
    sha256_of,
    sync_directory,
    write_atomically,
    write_manifest,
)

_VERSION = 1


class Stateful(Protocol):
    """Whatever has state."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        ...


class Position(NamedTuple):
    """The next step to train, 0-based."""

    epoch: int
    step: int

    @property
    def name(self) -> str:
        """Of the checkpoint's directory."""
        return f"{self.epoch:06d}-{self.step:08d}"

    @classmethod
    def of(cls, name: str) -> "Position":
        """Of the checkpoint in a directory of that name."""
        epoch, step = name.split("-")
        return cls(int(epoch), int(step))


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self._keep = keep
        self._parts: dict[str, Stateful] = {}

    def register(self, name: str, part: Stateful) -> None:
        """From now on, save and load this part under this name."""
        assert name not in self._parts, f"{name} is registered twice"
        self._parts[name] = part

    def prepare(self) -> None:
        """Rank 0, at start: remove what a killed process left half written."""
        self.directory.mkdir(exist_ok=True)
        sync_directory(self.directory.parent)
        for aside in self.directory.glob(".*.tmp"):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()

    def save(self, position: Position) -> list[dict[str, Any]]:
        """Rank 0: save everything registered; returns the manifests of the retained checkpoints.

        Raises:
            PskdError: the disk is full or failed; the previous checkpoint is untouched.
        """
        if self.latest() == position.name:
            return self.retain()  # asked to stop right after a resume: it is there already
        return self._write(position, {name: p.state_dict() for name, p in self._parts.items()})

    def adopt(self, source: Path, state: dict[str, Any]) -> None:
        """Rank 0: begin with a checkpoint of another run, whose state may have been changed.

        Raises:
            PskdError: as `save`.
        """
        position = Position.of(source.name)
        aside = self._aside(position)
        try:
            self.open_aside(position, create=True)
            for path in source.iterdir():
                if path.name not in ("state.pt", "manifest.json"):  # the shards of ZeRO-1 and 2
                    shutil.copyfile(path, aside / path.name)
        except OSError as error:
            raise self._failed(position, error) from error
        self._write(position, state)

    def install(self, position: Position) -> list[dict[str, Any]]:
        """Another node has filled `open_aside`: from now on it is the latest checkpoint here.

        Raises:
            OSError: the disk failed.
        """
        for path in self._aside(position).iterdir():
            self._seal(path)
        return self._publish(position)

    def store_states(self) -> dict[str, dict[str, Any]]:
        """What each checkpoint names of the prediction store, by the checkpoint's name."""
        return {name: m["store"] for name, m in self._manifests().items() if m["store"]}

    def serial(self) -> int:
        """Of the latest checkpoint; -1 if there is none."""
        manifest = self._manifests().get(self.latest() or "")
        return -1 if manifest is None else int(manifest["serial"])

    def open_aside(self, position: Position, create: bool) -> Path:
        """Where the next checkpoint is put together; other ranks may add files before `save`.

        Raises:
            OSError: it cannot be made.
        """
        aside = self._aside(position)
        if create:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        return aside

    def latest(self) -> str | None:
        """Name of the newest checkpoint, or None.

        Raises:
            PskdError: `latest` cannot be read.
        """
        path = self.directory / "latest"
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise PskdError(f"{path} cannot be read: {error}. {self._remedy()}") from error

    def read(self, name: str) -> tuple[Position, dict[str, Any]]:
        """Verify and read a checkpoint; touches nothing.

        Raises:
            PskdError: missing or damaged; names the file.
        """
        directory = self.directory / name
        try:
            manifest = read_manifest(directory / "manifest.json", _VERSION)
            for file, digest in manifest["sha256"].items():
                if sha256_of(directory / file) != digest:
                    raise PskdError(
                        f"checkpoint file {directory / file} is damaged (sha256 differs). "
                        f"{self._remedy(name)}"
                    )
            state = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError) as error:
            raise PskdError(
                f"checkpoint {directory} cannot be read: {error}. {self._remedy(name)}"
            ) from error
        return Position(manifest["epoch"], manifest["step"]), state

    def restore(self, state: dict[str, Any]) -> None:
        """Hand each registered part its state."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def _manifests(self) -> dict[str, dict[str, Any]]:
        """Of every checkpoint that has a whole one."""
        found = {}
        for path in self.directory.glob("[0-9]*/manifest.json"):
            with suppress(ValueError):
                found[path.parent.name] = read_manifest(path, _VERSION)
        return found

    def retain(self) -> list[dict[str, Any]]:
        """Delete old checkpoints; returns the manifests of those that stay.

        The newest by serial number stay: after a resume from an older one, names go back.
        """
        manifests = self._manifests()
        latest = self.latest()
        by_age = sorted(manifests, key=lambda name: (name == latest, manifests[name]["serial"]))
        for name in by_age[: -self._keep]:
            self._delete(name)
        return [manifests[name] for name in by_age[-self._keep :]]

    def _write(self, position: Position, state: dict[str, Any]) -> list[dict[str, Any]]:
        aside = self._aside(position)
        try:
            if not aside.exists():  # else it holds shards
                self.open_aside(position, create=True)
            # Through memory: torch.save to a file turns a full disk into a nameless RuntimeError.
            content = io.BytesIO()
            torch.save(state, content)
            write_atomically(aside / "state.pt", content.getbuffer())
            manifest = {
                "serial": 1 + max((m["serial"] for m in self._manifests().values()), default=0),
                "epoch": position.epoch,
                "step": position.step,
                "store": state.get("store"),
                "sha256": {p.name: self._seal(p) for p in sorted(aside.iterdir())},
            }
            write_manifest(aside / "manifest.json", _VERSION, manifest)
            return self._publish(position)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise self._failed(position, error) from error

    def _publish(self, position: Position) -> list[dict[str, Any]]:
        # A process killed before it could write `latest` leaves the same content: replace it.
        self._delete(position.name)
        self._aside(position).rename(self.directory / position.name)
        sync_directory(self.directory)
        write_atomically(self.directory / "latest", position.name.encode())
        return self.retain()

    def _failed(self, position: Position, error: OSError) -> PskdError:
        return PskdError(
            f"checkpoint {self.directory / position.name} cannot be written: {error.strerror}. "
            "The run can be resumed from the one before: free some space and start again."
        )

    def _aside(self, position: Position) -> Path:
        return self.directory / f".{position.name}.tmp"

    def _seal(self, path: Path) -> str:
        """Make a file durable; its sha256."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return sha256_of(path)

    def _delete(self, name: str) -> None:
        """Renamed first: a checkpoint that is there is whole."""
        if (self.directory / name).exists():
            aside = (self.directory / name).rename(self.directory / f".{name}.old.tmp")
            shutil.rmtree(aside)

    def _remedy(self, name: str | None = None) -> str:
        others = {n: m["serial"] for n, m in self._manifests().items() if n != name}
        if not others:
            return "There is no other checkpoint: start a new run."
        before = max(others, key=lambda n: others[n])
        return f"To resume from the one before, write {before} into {self.directory}/latest."
