"""A checkpoint is a transaction: the state of the whole run, whole or not there at all.

    checkpoints/latest                       name of the newest
    checkpoints/<epoch>-<step>/state.pt      what was registered; loads with weights_only=True
    checkpoints/<epoch>-<step>/manifest.json serial number, store list, sha256 of state.pt

Written aside, fsynced, renamed, `latest` last. <epoch>-<step> is the next step to train. What turns
out to be damaged is set aside as damaged-<epoch>-<step>, and does not count any more.
"""

import io
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from pskd.errors import DamagedError, PskdError
from pskd.files import (
    VersionError,
    read_manifest,
    sha256_of,
    sync_directory,
    write_atomically,
    write_manifest,
)

_VERSION = 1
_NAME = re.compile(r"\d+-\d+")
_REMEDY = "Name another checkpoint, or start a new run."
_UNREADABLE = -1  # serial number of a checkpoint whose manifest is damaged


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

    def __init__(self, directory: Path, keep: int = 1) -> None:
        """keep: how many `retain` leaves; who only reads has no use for it."""
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

    def save(self, position: Position) -> None:
        """Rank 0: save everything registered; older checkpoints stay until `retain`.

        Raises:
            PskdError: the disk is full or failed; the previous checkpoint is untouched.
        """
        if self.latest() == position.name:
            return  # asked to stop right after a resume: it is there already
        self._write(position, {name: p.state_dict() for name, p in self._parts.items()})

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

    def install(self, position: Position) -> None:
        """Another node has filled `open_aside`: from now on it is the latest checkpoint here.

        Raises:
            OSError: the disk failed.
        """
        for path in self._aside(position).iterdir():
            self._seal(path)
        self._publish(position)

    def store_states(self) -> dict[str, dict[str, Any]]:
        """What each checkpoint names of the prediction store, by the checkpoint's name."""
        return {name: m["store"] for name, m in self._manifests().items() if m and m["store"]}

    def serial(self) -> int:
        """Of the latest checkpoint; -1 if there is none."""
        return self.serials().get(self.latest() or "", _UNREADABLE)

    def serials(self) -> dict[str, int]:
        """Of every checkpoint; -1 if its manifest is damaged."""
        return {name: _serial(manifest) for name, manifest in self._manifests().items()}

    def size_bytes(self, position: Position) -> int:
        """Of all files of a checkpoint."""
        return sum(p.stat().st_size for p in (self.directory / position.name).iterdir())

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
        """Name of the newest checkpoint; None if `latest` is missing or names nothing here.

        Raises:
            OSError: `latest` cannot be read, though it is there.
        """
        try:
            name = (self.directory / "latest").read_text().strip()
        except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
            return None
        whole = _NAME.fullmatch(name) is not None and (self.directory / name).is_dir()
        return name if whole else None

    def exist(self) -> bool:
        """Whether there is anything to resume, be it damaged."""
        return (self.directory / "latest").exists() or bool(self._names())

    def go_on_from(self, name: str, damaged: list[str]) -> None:
        """`name` has been loaded and is the newest from now on; the damaged ones are set aside.

        What was written after it stays for a while, as older ones do.

        Raises:
            OSError: the disk failed.
        """
        for each in damaged:
            if (self.directory / each).exists():
                aside = self.directory / f"damaged-{each}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / each).rename(aside)
        sync_directory(self.directory)
        serials = self.serials()
        if any(serial >= serials[name] for n, serial in serials.items() if n != name):
            path = self.directory / name / "manifest.json"
            manifest = read_manifest(path, _VERSION)
            write_manifest(path, _VERSION, manifest | {"serial": 1 + max(serials.values())})
        if self.latest() != name:
            write_atomically(self.directory / "latest", name.encode())

    def read(self, name: str) -> tuple[Position, dict[str, Any]]:
        """Verify and read a checkpoint; touches nothing.

        Raises:
            DamagedError: missing or damaged; names the file.
            PskdError: of another version, not to be read, or it would execute something.
        """
        directory = self.directory / name
        manifest = self.verify(name)
        try:
            state = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            # Its sha256 is right, so nothing has damaged it: somebody else wrote it.
            raise PskdError(
                f"checkpoint file {directory / 'state.pt'} holds other things than tensors, "
                f"numbers and text. It was not executed. Who put it there? {_REMEDY}"
            ) from error
        return Position(manifest["epoch"], manifest["step"]), state

    def verify(self, name: str) -> dict[str, Any]:
        """Compare a checkpoint's files with its manifest, and return that.

        Raises:
            DamagedError: missing or damaged; names the file.
            PskdError: of another version, or not to be read.
        """
        directory = self.directory / name
        try:
            manifest = read_manifest(directory / "manifest.json", _VERSION)
            for file, digest in manifest["sha256"].items():
                if sha256_of(directory / file) != digest:
                    raise DamagedError(
                        f"checkpoint file {directory / file} is damaged (sha256 differs).", _REMEDY
                    )
        except (VersionError, PermissionError) as error:
            raise PskdError(f"checkpoint {directory} cannot be read: {error}. {_REMEDY}") from error
        except (OSError, ValueError) as error:
            raise DamagedError(
                f"checkpoint {directory} cannot be read: {error}.", _REMEDY
            ) from error
        return manifest

    def restore(self, state: dict[str, Any], *names: str) -> None:
        """Hand each registered part its state; or only the parts of these names."""
        for name, part in self._parts.items():
            if not names or name in names:
                part.load_state_dict(state[name])

    def _names(self) -> list[str]:
        return [p.name for p in self.directory.glob("[0-9]*") if _NAME.fullmatch(p.name)]

    def _manifests(self) -> dict[str, dict[str, Any] | None]:
        """Of every checkpoint, None if it is damaged. Those of another version are left out."""
        found: dict[str, dict[str, Any] | None] = {}
        for name in self._names():
            try:
                found[name] = read_manifest(self.directory / name / "manifest.json", _VERSION)
            except VersionError:
                continue
            except (FileNotFoundError, ValueError):
                found[name] = None
        return found

    def retain(self) -> list[dict[str, Any]]:
        """Delete old checkpoints; returns the manifests of those that stay.

        The newest by serial number stay: after a resume from an older one, names go back.
        """
        manifests, latest = self._manifests(), self.latest()
        by_age = sorted(manifests, key=lambda name: (name == latest, _serial(manifests[name])))
        for name in by_age[: -self._keep]:
            self._delete(name)
        return [m for name in by_age[-self._keep :] if (m := manifests[name]) is not None]

    def _write(self, position: Position, state: dict[str, Any]) -> None:
        aside = self._aside(position)
        try:
            if not aside.exists():  # else it holds shards
                self.open_aside(position, create=True)
            # Through memory: torch.save to a file turns a full disk into a nameless RuntimeError.
            content = io.BytesIO()
            torch.save(state, content)
            write_atomically(aside / "state.pt", content.getbuffer())
            manifest = {
                "serial": 1 + max(self.serials().values(), default=0),
                "epoch": position.epoch,
                "step": position.step,
                "store": state.get("store"),
                "sha256": {p.name: self._seal(p) for p in sorted(aside.iterdir())},
            }
            write_manifest(aside / "manifest.json", _VERSION, manifest)
            self._publish(position)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise self._failed(position, error) from error

    def _publish(self, position: Position) -> None:
        # A process killed before it could write `latest` leaves the same content: replace it.
        self._delete(position.name)
        self._aside(position).rename(self.directory / position.name)
        sync_directory(self.directory)
        write_atomically(self.directory / "latest", position.name.encode())

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


def _serial(manifest: dict[str, Any] | None) -> int:
    return _UNREADABLE if manifest is None else int(manifest["serial"])
