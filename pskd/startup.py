"""All ranks into one run directory: find it, own it, compare it, number this start."""

import logging
import os
import secrets
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pskd import deepspeed_config, hashing, run_dir
from pskd.checkpoint import Checkpoints, Position
from pskd.config import Config
from pskd.errors import AgreedError, PskdError
from pskd.run_dir import RunDir, Start
from pskd.sites import Sites, discover
from pskd.world import World

log = logging.getLogger("pskd")

_RECORDS = ("config.yaml", "ds_config.json", "env.json")  # what a start is compared with


class Origin(NamedTuple):
    """A checkpoint of another run, from which this one begins. changes: of what shapes results."""

    run: RunDir
    checkpoint: Path
    changes: list[str]


def open_directory(config: Config, settings: dict[str, Any], here: World) -> tuple[RunDir, Sites]:
    """The run directory, owned by its site's first rank and seen by the others.

    Raises:
        AgreedError: in use, not writable, not seen by a rank, or several of them with ZeRO.
    """
    path, token = "", secrets.token_hex(8)
    with here.together():
        if here.rank == 0:
            label = config.run.recipe or f"{config.data.name}-{config.method.name}"
            root = Path(config.run.root)
            chosen = Path(config.run.dir) if config.run.dir else run_dir.new_path(root, label)
            directory = _own(chosen.absolute(), config, token)
            path = str(directory.path)
    path, first_token = here.broadcast((path, token))
    sees_first = _sees(Path(path), first_token)
    # A node that does not see rank 0's directory has one of its own, of any name.
    own = Path(config.run.dir or path).absolute()
    with here.together():
        if here.local_rank == 0 and not sees_first:
            directory = _own(own, config, token)
    tokens = here.gather(token)
    sees_own = _sees(own, tokens[here.rank - here.local_rank])
    sites = discover(here, sees_first, sees_own)
    if here.rank not in (0, sites.colleagues[0]):
        directory = RunDir(Path(path) if sees_first else own)
    if sites.separate:
        log.info("nodes share no run directory: segments and checkpoints travel between them")
        check_shared(config, settings)
        sites.recover(directory.path, _RECORDS, key="env.json")
    return directory, sites


def check_shared(config: Config, settings: dict[str, Any]) -> None:
    """Where nodes share no run directory.

    Raises:
        AgreedError: with ZeRO.
    """
    if deepspeed_config.stage(settings):
        raise AgreedError(
            f"engine.deepspeed_config {config.engine.deepspeed_config}: ZeRO-1 and 2 need a "
            "run directory that all nodes share, as each rank writes a shard. Share it, or "
            "use stage 0."
        )


def register_start(
    config: Config,
    settings: dict[str, Any],
    here: World,
    directory: RunDir,
    sites: Sites,
    threads: int,
) -> tuple[Start, Origin | None]:
    """Compare configuration and software with the run's, and count this start."""
    start: Start | None = None
    origin = None
    with here.together():
        if here.rank == 0:
            origin = _origin(config, directory)  # refused before anything of this start is saved
            directory.reconcile(config)
            directory.reconcile_engine(settings)
            record = None
            if origin is not None:
                origin.changes.extend(origin.run.engine_differences(settings))
                record = {"checkpoint": str(origin.checkpoint), "changes": origin.changes}
                log.warning(
                    "beginning from %s%s",
                    origin.checkpoint,
                    f" with other settings: {'; '.join(origin.changes)}" if origin.changes else "",
                )
            start = directory.record_start(_facts(here, threads), record)
    sites.copy(directory.path, _RECORDS)
    start = here.broadcast(start)
    assert start is not None
    return start, origin


def _own(path: Path, config: Config, token: str) -> RunDir:
    directory = RunDir(path)
    directory.acquire(config.run.lock_wait_s)
    (path / "token").write_text(token)
    return directory


def _sees(path: Path, token: str) -> bool:
    seen = path / "token"
    return seen.exists() and seen.read_text() == token


def _origin(config: Config, directory: RunDir) -> Origin | None:
    """Where this run begins; nowhere else if it has a checkpoint of its own."""
    if config.run.resume is None or Checkpoints(directory.checkpoints).exist():
        return None
    given = Path(config.run.resume)
    path = given
    if (given / "checkpoints").is_dir():
        latest = Checkpoints(given / "checkpoints").latest()
        if latest is None:
            raise PskdError(f"run.resume {given}: the run has no checkpoint yet.")
        path = given / "checkpoints" / latest
    if path.is_file():
        raise PskdError(
            f"run.resume {given} is a file. Name a run directory or one of its checkpoints: a file "
            "of weights has no optimizer state, no order and no predictions to resume from."
        )
    if not (path / "manifest.json").is_file():
        raise PskdError(
            f"run.resume {given} is neither a run directory nor RUN/checkpoints/NAME of one."
        )
    run = RunDir(path.absolute().parent.parent)
    origin = Origin(run, path.absolute(), run.differences(config))
    _refuse_the_end(origin, config)
    _refuse_other_weights(origin, config)
    _refuse_other_rows(origin, config)
    _refuse_other_groups(origin)
    if Position.of(path.name).step:
        _refuse_other_order(origin)
    return origin


def _refuse_the_end(origin: Origin, config: Config) -> None:
    """A run that ends before it begins would have measures of other weights than its own."""
    position = Position.of(origin.checkpoint.name)
    if position > (config.train.epochs, 0):
        where = f"in epoch {position.epoch + 1}"
        if position.step == 0:
            where = f"after epoch {position.epoch}"
        raise PskdError(
            f"run.resume {origin.checkpoint} lies {where}, and train.epochs is "
            f"{config.train.epochs}: name an earlier checkpoint, or train for more epochs."
        )


def _refuse_other_weights(origin: Origin, config: Config) -> None:
    """They are those of the checkpoint. The file that the other run began with may be gone."""
    changes = [change for change in origin.changes if change.startswith("model.init ")]
    if changes and config.model.init is not None:
        raise PskdError(
            f"run.resume {origin.checkpoint}: {changes[0]}, but the weights are the checkpoint's. "
            "Leave out --model.init, or --resume."
        )


def _refuse_other_rows(origin: Origin, config: Config) -> None:
    """The past predictions go on as they are kept."""
    changes = [change for change in origin.changes if change.startswith("store.encoding ")]
    keeps = origin.checkpoint.name in Checkpoints(origin.checkpoint.parent).store_states()
    if changes and keeps and config.method.keeps_predictions:
        raise PskdError(
            f"run.resume {origin.checkpoint}: {changes[0]}, and its past predictions are not "
            "converted. Keep the setting, or begin from its weights alone: instead of --resume, "
            f"give --model.init a checkpoint of {origin.run.path} or one of its exports."
        )


def _refuse_other_groups(origin: Origin) -> None:
    """Momentum is kept by group of parameters, and this option makes the groups."""
    key = "optimizer.decay_norm_and_bias"
    changes = [change for change in origin.changes if change.startswith(key)]
    if changes:
        raise PskdError(
            f"run.resume {origin.checkpoint}: {changes[0]}, so its momentum does not fit. Keep the "
            "setting, or begin from its weights alone: instead of --resume, give --model.init a "
            f"checkpoint of {origin.run.path} or one of its exports."
        )


def _refuse_other_order(origin: Origin) -> None:
    """A position inside an epoch means nothing in another order of samples."""
    keys = ("train.batch_size", "train.seed", "data.last_batch")
    changes = [change for change in origin.changes if change.startswith(keys)]
    if changes:
        raise PskdError(
            f"run.resume {origin.checkpoint} lies inside an epoch, the rest of which would be "
            f"other samples: {'; '.join(changes)}. Name a checkpoint at the end of an epoch "
            "(NAME-00000000), or keep these settings."
        )


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
