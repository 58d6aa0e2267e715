"""Real launches of train.py: start, kill, wait, and look for what is left behind."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
DEADLINE_S = 240.0  # against a hang; a launch takes 6 to 15 s
MEASURES = ("train_loss", "lr", "alpha", "top1_error", "nll", "ece", "aurc")


class Job:
    """One launch of train.py on `processes` ranks: plain python for None, or by a launcher."""

    def __init__(
        self,
        run_dir: Path,
        *flags: str,
        processes: int | None = 2,
        launcher: str = "torchrun",
        **options: Any,
    ):
        self.run_dir = run_dir
        command = [sys.executable]
        if processes is not None and launcher == "deepspeed":
            command = [str(Path(sys.executable).with_name("deepspeed"))]
            command += ["--num_gpus", str(processes)]
        elif processes is not None:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}"]
        self.log = (
            options.pop("log_dir", run_dir.parent) / f"{run_dir.name}-{time.monotonic_ns()}.log"
        )
        program = options.pop("program", ROOT / "train.py")
        command = [*options.pop("prefix", []), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(program), "--run.dir", str(run_dir), *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                **options,
            )

    def wait(self) -> int:
        """The launcher's exit code."""
        return self.process.wait(DEADLINE_S)

    def output(self) -> str:
        """What it printed so far."""
        return self.log.read_text()

    def workers(self) -> list[psutil.Process]:
        """The training processes, by rank."""
        found = processes_of(self.run_dir)
        ranks = {}
        for process in found:
            try:
                rank = process.environ().get("RANK")
            except psutil.Error:
                continue
            if rank is not None or process.pid == self.process.pid:
                ranks[int(rank or 0)] = process
        return [ranks[rank] for rank in sorted(ranks)]

    def wait_until(self, ready: Any) -> None:
        """Until `ready()`; fails if the job ends before."""
        deadline = time.monotonic() + DEADLINE_S
        while not ready():
            assert self.process.poll() is None, f"ended early:\n{self.output()}"
            assert time.monotonic() < deadline, f"too slow:\n{self.output()}"
            time.sleep(0.01)

    def wait_for_epochs(self, epochs: int) -> None:
        """Until so many lines are in metrics.jsonl."""
        self.wait_until(lambda: len(metrics(self.run_dir)) >= epochs)


def cut_back(run_dir: Path, name: str) -> None:
    """As if the run, which keeps all its checkpoints, had ended with this one."""
    for checkpoint in (run_dir / "checkpoints").glob("[0-9]*"):
        if checkpoint.name > name:
            shutil.rmtree(checkpoint)
    (run_dir / "checkpoints" / "latest").write_text(name)


def wait_for_no_trace(run_dir: Path) -> None:
    """No process of the run, no lock that is held, nothing half written."""
    wait_for_no_process(run_dir)
    wait_for_no_lock(run_dir)
    assert not list(run_dir.rglob(".*.tmp"))


def wait_for_no_lock(run_dir: Path) -> None:
    """A killed process gives up its command line before its files."""
    deadline = time.monotonic() + 10
    with (run_dir / "lock").open() as lock:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "the lock is still held"
                time.sleep(0.05)


def train(run_dir: Path, *flags: str, processes: int | None = 2, **options: Any) -> Job:
    """Launch and wait."""
    job = Job(run_dir, *flags, processes=processes, **options)
    job.wait()
    return job


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Every living process whose command line names the run directory."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        if str(run_dir) in (process.info["cmdline"] or []):
            found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, at once."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def wait_for_no_process(run_dir: Path, within_s: float = 10) -> None:
    """No process of the run is left, within a generous deadline."""
    deadline = time.monotonic() + within_s
    while processes_of(run_dir):
        assert time.monotonic() < deadline, f"left behind: {processes_of(run_dir)}"
        time.sleep(0.05)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status(run_dir: Path) -> dict[str, Any]:
    """status.json."""
    return json.loads((run_dir / "status.json").read_text())


def result(run_dir: Path) -> dict[str, Any]:
    """result.json."""
    return json.loads((run_dir / "result.json").read_text())


def assert_same_result(run_dir: Path, reference: Path, epochs: int) -> None:
    """Weights and the measures of each epoch, to the bit."""
    assert result(run_dir)["weights_sha256"] == result(reference)["weights_sha256"]
    lines, expected = (
        [{name: line[name] for name in MEASURES} for line in metrics(path)]
        for path in (run_dir, reference)
    )
    assert lines == expected
    assert [line["epoch"] for line in metrics(run_dir)] == list(range(epochs))


def overwrite_weights(path):
    """The weights of a file, some of them overwritten, as a bad disk may do; it still unpickles."""
    import torch

    content = path.read_bytes()
    weights = torch.load(path, weights_only=True)
    weights = max((weights.get("net") or weights).values(), key=lambda tensor: tensor.nbytes)
    start = content.index(weights.numpy().tobytes()[:64])
    path.write_bytes(content[:start] + bytes(8) + content[start + 8 :])
