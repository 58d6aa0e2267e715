"""Where the time of a step goes: torch's profiler around some steps of a run."""

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("pskd")

WARM_UP = 10  # steps before those that are traced
# What makes the host wait for the device, or copies between them.
_WAITS = (
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "Memcpy DtoH",
    "Memcpy HtoD",
)


class Profile:
    """Traces the steps after the first `WARM_UP` of this start, into DIR/profile/.

    trace.json.gz is for Perfetto (ui.perfetto.dev) or chrome://tracing; summary.txt for people.
    """

    def __init__(self, directory: Path, steps: int) -> None:
        self._directory = directory / "profile"
        self._steps = steps
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says that there is no GPU
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profiler.start()
        self._done = 0
        self._begun_s = 0.0
        self._waits_s: dict[str, float] = {}
        self._waited_s: dict[str, float] = {}

    def step(self, waits_s: dict[str, float]) -> None:
        """One more step is queued. waits_s: seconds waited for each cause in this epoch."""
        self._done += 1
        if self._done > WARM_UP + self._steps:
            return
        if self._done > WARM_UP:
            for cause, seconds in waits_s.items():
                since = seconds - self._waits_s.get(cause, 0.0)
                # A new epoch counts from nought again.
                more = since if since >= 0 else seconds
                self._waited_s[cause] = self._waited_s.get(cause, 0.0) + more
        else:
            self._begun_s = time.monotonic()
        self._waits_s = waits_s
        self._profiler.step()

    def close(self) -> None:
        """At the run's end: what there is of a trace."""
        if self._done < WARM_UP + self._steps:
            self._profiler.stop()  # writes, if something was traced
            log.warning(
                "run.profile %d: this start trained %d steps, and the first %d warm up. Train "
                "longer, or trace fewer.",
                self._steps,
                self._done,
                WARM_UP,
            )

    def _write(self, profiler: Any) -> None:
        steps = self._done - WARM_UP
        if steps < 1:
            return
        wall_s = (time.monotonic() - self._begun_s) / steps
        self._directory.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._directory / "trace.json.gz"))
        events = profiler.key_averages()
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        lines = [
            f"{steps} steps, {1e3 * wall_s:.2f} ms each, on rank 0, under the profiler",
            *(
                f"waited for {cause}: {seconds / steps / wall_s:.2%} of the time"
                for cause, seconds in self._waited_s.items()
            ),
            *_waits(events, steps),
            "",
            events.table(sort_by=key, row_limit=40, max_name_column_width=60),
        ]
        (self._directory / "summary.txt").write_text("\n".join(lines) + "\n")
        log.info("profile of %d steps: %s", steps, self._directory)


def _waits(events: Iterable[Any], steps: int) -> list[str]:
    counts = {
        event.key: event.count / steps
        for event in events
        if any(event.key.startswith(name) for name in _WAITS)
    }
    said = ", ".join(f"{name} {count:.1f}" for name, count in sorted(counts.items()))
    return [f"waits and copies between host and device, times a step: {said or 'none'}"]
