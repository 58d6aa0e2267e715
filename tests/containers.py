"""A real image, built from the Dockerfile on a Debian that is made here. As root, by podman."""

import os
import re
import resource
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launches import ROOT

_TOOLS = ("podman", "runc", "debootstrap")
_RELEASE = re.search(r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE)

needs_containers = pytest.mark.skipif(
    os.geteuid() != 0 or _RELEASE is None or not all(map(shutil.which, _TOOLS)),
    reason=f"needs root on a Debian, and {', '.join(_TOOLS)}",
)


def podman(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run podman; its output is captured."""
    done = subprocess.run(
        ["podman", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def site_paths() -> list[Path]:
    """What pip needs of this machine: its configuration, what that names, the certificates."""
    pip = [sys.executable, "-m", "pip", "config"]
    files, values = (
        subprocess.run([*pip, verb], capture_output=True, text=True, check=True).stdout
        for verb in ("debug", "list")
    )
    named = re.findall(r"(/\S+), exists: True", files) + re.findall(r"[\s='](/[^\s']+)", values)
    # The files of an index on a disk may lie beside it.
    named += [str(Path(index).parent) for index in re.findall(r"file://(/[^\s']+)", values)]
    named.append(ssl.get_default_verify_paths().capath or "/etc/ssl/certs")
    found = {Path(path) for path in named if Path(path).exists()}
    inside = {path for path in found for other in found if other in path.parents}
    return sorted(found - inside)


def configure(directory: Path) -> Path:
    """podman's settings for a machine without systemd that may not raise limits."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = directory / "containers.conf"
    path.write_text(
        f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc=30000:30000"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    )
    return path


@contextmanager
def built(directory: Path, name: str) -> Iterator[str]:
    """The image, for as long as the block runs; and NAME-base, on which it is built.

    Takes some minutes and 20 GB of disk.
    """
    assert _RELEASE is not None
    base = f"{name}-base"
    root, archive = directory / "debian", directory / "debian.tar"
    packages = "--include=python3,python3-dev,python3-venv"
    debootstrap = ["debootstrap", "--variant=minbase", packages, _RELEASE[1], str(root)]
    subprocess.run(debootstrap, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
    shutil.rmtree(root)
    try:
        podman("import", archive, base)
        archive.unlink()
        build = [
            "build",
            "--format=docker",
            "--isolation=chroot",
            "--network=host",
            "--layers=false",
        ]
        volumes = [f"--volume={path}:{path}:ro" for path in site_paths()]
        podman(*build, f"--build-arg=BASE_IMAGE={base}", *volumes, f"--tag={name}", ROOT)
        yield name
    finally:
        podman("rmi", "--force", name, base, check=False)
