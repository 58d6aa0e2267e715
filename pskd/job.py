"""A job from its configuration to its exit code: put the parts together, report how it ended."""

import logging
import os
import secrets
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pskd import deepspeed_config, hashing, launch, models, run_dir, world
from pskd.checkpoint import Checkpoints, Position, Stateful
from pskd.command_line import Invocation
from pskd.config import Config
from pskd.data.arrays import ArrayData
from pskd.data.catalog import Catalog, load
from pskd.engine import Engine
from pskd.errors import EXIT_FAILED, AgreedError, PskdError
from pskd.failure import understand
from pskd.fields import TAGS
from pskd.methods import registry
from pskd.order import Plan
from pskd.run_dir import RunDir, Status
from pskd.store.store import Store
from pskd.trainer import History, Trainer
from pskd.world import World

log = logging.getLogger("pskd")


_OF_A_NODE = ("data.root", "run.dir", "run.root")  # rank 0's run directory counts for all


@dataclass
class Identity:
    """What a checkpoint was trained on; part of it, and compared on load."""

    data_fingerprint: str

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse the checkpoint of another data set.

        Raises:
            PskdError: the samples differ.
        """
        if state["data_fingerprint"] != self.data_fingerprint:
            raise PskdError(
                f"the run was trained on other samples (fingerprint {state['data_fingerprint']}, "
                f"now {self.data_fingerprint}). Bring back the data, or start a new run."
            )


def run(invocation: Invocation) -> int:
    """Train as configured; returns the exit code (0 complete, 75 stopped, 1 failed)."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    job = _Job(invocation)
    try:
        return job.run()
    except (Exception, KeyboardInterrupt) as error:
        job.report(error)
        return EXIT_FAILED


@dataclass
class _Job:
    """How far a job has come, for the report of its failure."""

    invocation: Invocation
    rank: int = field(default_factory=launch.rank)
    path: Path | None = None
    start: int | None = None  # once the run directory has accepted this start

    def run(self) -> int:
        config = self.invocation.config
        here = world.start(config.run.timeout_s)
        log.setLevel(logging.INFO if here.rank == 0 else logging.ERROR)
        threads = world.set_threads(config.run.threads, here)
        _compare_configurations(config, here)
        catalog, plan = _data(config, here)
        settings = _deepspeed_settings(config, plan, here)
        directory = _open_directory(config, self.invocation.recipe, here)
        self.path = directory.path
        self.start = _register_start(config, settings, here, directory, threads)
        trainer, position = _prepare(config, settings, here, catalog, plan, directory, self.start)
        code = trainer.run(position)
        if trainer.store is not None:
            trainer.store.close()
        world.stop(here)
        return code

    def report(self, error: BaseException) -> None:
        """Say once why the job failed, in the log and in status.json."""
        failure = understand(error, self.invocation.config.train)
        first = self.start is None
        if self.path is not None and self.start is not None:
            try:
                first = run_dir.fail(self.path, self.start, failure.reason)
            except OSError as trouble:
                log.error("status.json cannot be written: %s", trouble.strerror)
        speaks = {"rank 0": self.rank == 0, "this": True, "first": first}[failure.speaker]
        if speaks:
            log.error("error: %s", failure.reason)


def _compare_configurations(config: Config, here: World) -> None:
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


def _data(config: Config, here: World) -> tuple[Catalog, Plan]:
    """The samples, equal on all ranks, and how they are dealt out."""
    # Fetching is for one process at a time: rank 0, then one of each other node, then the rest.
    turn = 0 if here.rank == 0 else 1 if here.local_rank == 0 else 2
    for now in range(3) if config.data.download else [turn]:
        with here.together():
            if turn == now:
                catalog = load(
                    config.data.name,
                    root=config.data.root,
                    download=config.data.download,
                    held_out=config.data.held_out,
                    limit=config.data.limit,
                    pad_to=config.data.pad_to,
                )
    plan = Plan(
        n=len(catalog.train),
        global_batch=config.train.batch_size,
        world=here.size,
        accumulation=config.train.accumulation,
        last_batch=config.data.last_batch,
    )
    with here.together():
        plan.check()
    fingerprints = here.gather(catalog.fingerprint)
    odd = [rank for rank, f in enumerate(fingerprints) if f != fingerprints[0]]
    if odd:
        raise AgreedError(
            f"data.name {config.data.name}: ranks {odd} read other samples than rank 0. "
            "Give every node the same data."
        )
    return catalog, plan


def _deepspeed_settings(config: Config, plan: Plan, here: World) -> dict[str, Any]:
    with here.together():
        settings = deepspeed_config.complete(
            config.engine.deepspeed_config,
            batch=plan.global_batch,
            world=here.size,
            accumulation=plan.accumulation,
            clip_norm=config.optimizer.clip_norm,
        )
    return settings


def _open_directory(config: Config, recipe: str | None, here: World) -> RunDir:
    """The run directory, owned by rank 0 and seen by all."""
    path, token = "", ""
    with here.together():
        if here.rank == 0:
            label = recipe or f"{config.data.name}-{config.method.name}"
            root = Path(config.run.root)
            chosen = Path(config.run.dir) if config.run.dir else run_dir.new_path(root, label)
            directory = RunDir(chosen.absolute())
            directory.acquire(config.run.lock_wait_s)
            path, token = str(directory.path), secrets.token_hex(8)
            (directory.path / "token").write_text(token)
    path, token = here.broadcast((path, token))
    if here.rank != 0:
        directory = RunDir(Path(path))
    with here.together():
        seen = Path(path, "token")
        if not seen.exists() or seen.read_text() != token:
            raise PskdError(
                f"rank {here.rank} does not see the run directory {path} of rank 0. "
                "Put it on a file system that all nodes share."
            )
    return directory


def _prepare(
    config: Config,
    settings: dict[str, Any],
    here: World,
    catalog: Catalog,
    plan: Plan,
    directory: RunDir,
    start: int,
) -> tuple[Trainer, Position]:
    """Build every part, and bring it to where the run was left."""
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    model = models.build(config.model.name, catalog.num_classes).to(here.device)
    engine = Engine(model, config.optimizer, config.engine, settings, here.timeout)
    method = registry.create(config.method)
    store = None
    if method.needs_store:
        store = Store(
            directory.store,
            n=plan.n,
            classes=catalog.num_classes,
            encoding=config.store.encoding,
            identity=catalog.fingerprint,
            start=start,
            peers=here,
        )
    history = History()
    checkpoints = Checkpoints(directory.checkpoints, config.checkpoint.keep)
    parts: dict[str, Stateful | None] = {
        "identity": Identity(catalog.fingerprint),
        "engine": engine,
        "history": history,
        "store": store,
    }
    for name, part in parts.items():
        if part is not None:
            checkpoints.register(name, part)
    position = _restore(checkpoints, engine, here)
    log.info("%s: %s", "resuming" if position > (0, 0) else "training", directory.path)
    trainer = Trainer(
        config=config,
        world=here,
        run_dir=directory,
        data=ArrayData(
            catalog, here.device, config.train.seed, config.data.crop_padding, config.data.flip
        ),
        plan=plan,
        num_classes=catalog.num_classes,
        engine=engine,
        method=method,
        store=store,
        checkpoints=checkpoints,
        history=history,
        status=Status(directory, config.train.epochs, start) if here.rank == 0 else None,
    )
    return trainer, position


def _register_start(
    config: Config, settings: dict[str, Any], here: World, directory: RunDir, threads: int
) -> int:
    """Compare configuration and software with the run's; returns the number of this start."""
    start = 0
    with here.together():
        if here.rank == 0:
            directory.reconcile(config)
            directory.reconcile_engine(settings)
            start, changes = directory.record_start(_facts(here, threads))
            if changes:
                log.warning(
                    "resumed weights may differ in the last bits from an undisturbed run: %s",
                    "; ".join(changes),
                )
    return int(here.broadcast(start))


def _facts(here: World, threads: int) -> dict[str, Any]:
    """What bit-equality of weights depends on, besides the configuration."""
    cuda = here.device.type == "cuda"
    return {
        "world": here.size,
        "threads": threads,
        "device": torch.cuda.get_device_name(here.device) if cuda else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in ("torch", "torchvision", "deepspeed", "numpy")},
        "hash": hashing.ALGORITHM,
        "machine": os.uname().machine,
    }


def _restore(checkpoints: Checkpoints, engine: Engine, here: World) -> Position:
    """Load the newest checkpoint, if there is one: all verify, agree, then load."""
    with here.together():
        if here.rank == 0:
            checkpoints.prepare()
    with here.together():
        name = checkpoints.latest()
    name = here.broadcast(name)  # rank 0's, should a file system show an older one elsewhere
    if name is None:
        return Position(0, 0)
    with here.together():
        position, state = checkpoints.read(name)
    with here.together():
        checkpoints.restore(state)
    if engine.sharded:
        engine.load_shards(checkpoints.directory / name)
    return position
