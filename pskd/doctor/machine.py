"""What a node has for its ranks: cores, memory, shared memory, open files."""

import os
import resource
from pathlib import Path

import psutil

from pskd.doctor.page import OK, WARNING, Line
from pskd.words import counted, readable_bytes

_RANK_BYTES = 1.5e9  # a rank on the CPU was seen to take 1.1 to 1.3 GB with small networks
_NCCL_BYTES = 1e9  # NVIDIA's advice for containers: --shm-size=1g
_FILES, _FILES_A_RANK = 512, 16  # libraries and data; sockets to each other rank
_CGROUP = Path("/sys/fs/cgroup")


def cores(ranks: int) -> Line:
    """That this process may use, for the ranks of the node."""
    usable = len(os.sched_getaffinity(0))
    quota = _quota()
    text = f"{usable} usable by {counted(ranks, 'rank')}"
    if quota is not None and quota < usable:
        text += f", limited to the time of {quota:.1f}"
    if ranks > min(usable, quota or usable):
        remedy = "Ranks will wait for each other: start fewer (--nproc-per-node), or give it more."
        return Line("cores", WARNING, text, remedy)
    return Line("cores", OK, text)


def memory(ranks: int) -> Line:
    """That is available, within the container's limit."""
    available = psutil.virtual_memory().available
    limit = _number("memory.max", "memory/memory.limit_in_bytes")
    used = _number("memory.current", "memory/memory.usage_in_bytes")
    if limit is not None and used is not None:
        available = min(available, max(0, int(limit - used)))
    text = f"{readable_bytes(available)} available"
    if available < ranks * _RANK_BYTES:
        least = readable_bytes(ranks * _RANK_BYTES)
        remedy = f"{ranks} ranks take {least} and more: start fewer, or give it more."
        return Line("memory", WARNING, text, remedy)
    return Line("memory", OK, text)


def shared_memory(gpu_ranks: int, path: Path = Path("/dev/shm")) -> Line:
    """NCCL moves gradients between the GPUs of a node through it; nothing else here uses it.

    gpu_ranks: on this node.
    """
    if gpu_ranks < 2:
        why = "ranks on the CPU do not use it" if gpu_ranks == 0 else "one rank does not use it"
    else:
        why = f"{gpu_ranks} ranks on GPUs exchange gradients through it"
    try:
        stat = os.statvfs(path)
    except OSError as error:
        size = free = 0
        text = f"{path}: {error.strerror}; {why}"
    else:
        size, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
        text = f"{path}: {readable_bytes(free)} free of {readable_bytes(size)}; {why}"
    if gpu_ranks > 1 and free < _NCCL_BYTES:
        remedy = "Give it 1 GB: docker run --ipc=host, or --shm-size=1g."
        return Line("shared memory", WARNING, text, remedy)
    return Line("shared memory", OK, text)


def open_files(world: int, limit: int | None = None) -> Line:
    """How many this process may open. world: ranks of the job."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY:
        return Line("open files", OK, "unlimited")
    least = _FILES + _FILES_A_RANK * world
    if soft < least:
        remedy = f"Raise it where the run is started: ulimit -n {least} (docker run --ulimit)."
        return Line("open files", WARNING, f"at most {soft}", remedy)
    return Line("open files", OK, f"at most {soft}")


def _quota() -> float | None:
    """Cores' worth of time that the container may use; None: all."""
    two = _CGROUP / "cpu.max"
    if two.is_file():
        quota, period = two.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota_us = _number("", "cpu/cpu.cfs_quota_us")
    period_us = _number("", "cpu/cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _number(second: str, first: str) -> float | None:
    """A value of control groups, of version 2 or 1."""
    for name in (second, first):
        path = _CGROUP / name
        if name and path.is_file():
            text = path.read_text().strip()
            return None if text == "max" else float(text)
    return None
