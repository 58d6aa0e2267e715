"""A job from its configuration to its exit code: put the parts together, report how it ended."""

import logging
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pskd import deepspeed_config, disk, launch, models, run_dir, tracking, world
from pskd.checkpoint import Checkpoints, Position
from pskd.config import Config
from pskd.engine import Engine
from pskd.errors import EXIT_FAILED, AgreedError
from pskd.failure import repeats, understand
from pskd.fields import TAGS
from pskd.history import History
from pskd.loading import AnyCatalog, input_sizes, loader, mixer, preprocessing, samples
from pskd.methods import registry
from pskd.models.probe import check_takes
from pskd.order import Plan
from pskd.profiling import Profile
from pskd.restore import Identity, Parts, resume
from pskd.run_dir import RunDir, Start, Status
from pskd.sites import Sites
from pskd.startup import Origin, open_directory, register_start
from pskd.store.store import Store, StoreOptions
from pskd.teacher import TrainedNetwork
from pskd.trainer import Trainer
from pskd.weights import initialise, weights_sha256
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
        with here.together():
            if here.rank == 0:
                tracking.check(config.tracking)
        catalog, plan = samples(config, here)
        model = network(config, catalog, here)
        settings = deepspeed_settings(config, here)
        directory, sites = open_directory(config, settings, here)
        self.path = directory.path
        start, origin = register_start(config, settings, here, directory, sites, threads)
        self.start = start.number
        return _assemble(
            config, settings, here, sites, catalog, plan, model, directory, start, origin
        )

    def report(self, error: BaseException) -> None:
        """Say once why the job failed, in the log and in status.json."""
        failure = understand(error, self.config.train)
        first, told = self.start is None, False
        if self.path is not None and self.start is not None:
            try:
                earlier = run_dir.fail(self.path, self.start, failure.reason)
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


def compare_configurations(config: Config, here: World) -> None:
    """Refuse ranks that were given another command line or file."""
    mine = {
        key: value
        for tag in TAGS
        for key, value in config.values(tag).items()
        if key not in _OF_A_NODE
    }
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


def _assemble(
    config: Config,
    settings: dict[str, Any],
    here: World,
    sites: Sites,
    catalog: AnyCatalog,
    plan: Plan,
    model: torch.nn.Module,
    directory: RunDir,
    start: Start,
    origin: Origin | None,
) -> tuple[Trainer, Position]:
    """Build every part, and bring it to where the run was left."""
    _initialise(model, config, directory, here)
    model.to(here.device)
    if config.model.sync_batchnorm:
        if here.device.type != "cuda":
            raise AgreedError("model.sync_batchnorm true works on GPUs only: leave it out.")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    with here.together():
        engine = Engine(
            model,
            config.optimizer,
            config.engine,
            settings,
            here.timeout,
            config.model.ema_decay,
            config.evaluation.weights == "ema",
        )
    with here.together():
        network = TrainedNetwork(engine, config.model.name, catalog.num_classes)
        method = registry.create(config.method, network)
    store = None
    if method.needs_store:
        section = config.store
        with here.together():
            store = Store(
                directory.store,
                n=plan.n,
                classes=catalog.num_classes,
                identity=catalog.fingerprint,
                run=start.run,
                start=start.number,
                peers=sites,
                options=StoreOptions(section.encoding, section.read, section.readahead_bytes),
                device=here.device,
            )
    with here.together():
        if here.rank == 0:
            directory.write_json("preprocessing.json", preprocessing(config.data, catalog))
    parts = Parts(Identity(catalog.fingerprint), engine, History(), method, store)
    checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep)
    parts.register(checkpoints)
    position = resume(parts, checkpoints, origin, here, sites)
    if position.epoch < config.train.epochs:
        need = disk.need_of(
            config,
            engine.model,
            n=plan.n,
            classes=catalog.num_classes,
            ranks=here.size,
            sharded=engine.sharded,
        )
        with here.together():
            if sites.leads:
                log.info("%s", disk.check(directory.path, need))
    with here.together():
        followers = tracking.trackers(config, directory.path, start.run) if here.rank == 0 else []
    profile = None
    if config.run.profile and here.rank == 0:
        profile = Profile(directory.path, config.run.profile)
    log.info("%s: %s", "resuming" if position > (0, 0) else "training", directory.path)
    trainer = Trainer(
        config=config,
        world=here,
        sites=sites,
        run_dir=directory,
        data=loader(config, here, catalog, peers=method.needs_peers),
        mixer=mixer(config),
        plan=plan,
        num_classes=catalog.num_classes,
        engine=engine,
        method=method,
        store=store,
        checkpoints=checkpoints,
        history=parts.history,
        status=Status(directory, config.train.epochs, start.number) if sites.leads else None,
        trackers=followers,
        profile=profile,
    )
    return trainer, position


def network(config: Config, catalog: AnyCatalog, here: World) -> torch.nn.Module:
    """Freshly initialised, the same on every rank; one that takes the images."""
    torch.manual_seed(config.train.seed)
    model = models.build(config.model.name, catalog.num_classes)
    sizes, key = input_sizes(config.data, catalog)
    with here.together():
        check_takes(model, config.model.name, sizes, key)
    return model


def _initialise(model: torch.nn.Module, config: Config, directory: RunDir, here: World) -> None:
    """The weights that training begins with, if a file names them."""
    section = config.model
    begun = here.broadcast(Checkpoints(directory.checkpoints, 1).exist())
    if section.init is not None and not begun:  # else a checkpoint brings the weights
        with here.together():
            initialise(model, section.name, section.init, section.new_head)
        found = here.gather(weights_sha256(model))
        odd = [rank for rank, digest in enumerate(found) if digest != found[0]]
        if odd:
            raise AgreedError(
                f"model.init {section.init} holds other weights on ranks {odd} than on rank 0. "
                "Give every node the same file."
            )
