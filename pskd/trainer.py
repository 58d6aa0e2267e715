"""The loop, readable top to bottom.

Letters: B samples of a step on this rank, C classes.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pskd import mirror
from pskd.checkpoint import Checkpoints, Position
from pskd.config import Config
from pskd.data.interface import Data
from pskd.data.mix import Mixer
from pskd.engine import Engine
from pskd.errors import EXIT_COMPLETE, EXIT_STOPPED, AgreedError
from pskd.guard import Guard, StopRequest
from pskd.hashing import hash64
from pskd.methods.interface import Method, Past
from pskd.metrics import MEASURES, Accumulator, Records, measures
from pskd.order import Ids, Plan, Walk, epoch_order
from pskd.progress import Progress, readable
from pskd.run_dir import RunDir, Status
from pskd.schedule import lr_at
from pskd.sites import Sites
from pskd.store.store import Store
from pskd.weights import export_weights, weights_sha256
from pskd.world import World

log = logging.getLogger("pskd")


@dataclass
class History:
    """What has been measured so far; part of every checkpoint.

    lines: of metrics.jsonl. best: the line of lowest top-1 error, the earliest of equals.
    loss_sum, samples: over the steps of the epoch in progress. absent: ids of images that could
    not be decoded, of this rank only until they are gathered.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    loss_sum: float = 0.0
    samples: int = 0
    absent: list[int] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All fields."""
        vars(self).update(state)


@dataclass
class _Step:
    """A trained step whose verdict is not known yet.

    ids_B: this rank's samples. strangers: places whose predictions are not remembered.
    """

    epoch: int
    step: int
    ids_B: Ids
    loss_B: Tensor
    remember_BC: Tensor | None
    strangers: list[int]


@dataclass
class Trainer:
    """Everything that a run consists of; `run` trains it from a position to its end."""

    config: Config
    world: World
    sites: Sites
    run_dir: RunDir
    data: Data
    mixer: Mixer
    plan: Plan
    num_classes: int
    engine: Engine
    method: Method
    store: Store | None
    checkpoints: Checkpoints
    history: History
    status: Status | None  # on rank 0

    def __post_init__(self) -> None:
        self._guard = Guard(self.world)
        self._stop = StopRequest()
        self._pending: _Step | None = None
        self._stopping = False
        self._loss = float("nan")
        self._saved: Position | None = None

    def run(self, position: Position) -> int:
        """Train from `position` on; returns the exit code."""
        first_step = position.step
        self._saved = position
        walk = Walk(self.plan, self.config.train.seed, self.config.train.epochs, self.world.rank)
        self.data.begin(walk, *position)
        with self._stop.listening():
            self._begin(position)
            for epoch in range(position.epoch, self.config.train.epochs):
                constants = self.method.begin_epoch(epoch, self.config.train.epochs)
                started = time.monotonic()
                if not self._train_epoch(epoch, first_step, constants):
                    return EXIT_STOPPED
                seconds = time.monotonic() - started
                self._finish_epoch(epoch, constants, self._trained_images(first_step) / seconds)
                first_step = 0
            self._complete()
        return EXIT_COMPLETE

    def _begin(self, position: Position) -> None:
        """Rank 0: say that the run is on, and finish what a kill may have cut off."""
        if self.status is None:
            return
        self.status.write("running", None, *position)
        self.run_dir.write_metrics(self.history.lines)
        if position.step == 0 and self.history.lines:
            self._export()

    def _train_epoch(self, epoch: int, first_step: int, constants: dict[str, float]) -> bool:
        """Train the steps of an epoch from `first_step` on; False if asked to stop."""
        order_N = epoch_order(self.config.train.seed, epoch, self.plan.n)
        every = self.config.checkpoint.every_steps
        self.engine.train()
        if self.store is not None:
            self.store.begin_epoch(epoch)
        with Progress(self._label(epoch), self._trained_images(first_step), constants) as progress:
            for step in range(first_step, self.plan.steps):
                trained = self._train_step(order_N, epoch, step)
                self._settle()
                self._pending = trained
                self._guard.submit(self._stop.signal is not None, trained.loss_B.sum())
                progress.advance(self.plan.batch_size(step), self._loss)
                self._beat(epoch, step + 1)
                last = step + 1 == self.plan.steps
                due = every > 0 and (step + 1) % every == 0 and not last
                if last or due or self._stopping:
                    self._settle()
                if due or self._stopping:
                    self._save(Position(epoch, step + 1))
                if self._stopping:
                    self._say_stopped(epoch, step + 1)
                    return False
        return True

    def _train_step(self, order_N: Ids, epoch: int, step: int) -> _Step:
        """One optimizer step of this rank."""
        micros = self.plan.micro_batches(order_N, epoch, step, self.world.rank)
        ids_B = self._ids(order_N, epoch, step)
        past = self._past(ids_B)
        if self.store is not None and step + 1 < self.plan.steps:
            self.store.prefetch(self._ids(order_N, epoch, step + 1))
        lr = self._lr(epoch, step)
        losses, rows, first = [], [], 0
        strangers: list[int] = []
        for micro in micros:
            part = slice(first, first + len(micro.ids_B))
            first = part.stop
            self._seed_generators(epoch, step, micro.micro)
            batch = self.mixer(self.data.train_batch(micro), epoch)
            self.history.absent += ids_B[part][list(batch.absent)].tolist()
            strangers += [first - len(micro.ids_B) + place for place in batch.strangers()]
            output = self.method(self.engine.forward, batch, past and past.part(part))
            loss_B = output.loss_B * batch.weight_B * micro.scale
            self.engine.backward_and_step(loss_B.sum(), lr)
            losses.append(loss_B.detach() / len(micros))
            if output.remember_BC is not None:
                rows.append(output.remember_BC)
        remember_BC = torch.cat(rows) if rows else None
        return _Step(epoch, step, ids_B, torch.cat(losses), remember_BC, strangers)

    def _settle(self) -> None:
        """Read the verdict on the step before; only then do its rows go to the disk.

        Raises:
            AgreedError: a loss was not finite; names epoch, step and samples.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        verdict = self._guard.read()
        if verdict.bad:
            self._refuse_bad_loss(step)
        if self.store is not None and step.remember_BC is not None:
            self._remember(self.store, step.ids_B, step.remember_BC, step.strangers)
        self._loss = verdict.loss
        self._stopping = self._stopping or verdict.stop
        size = self.plan.batch_size(step.step)
        self.history.loss_sum += verdict.loss * size
        self.history.samples += size

    def _remember(self, store: Store, ids_B: Ids, rows_BC: Tensor, strangers: list[int]) -> None:
        """Samples whose image showed mostly something else keep their older rows."""
        if strangers:
            known = np.setdiff1d(np.arange(len(ids_B)), strangers)
            ids_B, rows_BC = ids_B[known], rows_BC[torch.from_numpy(known).to(rows_BC.device)]
        store.remember(ids_B, rows_BC)

    def _refuse_bad_loss(self, step: _Step) -> None:
        finite_B = torch.isfinite(step.loss_B).cpu().numpy()
        bad = sorted(i for ids in self.world.gather(step.ids_B[~finite_B].tolist()) for i in ids)
        raise AgreedError(
            f"the loss is not finite in epoch {step.epoch}, step {step.step}, samples {bad}. "
            "Nothing of this step was saved. Lower optimizer.lr, add schedule.warmup_epochs or "
            "optimizer.clip_norm, in a new run."
        )

    def _finish_epoch(self, epoch: int, constants: dict[str, float], rate: float) -> None:
        """Close the generation of predictions, measure, log, save."""
        if self.store is not None:
            self.store.begin_epoch(epoch + 1)
        line = {
            "epoch": epoch,
            "train_loss": self.history.loss_sum / self.history.samples,
            "lr": self._lr(epoch, self.plan.steps - 1),
            **constants,
            **self._evaluate(epoch),
            "images_per_s": round(rate, 1),
            **self._store_waits(epoch),
        }
        self.history.loss_sum, self.history.samples = 0.0, 0
        self.history.lines.append(line)
        best, error = self.history.best, line["top1_error"]
        if error is not None and (best is None or error < best["top1_error"]):
            self.history.best = line
        log.info("%s %s", self._label(epoch), readable(line))
        self._save(Position(epoch + 1, 0))
        if self.world.rank == 0:  # after the checkpoint: both are of one history
            self.run_dir.write_metrics(self.history.lines)
            self._export()

    def _store_waits(self, epoch: int) -> dict[str, float]:
        """Seconds that the rank which waited longest has waited for the store's disk."""
        if self.store is None:
            return {}
        waits = self.store.waits()
        write, seconds = waits["write"], sum(wait.seconds for wait in waits.values())
        ranks = self.world.gather((write.times, write.seconds, seconds))
        times, longest, _ = max(ranks)
        if times:
            log.warning(
                "%s: training waited %d times (%.1f s) for the disk of the prediction store, as "
                "all its buffers were full. A faster disk or a smaller store.encoding avoids it.",
                self._label(epoch),
                times,
                longest,
            )
        return {"store_wait_s": round(max(all_s for _, _, all_s in ranks), 3)}

    def _evaluate(self, epoch: int) -> dict[str, float | None]:
        """The measures on the validation split; each sample counts once, on any world.

        All None after an epoch that is not evaluated.
        """
        self.engine.sync_buffers()  # also for weights that are exported without being evaluated
        last = epoch + 1 == self.config.train.epochs
        if not last and (epoch + 1) % self.config.evaluation.every:
            return dict.fromkeys(MEASURES)
        accumulator = Accumulator()
        batches = self.data.validation_batches(
            self.world.rank, self.world.size, self.config.evaluation.batch_size
        )
        full_precision = self.config.evaluation.precision == "fp32"
        for images_BCHW, labels_B in batches:
            accumulator.update(self.engine.predict(images_BCHW, full_precision), labels_B)
        shares = self.world.gather(accumulator.records().pack().cpu())
        records = Records.concatenate([Records.unpack(share) for share in shares])
        try:
            return measures(records, self.num_classes, self.config.evaluation.ece_bins)
        except ValueError as error:  # the same on every rank
            raise AgreedError(f"evaluation after {self._label(epoch)}: {error}") from error

    def _save(self, position: Position) -> None:
        """A checkpoint: the store by every rank, the rest by rank 0 (its buffers count)."""
        if position == self._saved:
            return  # asked to stop right after a resume: it is there already
        self._saved = position
        with self.world.together():
            self.engine.check_finite()
        if self.store is not None:
            self.store.commit()
        if self.config.data.on_bad_image == "substitute":  # else there are none
            ids = {i for absent in self.world.gather(self.history.absent) for i in absent}
            self.history.absent = sorted(ids)
        if self.engine.sharded:
            with self.world.together():
                aside = self.checkpoints.open_aside(position, create=self.world.rank == 0)
            self.engine.save_shards(aside)  # collective: must not be inside `together`
            self.world.gather(None)
        if self.world.rank == 0:
            self.checkpoints.save(position)
        mirror.send(self.checkpoints, position, 0, self.sites)
        if self.sites.leads and self.store is not None:
            self.store.retain(m["store"] for m in self.checkpoints.retain())

    def _export(self) -> None:
        """Weights for plain torch, as they are after the last epoch in the history."""
        line = self.history.lines[-1]
        epoch, every = line["epoch"], self.config.checkpoint.export_every
        last = epoch + 1 == self.config.train.epochs
        names = ["checkpoint_best.pth"] if line == self.history.best else []
        if last or (every and (epoch + 1) % every == 0):
            names.append(f"checkpoint_{epoch + 1}.pth")
        for name in names:
            export_weights(
                self.run_dir.models / name,
                self.engine.evaluated,
                {"model": self.config.model.name, "num_classes": self.num_classes, **line},
            )

    def _complete(self) -> None:
        """The end: result.json, and the status that launch scripts wait for."""
        if self.status is None:
            return
        result = {
            "last": self.history.lines[-1],
            "best": self.history.best,
            "weights_sha256": weights_sha256(self.engine.model),
            "images_not_decoded": self.history.absent,
        }
        self.run_dir.write_json("result.json", result)
        self.status.write("complete", None, self.config.train.epochs, 0)
        log.info("complete: %s", self.run_dir.path)

    def _say_stopped(self, epoch: int, step: int) -> None:
        reason = f"asked to stop by {self._stop.signal or 'a signal to another rank'}"
        log.info("%s in epoch %d after step %d; start again to resume", reason, epoch, step)
        if self.status is not None:
            self.status.write("stopped", reason, epoch, step)

    def _beat(self, epoch: int, step: int) -> None:
        if self.status is not None:
            self.status.beat(epoch, step)

    def _past(self, ids_B: Ids) -> Past | None:
        if self.store is None:
            return None
        return Past(*self.store.past(ids_B))

    def _ids(self, order_N: Ids, epoch: int, step: int) -> Ids:
        low, high = self.plan.part(step, self.world.rank)
        return order_N[low:high]

    def _lr(self, epoch: int, step: int) -> float:
        config, steps = self.config, self.plan.steps
        return lr_at(
            config.schedule, config.peak_lr, config.train.epochs, steps, epoch * steps + step
        )

    def _seed_generators(self, epoch: int, step: int, micro: int) -> None:
        """Dropout and its like: a function of the position, so resume has no state to save."""
        stream = f"torch/{micro}/{self.world.rank}"
        (seed,) = hash64(self.config.train.seed, stream, epoch, np.array([step]), columns=1)[0]
        torch.manual_seed(int(seed))

    def _trained_images(self, first_step: int) -> int:
        return max(self.plan.trained - first_step * self.plan.global_batch, 0)

    def _label(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self.config.train.epochs}"
