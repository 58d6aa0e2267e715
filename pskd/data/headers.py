"""Sizes of many image files, read by several processes at once. Letter: N files.

PIL reads a header mostly in Python, so threads would wait for one another. The processes are
plain programs on pipes and not of `multiprocessing`: those would import the main script and torch
again, and outlive a parent that is killed.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pskd.errors import PskdError

Progress = Callable[[int, int], None]  # files done, files in all

_CHUNK = 100  # files of one question: some 20 ms of work
_PROGRAM = Path(__file__).with_name("header_worker.py")


@dataclass(frozen=True)
class Headers:
    """widths_N, heights_N: int32; bytes_N: int64. wrong: row -> reason, for files of no use."""

    widths_N: npt.NDArray[np.int32]
    heights_N: npt.NDArray[np.int32]
    bytes_N: npt.NDArray[np.int64]
    wrong: dict[int, str]


def read_headers(
    paths: Sequence[bytes],
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Headers:
    """Look at each file; `decode`: at its whole content too. workers: None is one a core.

    Raises:
        PskdError: a process was killed, or crashed on a file.
    """
    n = len(paths)
    headers = Headers(np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int64), {})
    starts = range(0, n, _CHUNK)
    count = min(workers or len(os.sched_getaffinity(0)), len(starts))
    if not count:
        return headers
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def ask(start: int) -> list[tuple[int, int, int, str]]:
        worker = idle.get()
        try:
            return _ask(worker, decode, paths[start : start + _CHUNK])
        finally:
            idle.put(worker)  # a dead one too: who waits for a worker shall not wait for ever

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(count))
        for _ in range(count):
            worker = _start()
            stack.callback(_end, worker)
            idle.put(worker)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # the first on the way out
        for start, answer in zip(starts, pool.map(ask, starts), strict=True):
            rows = slice(start, start + len(answer))
            widths, heights, sizes, reasons = zip(*answer, strict=True)
            headers.widths_N[rows] = widths
            headers.heights_N[rows] = heights
            headers.bytes_N[rows] = sizes
            headers.wrong.update((start + k, why) for k, why in enumerate(reasons) if why)
            if progress is not None:
                progress(rows.stop, n)
    return headers


@contextmanager
def bar(label: str) -> Iterator[Progress]:
    """A progress bar on a terminal, nothing elsewhere."""
    with tqdm(desc=label, unit=" files", leave=False, disable=not sys.stderr.isatty()) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def _start() -> subprocess.Popen[bytes]:
    # -P: the folder of the program is not searched for modules.
    command = [sys.executable, "-P", str(_PROGRAM)]
    # Ctrl-C is for the parent to handle: a terminal sends it to the process group.
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, process_group=0)


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Also in the middle of a question: what it did not take does not replace the reason."""
    worker.kill()
    for pipe in (worker.stdout, worker.stdin):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()
    worker.wait()


def _ask(
    worker: subprocess.Popen[bytes], decode: bool, paths: Sequence[bytes]
) -> list[tuple[int, int, int, str]]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        pickle.dump((decode, paths), worker.stdin)
        worker.stdin.flush()
        answer: list[tuple[int, int, int, str]] = pickle.load(worker.stdout)
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        raise PskdError(
            f"The process that reads images ended with exit code {worker.wait()} at one of "
            f"{len(paths)} files from {os.fsdecode(paths[0])!r} on. Try again, with fewer "
            f"--workers if memory is short; a file that crashes the decoder must be removed."
        ) from error
    return answer
