"""A job from its configuration to its exit code: what is agreed on first, how it ended."""

import logging
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pskd import deepspeed_config, launch, models, run_status, tracking, world
from pskd.assembly import Accepted, assemble
from pskd.checkpoint import Position
from pskd.config import Config
from pskd.errors import EXIT_FAILED, AgreedError
from pskd.failure import repeats, understand
from pskd.loading import AnyCatalog, catalog_and_plan, input_sizes
from pskd.models.probe import check_takes
from pskd.startup import open_directory, register_start
from pskd.trainer import Trainer
from pskd.words import counted
from pskd.world import World

log = logging.getLogger("pskd")


# May differ between nodes:
_OF_A_NODE = ("data.root", "data.index_path", "data.val_index_path", "run.dir", "run.root")


def run(config: Config) -> int:
    """Train as configured; returns the exit code (0 complete, 75 stopped, 1 failed)."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    job = Job(config)
    try:
        return job.run()
    except (Exception, KeyboardInterrupt) as error:
        job.report(error)
        return EXIT_FAILED


@dataclass
class Job:
    """What one start does, and how far it has come, for the report of its failure."""

    config: Config
    rank: int = field(default_factory=launch.rank)
    path: Path | None = None
    start: int | None = None  # once the run directory has accepted this start

    def run(self) -> int:
        """From joining the other ranks to leaving them; returns the exit code."""
        here = world.start(self.config.run.timeout_s)
        log.setLevel(logging.INFO if here.rank == 0 else logging.ERROR)
        trainer, position = self.prepare(here)
        code = trainer.run(position)
        trainer.close()
        world.stop(here)
        return code

    def prepare(self, here: World) -> tuple[Trainer, Position]:
        """Collective: every part of the run, brought to where it was left."""
        config = self.config
        threads = world.set_threads(config.run.threads, here)
        compare_configurations(config, here)
        _say_what_is_not_reached(config)
        with here.together():
            if here.rank == 0:
                tracking.check(config.tracking)
        catalog, plan = catalog_and_plan(config, here)
        model = network(config, catalog, here)
        settings = deepspeed_settings(config, here)
        directory, sites = open_directory(config, settings, here)
        self.path = directory.path
        start, origin = register_start(config, settings, here, directory, sites, threads)
        self.start = start.number
        accepted = Accepted(config, settings, here, sites, catalog, plan, directory, start, origin)
        return assemble(accepted, model)

    def report(self, error: BaseException) -> None:
        """Say once why the job failed, in the log and in status.json."""
        failure = understand(error, self.config.train)
        first, told = self.start is None, False
        if self.path is not None and self.start is not None:
            try:
                earlier = run_status.fail(self.path, self.start, failure.reason)
                first = earlier is None
                told = earlier is not None and repeats(failure.reason, earlier)
            except OSError as trouble:
                log.error("status.json cannot be written: %s", trouble.strerror)
        speaks = {"rank 0": self.rank == 0, "this": not told, "first": first}[failure.speaker]
        if speaks:
            alone = failure.speaker == "this" and launch.is_launched()
            where = f"rank {self.rank} on {platform.node()}: " if alone else ""
            log.error("error: %s%s", where, failure.reason)
        else:
            launch.leave_the_last_word()


def _say_what_is_not_reached(config: Config) -> None:
    late = [epoch for epoch in config.schedule.milestones if epoch >= config.train.epochs]
    if late and config.schedule.name == "step":
        log.info(
            "schedule.milestones: %s are not reached in %s, the rate does not drop there",
            late,
            counted(config.train.epochs, "epoch"),
        )


def compare_configurations(config: Config, here: World) -> None:
    """Refuse ranks that were given another command line or file."""
    mine = {key: value for key, value in config.flat().items() if key not in _OF_A_NODE}
    first, *others = here.gather(mine)
    for rank, values in enumerate(others, start=1):
        odd = [key for key in {**first, **values} if first.get(key) != values.get(key)]
        if odd:
            raise AgreedError(
                f"rank {rank} has other values than rank 0 for {', '.join(odd)}. "
                "Start every rank with the same command and files."
            )


def deepspeed_settings(config: Config, here: World) -> dict[str, Any]:
    """For `deepspeed.initialize`; refused on all ranks if on one."""
    with here.together():
        settings = deepspeed_config.complete(
            config.engine.deepspeed_config,
            batch=config.train.batch_size,
            world=here.size,
            accumulation=config.train.accumulation,
            clip_norm=config.optimizer.clip_norm,
        )
    return settings


def network(config: Config, catalog: AnyCatalog, here: World) -> torch.nn.Module:
    """Freshly initialised, the same on every rank; one that takes the images."""
    torch.manual_seed(config.train.seed)
    model = models.build(config.model.name, catalog.num_classes)
    sizes, key = input_sizes(config.data, catalog)
    with here.together():
        check_takes(model, config.model.name, sizes, key)
    return model
