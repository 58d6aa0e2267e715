"""A job from its configuration to its exit code: put the parts together, report how it ended."""

import logging
import os
import secrets
import sys
import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pskd import deepspeed_config, hashing, models, run_dir, world
from pskd.checkpoint import Checkpoints, Position, Stateful
from pskd.command_line import Invocation
from pskd.config import Config
from pskd.data.arrays import ArrayData
from pskd.data.catalog import Catalog, load
from pskd.engine import Engine
from pskd.errors import EXIT_FAILED, AgreedError, PskdError
from pskd.methods import registry
from pskd.order import Plan
from pskd.run_dir import RunDir, Status
from pskd.store.store import Store
from pskd.trainer import History, Trainer
from pskd.world import World

log = logging.getLogger("pskd")


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
    config = invocation.config
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    path: Path | None = None
    rank = 0
    try:
        here = world.start(config.run.timeout_s)
        rank = here.rank
        log.setLevel(logging.INFO if rank == 0 else logging.ERROR)
        threads = world.set_threads(config.run.threads, here)
        catalog, plan = _data(config, here)
        directory = _open_directory(config, invocation.recipe, here)
        path = directory.path
        trainer, position = _prepare(config, here, catalog, plan, directory, threads)
        code = trainer.run(position)
        if trainer.store is not None:
            trainer.store.close()
        world.stop(here)
        return code
    except AgreedError as error:
        _report(path, str(error), speaks=rank == 0)
    except PskdError as error:
        _report(path, str(error), speaks=True)
    except OSError as error:
        name = error.filename or path
        _report(path, f"{name}: {error.strerror}. Start again when it is mended.", speaks=True)
    except (RuntimeError, dist.DistError) as error:
        if _is_out_of_memory(error):
            _report(path, _out_of_memory(config, error), speaks=True)
        elif not _is_lost_peer(error):
            _report(path, repr(error), speaks=False)
            traceback.print_exc()
        elif path is not None and run_dir.fail(path, "lost a peer"):
            log.error(
                "rank %d lost another rank: %s. Nothing that was saved is lost: start again "
                "to resume %s.",
                rank,
                str(error).splitlines()[0],
                path,
            )
    except Exception as error:
        _report(path, repr(error), speaks=False)
        traceback.print_exc()
    return EXIT_FAILED


def _report(path: Path | None, reason: str, speaks: bool) -> None:
    """Note the failure in status.json and, on the rank that knows, say it once."""
    if speaks:
        log.error("error: %s", reason)
    if path is not None:
        try:
            run_dir.fail(path, reason)
        except OSError as error:
            log.error("and status.json cannot be written: %s", error.strerror)


def _is_lost_peer(error: Exception) -> bool:
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _out_of_memory(config: Config, error: Exception) -> str:
    reason = str(error).splitlines()[0]
    return (
        f"out of memory with train.batch_size {config.train.batch_size} and train.accumulation "
        f"{config.train.accumulation} ({reason}). The same batch needs less with a larger "
        "train.accumulation or with more ranks, in a new run."
    )


def _data(config: Config, here: World) -> tuple[Catalog, Plan]:
    """The samples, equal on all ranks, and how they are dealt out."""
    with here.together():
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
        plan.check()
    fingerprints = here.gather(catalog.fingerprint)
    odd = [rank for rank, f in enumerate(fingerprints) if f != fingerprints[0]]
    if odd:
        raise AgreedError(
            f"data.name {config.data.name}: ranks {odd} read other samples than rank 0. "
            "Give every node the same data."
        )
    return catalog, plan


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
    config: Config, here: World, catalog: Catalog, plan: Plan, directory: RunDir, threads: int
) -> tuple[Trainer, Position]:
    """Build every part, and bring it to where the run was left."""
    start, status = _register_start(config, here, directory, threads)
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    model = models.build(config.model.name, catalog.num_classes).to(here.device)
    with here.together():
        settings = deepspeed_config.complete(
            config.engine.deepspeed_config,
            batch=plan.global_batch,
            world=here.size,
            accumulation=plan.accumulation,
            clip_norm=config.optimizer.clip_norm,
        )
    with here.together():
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
    data = ArrayData(
        catalog, here.device, config.train.seed, config.data.crop_padding, config.data.flip
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
    if status is not None:
        directory.write_metrics(history.lines)
        status.write("running", None, *position)
        log.info("%s: %s", "resuming" if position > (0, 0) else "training", directory.path)
    trainer = Trainer(
        config=config,
        world=here,
        run_dir=directory,
        data=data,
        plan=plan,
        num_classes=catalog.num_classes,
        engine=engine,
        method=method,
        store=store,
        checkpoints=checkpoints,
        history=history,
        status=status,
    )
    return trainer, position


def _register_start(
    config: Config, here: World, directory: RunDir, threads: int
) -> tuple[int, Status | None]:
    """Compare configuration and software with the run's; returns the number of this start.

    From here on the run is `running`: a start that fails later has failed the run.
    """
    start, status = 0, None
    with here.together():
        if here.rank == 0:
            directory.reconcile(config)
            start, changes = directory.record_start(_facts(here, threads))
            if changes:
                log.warning(
                    "resumed weights may differ in the last bits from an undisturbed run: %s",
                    "; ".join(changes),
                )
            status = Status(directory, config.train.epochs)
            status.write("running", None, 0, 0)
    return int(here.broadcast(start)), status


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
        with here.together():
            engine.load_shards(checkpoints.directory / name)
    return position
