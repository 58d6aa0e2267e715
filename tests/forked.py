"""Jobs without a launcher whose ranks are forked from a process that has imported everything.

The same program and the same collectives as in a real launch, at a tenth of its cost; what a
launcher does is tested by real launches (`launches.py`).
"""

import ctypes
import functools
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from pskd.errors import EXIT_FAILED
from tests.launches import DEADLINE_S, Job


def _nurse(pipe: Connection) -> None:
    """Answers (program, argv, environment, log, disk) with a rank's pid; a pid with its exit code,
    or None. program: pskd.entry or pskd.cli. disk: of this rank alone, (source, where), or None.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    # As in a process of its own, not "spawn": tqdm's lock would outlive the rank in shared memory.
    multiprocessing.set_start_method(None, force=True)
    import deepspeed.ops
    import torch._dynamo  # noqa: F401  (torch imports it with the first optimizer)

    import pskd.command_line
    import pskd.data.dali
    import pskd.doctor.checks
    import pskd.job  # noqa: F401
    from pskd.data import digits
    from pskd.data.catalog import DATASETS
    from pskd.models import MODELS

    assert deepspeed.ops.__compatible_ops__  # a second of probing, once

    MODELS["plain"] = ("tests.plain_network", {})  # a network of the user's own
    DATASETS["flipped-fashion-mnist"] = "tests.flipped_fashion_mnist"  # and a data set
    digits.load(None, False)
    while True:
        asked = pipe.recv()
        if isinstance(asked, int):
            pid, status = os.waitpid(asked, os.WNOHANG)
            pipe.send(os.waitstatus_to_exitcode(status) if pid else None)
            continue
        program, argv, environment, log, disk = asked
        pid = os.fork()
        if pid == 0:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.environ.update(environment)
            if disk is not None:
                _mount(*disk)
            os._exit(importlib.import_module(program).main(argv))
        pipe.send(pid)


def _mount(source: Path, where: Path) -> None:
    """In a mount namespace of this process's own."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", source, where], check=True)


@functools.cache
def _nursery() -> Connection:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_nurse, args=(there,), daemon=True).start()
    return here


def _ask(question: object) -> int | None:
    nursery = _nursery()
    nursery.send(question)
    assert nursery.poll(DEADLINE_S), "the nursery hangs"
    answer: int | None = nursery.recv()
    return answer


class _Ranks:
    """The ranks of a job, with the part of a Popen's interface that tests use."""

    def __init__(
        self,
        argv: list[str],
        environments: list[dict[str, str]],
        log: Path,
        program: str,
        disks: Sequence[tuple[Path, Path] | None],
    ) -> None:
        self.pids = [
            _ask((program, argv, environment, str(log), disk))
            for environment, disk in zip(environments, disks, strict=True)
        ]
        self.pid = self.pids[0]
        self._codes: dict[int, int] = {}

    @property
    def returncode(self) -> int | None:
        """0 if all ranks ended well; of a single rank its own code; else 1."""
        codes = list(self._codes.values())
        if len(codes) < len(self.pids):
            return None
        return codes[0] if len(codes) == 1 else int(any(codes))

    @property
    def living(self) -> list[int]:
        """Pids of the ranks that had not ended at the last look."""
        return [pid for pid in self.pids if pid not in self._codes]

    def poll(self) -> int | None:
        """As `returncode`, after a look. As launchers do, ends all when one has failed."""
        for pid in self.living:
            if (code := _ask(pid)) is not None:
                self._codes[pid] = code
                if code == EXIT_FAILED:
                    self.send_signal(signal.SIGTERM)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Until all have ended."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("ranks", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """To every rank that lives."""
        for pid in self.living:
            os.kill(pid, number)


class ForkedJob(Job):
    """As `Job`; processes None: a single process that no launcher has set variables for."""

    def __init__(
        self,
        run_dir: Path,
        *flags: str,
        processes: int | None = 2,
        program: str = "pskd.entry",
        command: Sequence[str] = (),
        disks: Sequence[Path] = (),
        **variables: str,
    ) -> None:
        """`disks`: of each rank, which is then a node; they see them as the run directory.
        variables: of the environment, for all ranks.
        """
        self.run_dir = run_dir
        self.log = run_dir.parent / f"{run_dir.name}-{time.monotonic_ns()}.log"
        self.log.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environments = [
            {
                **job,
                "RANK": str(rank),
                "LOCAL_RANK": "0" if disks else str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": "1" if disks else str(processes),
                **variables,
            }
            for rank in range(processes or 0)
        ]
        argv = [*command, "--run.dir", str(run_dir), *map(str, flags)]
        environments = environments or [variables]
        private = [(disk, run_dir) for disk in disks] or [None] * len(environments)
        self.process = _Ranks(argv, environments, self.log, program, private)

    def workers(self) -> list[psutil.Process]:
        """The living ranks, in order."""
        self.process.poll()
        return [psutil.Process(pid) for pid in self.process.living]


def doctor(run_dir: Path, *flags: str, processes: int | None = None, **options: Any) -> ForkedJob:
    """`pskd doctor`: start and wait."""
    job = ForkedJob(
        run_dir, *flags, processes=processes, program="pskd.cli", command=["doctor"], **options
    )
    job.wait()
    return job


def train(run_dir: Path, *flags: str, processes: int | None = 2) -> ForkedJob:
    """Start and wait."""
    job = ForkedJob(run_dir, *flags, processes=processes)
    job.wait()
    return job
