"""A thread that does one thing after the other.

Our own and not a ThreadPoolExecutor: its `submit` shares a lock with the thread that it wakes, and
handing over 0.1 ms of work took the training thread 0.5 to 5 ms.
"""

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import torch


class Task:
    """Something that a worker will do, once."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._pending = threading.Lock()
        self._pending.acquire()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        return not self._pending.locked()

    def wait(self) -> None:
        """Until it has ended; raises what it has raised."""
        with self._pending:
            if self._error is not None:
                raise self._error

    def run(self) -> None:
        """On the worker's thread."""
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._pending.release()


class Worker:
    """One thread and its queue. A process may end without waiting for it."""

    def __init__(self, name: str, device: torch.device) -> None:
        """`device`: a GPU is made current on the thread first; else that is GPU 0, on any rank."""
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self.submit(partial(torch.cuda.set_device, index))

    def submit(self, work: Callable[[], None]) -> Task:
        """Do this after what was submitted before."""
        task = Task(work)
        self._queue.put(task)
        return task

    def close(self) -> None:
        """Do what was submitted, and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            task.run()
