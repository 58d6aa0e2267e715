"""From a start that its run directory has accepted to a trainer: every part of the run."""

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from pskd import disk, tracking
from pskd.checkpoint import Checkpoints, Position
from pskd.config import Config
from pskd.engine import Engine
from pskd.errors import AgreedError
from pskd.exports import Exports
from pskd.history import History
from pskd.loading import AnyCatalog, loader, mixer, preprocessing
from pskd.methods import registry
from pskd.order import Plan
from pskd.profiling import Profile
from pskd.restore import Identity, Parts, resume
from pskd.run_dir import RunDir, Start
from pskd.run_status import Status
from pskd.saver import Saver
from pskd.sites import Sites
from pskd.startup import Origin
from pskd.store.store import Store
from pskd.teacher import TrainedNetwork
from pskd.trainer import Trainer
from pskd.weights import initialise, weights_sha256
from pskd.world import World

log = logging.getLogger("pskd")


@dataclass(frozen=True)
class Accepted:
    """A start, and what all ranks have agreed on. settings: DeepSpeed's."""

    config: Config
    settings: dict[str, Any]
    here: World
    sites: Sites
    catalog: AnyCatalog
    plan: Plan
    directory: RunDir
    start: Start
    origin: Origin | None


def assemble(run: Accepted, model: nn.Module) -> tuple[Trainer, Position]:
    """Collective: build every part, and bring it to where the run was left."""
    config, here, catalog, directory = run.config, run.here, run.catalog, run.directory
    engine = _engine(run, model)
    with here.together():
        access = TrainedNetwork(engine, config.model.name, catalog.num_classes)
        method = registry.create(config.method, access)
    store = _store(run) if config.method.keeps_predictions else None
    with here.together():
        if here.rank == 0:
            directory.write_json("preprocessing.json", preprocessing(config.data, catalog))
    history = History()
    parts = Parts(Identity(catalog.fingerprint), engine, history, method, store)
    checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep)
    parts.register(checkpoints)
    position = resume(parts, checkpoints, run.origin, here, run.sites)
    if position.epoch < config.train.epochs:
        if run.start.changes:
            log.warning(
                "resumed weights may differ in the last bits from an undisturbed run: %s",
                "; ".join(run.start.changes),
            )
        _check_room(run, engine)
    with here.together():
        first = here.rank == 0
        trackers = tracking.trackers(config, directory.path, run.start.run) if first else []
    profile = None
    if config.run.profile and here.rank == 0:
        profile = Profile(directory.path, config.run.profile)
    status = (
        Status(directory.path, config.train.epochs, run.start.number) if run.sites.leads else None
    )
    log.info("%s: %s", _verb(position, run), directory.path)
    trainer = Trainer(
        config=config,
        world=here,
        run_dir=directory,
        data=loader(config, here, catalog, peers=method.needs_peers),
        mixer=mixer(config),
        plan=run.plan,
        num_classes=catalog.num_classes,
        engine=engine,
        method=method,
        store=store,
        saver=Saver(config, here, run.sites, engine, store, checkpoints, history),
        exports=Exports(config, directory.path, engine, run.sites, catalog.num_classes),
        history=history,
        status=status,
        trackers=trackers,
        profile=profile,
    )
    return trainer, position


def _verb(position: Position, run: Accepted) -> str:
    if position >= (run.config.train.epochs, 0):
        return "trained already"
    return "resuming" if position > (0, 0) and run.origin is None else "training"


def _engine(run: Accepted, model: nn.Module) -> Engine:
    config, here = run.config, run.here
    _initialise(model, run)
    model.to(here.device)
    if config.model.sync_batchnorm:
        if here.device.type != "cuda":
            raise AgreedError("model.sync_batchnorm true works on GPUs only: leave it out.")
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    with here.together():
        engine = Engine(
            model,
            config.optimizer,
            config.engine,
            run.settings,
            here.timeout,
            config.model.ema_decay,
            config.evaluation.weights == "ema",
        )
    return engine


def _store(run: Accepted) -> Store:
    with run.here.together():
        store = Store(
            run.directory.store,
            n=run.plan.n,
            classes=run.catalog.num_classes,
            identity=run.catalog.fingerprint,
            run=run.start.run,
            start=run.start.number,
            peers=run.sites,
            options=run.config.store,
            device=run.here.device,
        )
    return store


def _check_room(run: Accepted, engine: Engine) -> None:
    need = disk.need_of(
        run.config,
        engine.model,
        n=run.plan.n,
        classes=run.catalog.num_classes,
        ranks=run.here.size,
        sharded=engine.sharded,
    )
    with run.here.together():
        if run.sites.leads:
            log.info("%s", disk.check(run.directory.path, need))


def _initialise(model: nn.Module, run: Accepted) -> None:
    """The weights that training begins with, if a file names them."""
    section, here = run.config.model, run.here
    begun = run.origin is not None or Checkpoints(run.directory.checkpoints).exist()
    if section.init is not None and not here.broadcast(begun):  # else a checkpoint has the weights
        with here.together():
            initialise(model, section.name, section.init, section.new_head)
        found = here.gather(weights_sha256(model))
        odd = [rank for rank, digest in enumerate(found) if digest != found[0]]
        if odd:
            raise AgreedError(
                f"model.init {section.init} holds other weights on ranks {odd} than on rank 0. "
                "Give every node the same file."
            )
