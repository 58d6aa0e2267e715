"""What rank 0 says while it trains: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from typing import Any, Self

from tqdm import tqdm

LINE_EVERY_S = 30.0

_SLOW_DISK = 0.01  # of the time of training: below it, a wait is not worth a warning

log = logging.getLogger("pskd")


class Progress:
    """Progress of one epoch in images; the loss shown is that of the step before."""

    def __init__(self, label: str, images: int, constants: dict[str, float]) -> None:
        self._label = label
        self._images = images
        self._constants = {name: f"{value:.4g}" for name, value in constants.items()}
        self._done = 0
        self._start = self._said = time.monotonic()
        self._speaks = log.isEnabledFor(logging.INFO)
        self._bar: tqdm[Any] | None = None
        if self._speaks and sys.stderr.isatty():
            self._bar = tqdm(total=images, desc=label, unit=" images", leave=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, images: int, loss: float, waits_s: dict[str, float]) -> None:
        """One more step is queued. waits_s: for what this rank waited in the epoch, how long."""
        self._done += images
        now = time.monotonic()
        shares = {what: f"{s / (now - self._start):.0%}" for what, s in waits_s.items()}
        if self._bar is not None:
            shown = {"loss": f"{loss:.4f}", **self._constants}
            shown |= {f"{what} wait": share for what, share in shares.items()}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(images)
        elif self._speaks and now - self._said >= LINE_EVERY_S:
            self._said = now
            log.info(
                "%s: %d of %d images, loss %.4f%s, %.0f images/s, %s",
                self._label,
                self._done,
                self._images,
                loss,
                "".join(f", {name} {value}" for name, value in self._constants.items()),
                self._done / (now - self._start),
                ", ".join(f"{what} wait {share}" for what, share in shares.items()),
            )


def readable(line: dict[str, Any]) -> str:
    """A line of metrics.jsonl for people."""
    alpha = f"alpha {line['alpha']:.2f}, " if "alpha" in line else ""
    text = f"loss {line['train_loss']:.4f}, {alpha}"
    rate = f"{line['images_per_s']:.0f} images/s{_waits(line)}"
    if line["top1_error"] is None:  # this epoch was not evaluated
        return text + rate
    top5 = f"top-5 error {line['top5_error']:.2f} %, " if line["top5_error"] is not None else ""
    return (
        f"{text}top-1 error {line['top1_error']:.2f} %, {top5}NLL {line['nll']:.4f}, "
        f"ECE {line['ece']:.2f} %, AURC {line['aurc']:.2f}, {rate}"
    )


def _waits(line: dict[str, Any]) -> str:
    """What share of the training time the rank that waited longest waited for what."""
    shares = (
        f"{what} {line[key] / line['train_s']:.1%}"
        for what, key in (("data", "data_wait_s"), ("the store", "store_wait_s"))
        if line.get("train_s") and key in line
    )
    text = ", ".join(shares)
    return f" (waited for {text})" if text else ""


def is_slow_disk(waited_s: float, train_s: float) -> bool:
    """Whether the user should hear that training waited for the disk of the prediction store."""
    return waited_s > _SLOW_DISK * train_s
