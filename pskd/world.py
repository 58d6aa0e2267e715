"""This process among all: rank, device, process groups, failures that all ranks share."""

import ctypes
import os
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# Read by DeepSpeed when it is imported: without a GPU it would probe for other accelerators.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger

from pskd import launch
from pskd.errors import AgreedError, PskdError, together

DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class World:
    """The ranks of this job.

    control: a gloo group for host values, beside the device's. timeout: after which a silent peer
    counts as lost.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup
    timeout: timedelta

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on rank 0; nothing on the others."""
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(value, values if self.rank == 0 else None, dst=0, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def together(self) -> AbstractContextManager[None]:
        """Run a block that may fail on some ranks: if it fails on one, it fails on all.

        Raises:
            AgreedDamage: some files are damaged, and nothing else is wrong.
            AgreedError: the message of the lowest rank that failed otherwise, on every rank.
        """
        return together(self.gather)


def start(timeout_s: int) -> World:
    """Join the other processes of this job.

    Raises:
        PskdError: the others cannot be reached in time.
    """
    place = launch.from_environment()
    try:
        device = choose_device(place.local_rank, place.local_world_size, torch.cuda.device_count())
    except PskdError as error:
        if place.local_rank == 0:
            raise
        raise AgreedError(str(error)) from error  # known to its node's first rank, who says it
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return join(place, device, timeout_s, "run.timeout_s")


def join(place: launch.Launch, device: torch.device, timeout_s: int, limit: str) -> World:
    """As `start`, on a device that was chosen. limit: what the timeout is called in messages."""
    _quieten()
    if device.type == "cpu":
        keep_freed_memory()
    launch.choose_interface()
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        # Not left to DeepSpeed, which binds the group to this rank's GPU, also that of gloo: torch
        # then makes each later group by splitting NCCL's, which all ranks have to take part in.
        dist.init_process_group(backend, timeout=timeout)
        # verbose False: DeepSpeed would print the backend on every rank.
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup)
    except (RuntimeError, ValueError) as error:
        raise PskdError(
            f"rank {place.rank} of {place.world_size} could not reach the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {limit} "
            f"{timeout_s}: {error}"
        ) from error
    return World(
        rank=place.rank,
        size=place.world_size,
        local_rank=place.local_rank,
        local_size=place.local_world_size,
        device=device,
        control=control,
        timeout=timeout,
    )


def choose_device(local_rank: int, local_size: int, gpus: int) -> torch.device:
    """One GPU a rank where there are GPUs, else the CPU.

    Raises:
        PskdError: more ranks than GPUs on this node, or GPUs that torch cannot use.
    """
    if gpus == 0:
        if DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise PskdError(
                "this node has an NVIDIA driver, but torch finds no GPU that it can use: the "
                "driver may be older than torch's CUDA, or the container has no GPU. Update it, "
                "start the container with --gpus all, or set CUDA_VISIBLE_DEVICES= to train on the "
                "CPU."
            )
        return torch.device("cpu")
    if local_size > gpus:
        raise PskdError(
            f"{local_size} ranks on a node with {gpus} GPUs. Start at most {gpus} "
            "(--nproc-per-node), or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU."
        )
    return torch.device("cuda", local_rank)


def set_threads(requested: int, world: World) -> int:
    """Use `requested` CPU threads, or if 0 one with several ranks on the node, else all cores.

    Whatever the launcher exports: the number of threads changes the last bits of sums.
    """
    cores = len(os.sched_getaffinity(0))
    threads = requested or (1 if world.local_size > 1 else cores)
    torch.set_num_threads(threads)
    return threads


def stop(world: World) -> None:
    """Leave the job in step with the others, so that no rank sees a lost peer at the end."""
    dist.barrier(group=world.control)
    dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Gradients and activations are freed and allocated again in each step. glibc would give their
    memory back to the system in between, and the step would wait for it to be cleared, page by
    page: 1.5 % of a ResNet-18's.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc's
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(mmap_max, 0)


def _quieten() -> None:
    """DeepSpeed logs a dozen lines at start-up; warnings are ours to raise."""
    deepspeed_logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", module="deepspeed.*")
    # A shared-memory all-reduce that DeepSpeed builds with a C++ compiler at start-up on a CPU
    # (58 s, and a failure without compiler). gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
