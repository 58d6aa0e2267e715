"""Versions and compilers, against what the program asks for and what it was tested with."""

import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

from pskd.config import Config
from pskd.doctor.page import OK, WARNING, WRONG, Line

_LOCK = Path(__file__).parents[2] / "requirements.lock"  # in a checkout, not in a wheel
_PACKAGES = ("torch", "torchvision", "deepspeed", "numpy")
_INSTALL = "Install it again: scripts/setup.sh, or pip install in the environment that trains."


def versions() -> list[Line]:
    """Of Python and the packages that results and collectives depend on."""
    needs = _minima()
    tested = _tested()
    lines = [_judged("Python", platform.python_version(), needs.get("python"), None)]
    for name in _PACKAGES:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            lines.append(Line(name, WRONG, "not installed", _INSTALL, alike=True))
            continue
        lines.append(_judged(name, found, needs.get(name), tested.get(name)))
    return lines


def dali_version() -> str | None:
    """Of the DALI that is installed, for one CUDA generation or the other."""
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def compiler(config: Config) -> Line:
    """Nothing is compiled unless engine.compile asks for it: see `world.py`."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if config.engine.compile and found is None:
        return Line(
            "compiler",
            WRONG,
            f"engine.compile true needs a C++ compiler, and {name} is not found",
            "Install g++ or name one with CXX, or leave engine.compile out.",
        )
    need = "for engine.compile" if config.engine.compile else "not needed without engine.compile"
    ninja = "ninja" if shutil.which("ninja") else "no ninja"
    return Line("compiler", OK, f"{found or 'none'}, {ninja}; {need}")


def _judged(name: str, found: str, least: str | None, tested: str | None) -> Line:
    """A version against the least one, and the one that was tested."""
    if least is not None and _numbers(found) < _numbers(least):
        text = f"{found}, but {least} or newer is needed"
        return Line(name, WRONG, text, _INSTALL, alike=True)
    if tested is not None and found.partition("+")[0] != tested:
        return Line(
            name,
            WARNING,
            f"{found}; tested with {tested} (requirements.lock)",
            "Other versions may work, and may change the last bits.",
            alike=True,
        )
    return Line(name, OK, found, alike=True)


def _minima() -> dict[str, str]:
    """Package -> least version, from the metadata of the installed package."""
    try:
        found = metadata.metadata("pskd")
    except metadata.PackageNotFoundError:
        return {}
    entries = [*(found.get_all("Requires-Dist") or []), f"python{found['Requires-Python']}"]
    matches = (re.match(r"([\w-]+)>=([\d.]+)", entry) for entry in entries)
    return {match[1]: match[2] for match in matches if match}


def _tested() -> dict[str, str]:
    if not _LOCK.is_file():
        return {}
    pairs = (line.strip().split("==", 1) for line in _LOCK.read_text().splitlines() if "==" in line)
    return dict(pairs)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
