"""Whether the disk has room for what a run will keep there at its peak."""

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pskd.config import Config
from pskd.errors import PskdError
from pskd.files import existing
from pskd.methods import registry
from pskd.store.generation import generation_bytes
from pskd.store.registry import create_encoding
from pskd.weights import export_bytes
from pskd.words import counted, readable_bytes

_KEPT_IN = ("checkpoints/[0-9]*/*", "store/gen-*/*", "models/*")
_LINE_BYTES = 512  # of the history, an epoch
_HEAD_BYTES = 512  # that a file of torch.save spends on each tensor, about


@dataclass(frozen=True)
class Need:
    """What lies on the disk at once, at most; sizes are those of one, in bytes."""

    checkpoints: int
    checkpoint_bytes: int
    generations: int
    generation_bytes: int
    exports: int
    export_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of all together."""
        return (
            self.checkpoints * self.checkpoint_bytes
            + self.generations * self.generation_bytes
            + self.exports * self.export_bytes
        )

    def __str__(self) -> str:
        """For people."""
        parts = [
            f"{counted(count, what)}{' of predictions' * (what == 'generation')} "
            f"of {readable_bytes(size)}"
            for count, what, size in (
                (self.checkpoints, "checkpoint", self.checkpoint_bytes),
                (self.generations, "generation", self.generation_bytes),
                (self.exports, "export", self.export_bytes),
            )
            if count and size
        ]
        return f"{readable_bytes(self.total_bytes)} ({', '.join(parts)})"


def need(config: Config, state_bytes: int, generation_bytes: int, export_bytes: int) -> Need:
    """Of a run from its first epoch to its last.

    While a checkpoint is written, `keep` older ones are there. The oldest of them names the
    generation before its epoch, the newest at most `keep` - 1 epochs later; and one grows.
    """
    epochs, section = config.train.epochs, config.checkpoint
    every = section.export_every or epochs
    exports = {epochs, *range(every, epochs + 1, every)}
    return Need(
        checkpoints=section.keep + 1,
        checkpoint_bytes=state_bytes + _LINE_BYTES * epochs,
        generations=min(section.keep + 1, epochs) if generation_bytes else 0,
        generation_bytes=generation_bytes,
        exports=len(exports) + 2,  # the best, and the one that is being written
        export_bytes=export_bytes,
    )


def need_of(
    config: Config, model: nn.Module, *, n: int, classes: int, ranks: int, sharded: bool
) -> Need:
    """Of a run on n samples by so many ranks. model: any network of its kind. sharded: by ZeRO."""
    weights = sum(p.nbytes + _HEAD_BYTES for p in model.parameters())
    buffers = sum(b.nbytes + _HEAD_BYTES for b in model.buffers())
    # Of all ranks, once the optimizer has momentum. ZeRO's shards hold the weights once more.
    copies = 1 + int(config.optimizer.momentum != 0) + int(sharded)
    networks = int(config.model.ema_decay > 0) + int(registry.kind(config.method).keeps_network)
    row_bytes = create_encoding(config.store.encoding).row_bytes(classes)
    kept = config.method.keeps_predictions
    return need(
        config,
        state_bytes=copies * weights + buffers + networks * (weights + buffers),
        generation_bytes=generation_bytes(n, row_bytes, ranks) if kept else 0,
        export_bytes=export_bytes(model),
    )


def free_bytes(path: Path) -> int:
    """What is free where a directory lies, or will lie."""
    stat = os.statvfs(existing(path))
    return stat.f_bavail * stat.f_frsize


def check(run_dir: Path, need: Need) -> str:
    """Compare the need with what is free and what the run already holds; a line for the log.

    Raises:
        PskdError: it does not fit.
    """
    free = free_bytes(run_dir)
    held = sum(p.stat().st_blocks * 512 for part in _KEPT_IN for p in run_dir.glob(part))
    have = f"{readable_bytes(free)} are free and {readable_bytes(held)} held by the run"
    if need.total_bytes > free + held:
        raise PskdError(
            f"run directory {run_dir} will need {need} at its peak, but {have}. Free some space, "
            "choose another --run.dir, or keep less: checkpoint.keep, checkpoint.export_every, "
            "store.encoding."
        )
    return f"disk: {need} at the peak; {have}"
