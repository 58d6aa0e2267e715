"""The loop, readable top to bottom.

Letters: B samples of a step on this rank, C classes.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pskd.checkpoint import Position
from pskd.config import Config
from pskd.data.interface import Data, validation_batches
from pskd.data.mix import Mixer
from pskd.data.transfer import to_device
from pskd.engine import Engine
from pskd.errors import EXIT_COMPLETE, EXIT_STOPPED, AgreedError
from pskd.exports import Exports
from pskd.files import sha256_of
from pskd.guard import Guard, StopRequest
from pskd.hashing import hash64
from pskd.history import History
from pskd.methods.interface import Method, Past
from pskd.metrics import MEASURES, Accumulator, Records, measures
from pskd.order import Ids, Plan, Walk, epoch_order, where
from pskd.profiling import Profile
from pskd.progress import Progress, is_slow_disk, readable
from pskd.run_dir import RunDir
from pskd.run_records import earlier_evaluation
from pskd.run_status import Status
from pskd.saver import Saver
from pskd.schedule import lr_at
from pskd.store.store import Store
from pskd.tracking import Tracker
from pskd.weights import weights_sha256
from pskd.words import listed
from pskd.world import World

log = logging.getLogger("pskd")

MOST_GREY = 0.1  # of the samples of an epoch: with more bad images it is the data that are bad


@dataclass
class TrainedStep:
    """A trained step whose verdict is not known yet.

    ids_B: this rank's samples. strangers: places whose predictions are not remembered. absent: how
    many have weight 0. bad: ids of images that could not be decoded.
    """

    epoch: int
    step: int
    ids_B: Ids
    loss_B: Tensor
    remember_BC: Tensor | None
    strangers: list[int]
    absent: int
    bad: list[int]


@dataclass
class Trainer:
    """Everything that a run consists of; `run` trains it from a position to its end."""

    config: Config
    world: World
    run_dir: RunDir
    data: Data
    mixer: Mixer
    plan: Plan
    num_classes: int
    engine: Engine
    method: Method
    store: Store | None
    saver: Saver
    exports: Exports
    history: History
    status: Status | None  # on the first rank that sees a directory
    trackers: Sequence[Tracker] = ()  # on rank 0
    profile: Profile | None = None  # on rank 0

    def __post_init__(self) -> None:
        self._guard = Guard(self.world)
        self._stop = StopRequest()
        self._pending: TrainedStep | None = None
        self._stopping = self._due = False
        self._data_wait_s = 0.0  # in this epoch
        self._loss = float("nan")
        self._records: Records | None = None  # of the last evaluation, of all ranks

    def run(self, position: Position) -> int:
        """Train from `position` on; returns the exit code."""
        first_step = position.step
        with self._stop.listening():
            self.begin(position)
            for epoch in range(position.epoch, self.config.train.epochs):
                constants = self.method.begin_epoch(epoch, self.config.train.epochs)
                started = time.monotonic()
                if not self.train_epoch(epoch, first_step, constants):
                    return EXIT_STOPPED
                seconds = time.monotonic() - started
                images = self._trained_images(first_step)
                self.finish_epoch(epoch, constants, images, seconds)
                first_step = 0
                if self._asked_to_stop() and epoch + 1 < self.config.train.epochs:
                    self._say_stopped(epoch + 1, 0)
                    return EXIT_STOPPED
            self._complete()
        return EXIT_COMPLETE

    def close(self) -> None:
        """End the trackers, the profile, the reading ahead, and the store's thread."""
        if self.profile is not None:
            self.profile.close()
        for tracker in self.trackers:
            tracker.close()
        self.data.close()
        if self.store is not None:
            self.store.close()

    def begin(self, position: Position) -> None:
        """Read ahead from here, say that the run is on; rank 0 finishes what a kill cut off."""
        walk = Walk(self.plan, self.config.train.seed, self.config.train.epochs, self.world.rank)
        self.data.expect_bad(self.history.absent)
        self.data.begin(walk, *position)
        self.saver.begin(position)
        self.exports.begin(self.history, between_epochs=position.step == 0)
        if self.status is not None:
            self.status.write("running", None, *position)
        if self.world.rank != 0:
            return
        self.run_dir.write_metrics(self.history.lines)
        for tracker in self.trackers:
            tracker.begin(self.history.lines)
        if position.epoch < self.config.train.epochs:  # gone back: they are of another history
            for name in ("result.json", "evaluation.npz"):
                (self.run_dir.path / name).unlink(missing_ok=True)

    def train_epoch(self, epoch: int, first_step: int, constants: dict[str, float]) -> bool:
        """Train the steps of an epoch from `first_step` on; False if asked to stop."""
        order_N = epoch_order(self.config.train.seed, epoch, self.plan.n)
        self.engine.train()
        if self.store is not None:
            self.store.begin_epoch(epoch)
        with Progress(self._label(epoch), self._trained_images(first_step), constants) as progress:
            for step in range(first_step, self.plan.steps):
                trained = self.train_step(order_N, epoch, step)
                self._settle()
                self._pending = trained
                stop, due = self._stop.signal is not None, self.saver.due_by_time()
                self._guard.submit(stop, due, trained.loss_B.sum(), trained.absent)
                progress.advance(self.plan.batch_size(step), self._loss, self._waits_s())
                if self.profile is not None:
                    self.profile.step(self._waits_s())
                self._beat(epoch, step + 1)
                last = step + 1 == self.plan.steps
                due = not last and (self._due or self.saver.due_by_step(step + 1))
                if last or due or self._stopping:
                    self._settle()
                if due or self._stopping:
                    self._save(Position(epoch, step + 1))
                if self._stopping:
                    self._say_stopped(epoch, step + 1)
                    return False
        return True

    def train_step(self, order_N: Ids, epoch: int, step: int) -> TrainedStep:
        """One optimizer step of this rank."""
        micros = self.plan.micro_batches(order_N, epoch, step, self.world.rank)
        ids_B = self._ids(order_N, step)
        past = self._past(ids_B)
        if self.store is not None and step + 1 < self.plan.steps:
            self.store.prefetch(self._ids(order_N, step + 1))
        lr = self._lr(epoch, step)
        losses, rows, first = [], [], 0
        strangers: list[int] = []
        bad: list[int] = []
        absent = 0
        for micro in micros:
            part = slice(first, first + len(micro.ids_B))
            first = part.stop
            self._seed_generators(epoch, step, micro.micro)
            asked = time.monotonic()
            images = self.data.train_batch(micro)
            self._data_wait_s += time.monotonic() - asked
            batch = self.mixer(images, epoch)
            absent += len(batch.absent)
            bad += batch.bad
            strangers += [part.start + place for place in batch.strangers()]
            output = self.method(self.engine.forward, batch, past and past.part(part))
            loss_B = output.loss_B * batch.weight_B * micro.scale
            self.engine.backward_and_step(loss_B.sum(), lr)
            losses.append(loss_B.detach() / len(micros))
            if output.remember_BC is not None:
                rows.append(output.remember_BC)
        self.history.absent += bad
        remember_BC = torch.cat(rows) if rows else None
        loss_B = torch.cat(losses)
        return TrainedStep(epoch, step, ids_B, loss_B, remember_BC, strangers, absent, bad)

    def _settle(self) -> None:
        """Read the verdict on the step before; only then do its rows go to the disk.

        Raises:
            AgreedError: a loss was not finite, or too many images were bad.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        verdict = self._guard.read()
        if verdict.bad:
            self._refuse_bad_loss(step)
        self.history.grey += verdict.absent
        if verdict.absent:
            self._refuse_bad_data(step, verdict.absent)
        if self.store is not None and step.remember_BC is not None:
            self._remember(self.store, step.ids_B, step.remember_BC, step.strangers)
        self._loss = verdict.loss
        self._stopping = self._stopping or verdict.stop
        self._due = self._due or verdict.save
        size = self.plan.batch_size(step.step)
        self.history.loss_sum += verdict.loss * size
        self.history.samples += size

    def _remember(self, store: Store, ids_B: Ids, rows_BC: Tensor, strangers: list[int]) -> None:
        """Samples whose image showed mostly something else keep their older rows."""
        if strangers:
            known = np.setdiff1d(np.arange(len(ids_B)), strangers)
            ids_B, rows_BC = ids_B[known], rows_BC[to_device(known, rows_BC.device)]
        store.remember(ids_B, rows_BC)

    def _refuse_bad_loss(self, step: TrainedStep) -> None:
        finite_B = torch.isfinite(step.loss_B).cpu().numpy()
        bad = sorted(i for ids in self.world.gather(step.ids_B[~finite_B].tolist()) for i in ids)
        raise AgreedError(
            f"the loss is not finite in {where(step.epoch, step.step)}, samples {listed(bad)}. "
            "Nothing of this step was saved. Lower optimizer.lr, add schedule.warmup_epochs or "
            "optimizer.clip_norm, in a new run."
        )

    def _refuse_bad_data(self, step: TrainedStep, absent: int) -> None:
        """By what all ranks saw of the step and of its epoch: the same on any world."""
        size = self.plan.batch_size(step.step)
        if absent == size:
            what = f"none of the {size} images of a step can be decoded"
        elif self.history.grey > MOST_GREY * self.plan.trained:
            what = f"more than {MOST_GREY:.0%} of an epoch's images cannot be decoded"
        else:
            return
        bad = [sample for ids in self.world.gather(step.bad) for sample in ids]
        raise AgreedError(
            f"{what}, up to {where(step.epoch, step.step)}, the last of them "
            f"{self.data.name(bad[0])}: these are not the images that were indexed. Bring them "
            "back and start again, the run goes on from its last checkpoint."
        )

    def finish_epoch(
        self, epoch: int, constants: dict[str, float], images: int, seconds: float
    ) -> None:
        """Close the generation of predictions, measure, log, save."""
        if self.store is not None:
            self.store.begin_epoch(epoch + 1)
        line = {
            "epoch": epoch,
            "train_loss": self.history.loss_sum / self.history.samples,
            "lr": self._lr(epoch, self.plan.steps - 1),
            **constants,
            **self._evaluate(epoch),
            "images_per_s": round(images / seconds, 1),
            "train_s": round(seconds, 3),
            "data_wait_s": round(max(self.world.gather(self._data_wait_s)), 3),
            **self._store_waits(epoch, seconds),
        }
        self._data_wait_s = 0.0
        self.history.loss_sum, self.history.samples, self.history.grey = 0.0, 0, 0
        self.history.lines.append(line)
        best, error = self.history.best, line["top1_error"]
        if error is not None and (best is None or error < best["top1_error"]):
            self.history.best = line
        log.info("%s %s", self._label(epoch), readable(line))
        self._save(Position(epoch + 1, 0))
        if self.world.rank == 0:  # after the checkpoint: both are of one history
            self.run_dir.write_metrics(self.history.lines)
            for tracker in self.trackers:
                tracker.add(line)
        self.exports.write(self.history)

    def _waits_s(self) -> dict[str, float]:
        """Of this rank in this epoch."""
        waits = {"data": self._data_wait_s}
        return waits if self.store is None else {**waits, "store": self.store.waited_s}

    def _store_waits(self, epoch: int, train_s: float) -> dict[str, float]:
        """Seconds that the rank which waited longest has waited for the store's disk."""
        if self.store is None:
            return {}
        waits = self.store.waits()
        write_s, seconds = waits["write"].seconds, sum(wait.seconds for wait in waits.values())
        ranks = self.world.gather((write_s, seconds))
        longest_s = max(write_s for write_s, _ in ranks)
        if is_slow_disk(longest_s, train_s):
            log.warning(
                "%s: training waited %.1f of %.1f s for the disk of the prediction store, as all "
                "its buffers were full. A faster disk or a smaller store.encoding avoids it.",
                self._label(epoch),
                longest_s,
                train_s,
            )
        return {"store_wait_s": round(max(all_s for _, all_s in ranks), 3)}

    def _evaluate(self, epoch: int) -> dict[str, float | None]:
        """The measures on the validation split; each sample counts once, on any world.

        All None after an epoch that is not evaluated.
        """
        self.engine.sync_buffers()  # also for weights that are exported without being evaluated
        last = epoch + 1 == self.config.train.epochs
        if not last and (epoch + 1) % self.config.evaluation.every:
            return dict.fromkeys(MEASURES)
        accumulator = Accumulator()
        batches = validation_batches(
            self.data, self.world.rank, self.world.size, self.config.evaluation.batch_size
        )
        full_precision = self.config.evaluation.precision == "fp32"
        for images_BCHW, labels_B in batches:
            accumulator.update(self.engine.predict(images_BCHW, full_precision), labels_B)
            self._beat(epoch, self.plan.steps)
        shares = self.world.gather(accumulator.records().pack().cpu())
        # Shares are contiguous, so in the order of ranks they are in the order of samples.
        self._records = Records.concatenate([Records.unpack(share) for share in shares])
        try:
            return measures(self._records, self.num_classes, self.config.evaluation.ece_bins)
        except ValueError as error:  # the same on every rank
            raise AgreedError(f"evaluation after {self._label(epoch)}: {error}") from error

    def _save(self, position: Position) -> None:
        self.saver.save(position)
        self.data.expect_bad(self.history.absent)  # of all ranks, now
        self._due = False

    def _asked_to_stop(self) -> bool:
        """Between two epochs, where no step's flags tell of a request during the evaluation."""
        return any(self.world.gather(self._stop.signal is not None))

    def _complete(self) -> None:
        """The end: evaluation.npz, result.json, and the status that launch scripts wait for."""
        written = (self.run_dir.path / "evaluation.npz").is_file()
        if self._records is None and not self.world.broadcast(written):
            self._evaluate(self.config.train.epochs - 1)  # killed after it, or of an older version
        with self.world.together():
            if self.world.rank == 0:
                evaluation, digest = self.run_dir.path / "evaluation.npz", None
                if self._records is not None:
                    self.run_dir.write_arrays(evaluation.name, self._records.arrays())
                else:  # as it was written, and not as it may have become
                    digest = earlier_evaluation(self.run_dir.path)
                result = {
                    "last": self.history.lines[-1],
                    "best": self.history.best,
                    "weights_sha256": weights_sha256(self.engine.model),
                    "evaluation_sha256": digest or sha256_of(evaluation),
                    "images_not_decoded": self.history.absent,
                }
                self.run_dir.write_json("result.json", result)
        if self.status is not None:
            self.status.write("complete", None, self.config.train.epochs, 0)
        log.info("complete: %s", self.run_dir.path)

    def _say_stopped(self, epoch: int, step: int) -> None:
        reason = f"asked to stop by {self._stop.signal or 'a signal to another rank'}"
        log.info("%s in epoch %d after %d steps; start again to resume", reason, epoch + 1, step)
        if self.status is not None:
            self.status.write("stopped", reason, epoch, step)

    def _beat(self, epoch: int, step: int) -> None:
        if self.status is not None:
            self.status.beat(epoch, step)

    def _past(self, ids_B: Ids) -> Past | None:
        if self.store is None:
            return None
        return Past(*self.store.past(ids_B))

    def _ids(self, order_N: Ids, step: int) -> Ids:
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
