"""Whether the configured training fits: its data, its network, its files, the disk's room."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pskd import deepspeed_config, disk
from pskd.config import Config
from pskd.data import index
from pskd.data.catalog import FOLDER
from pskd.doctor.page import OK, WARNING, WRONG, Line
from pskd.errors import PskdError
from pskd.job import compare_configurations, deepspeed_settings, network
from pskd.loading import catalog_and_plan
from pskd.methods.sections import TFKDSelfSection
from pskd.run_dir import RunDir
from pskd.sites import Sites
from pskd.startup import check_shared
from pskd.world import World


def is_configured(config: Config) -> bool:
    """Whether anything but the run's place was said."""
    defaults = config.defaults()
    return any(
        value != defaults[key] for key, value in config.flat().items() if not key.startswith("run.")
    )


def lines(config: Config, path: Path, here: World, sites: Sites) -> list[Line]:
    """Collective. path: of the run directory on this node."""
    found: list[Line] = []
    try:
        compare_configurations(config, here)
        settings = deepspeed_settings(config, here)
        if sites.separate:
            check_shared(config, settings)
        with here.together():
            _check_files(config)
        with here.together():
            RunDir(path).check_same(config)
        found.append(Line("configuration", OK, _described(config, path)))
    except PskdError as error:
        return [Line("configuration", WRONG, str(error))]
    unindexed = [reason for reason in here.gather(_unindexed(config)) if reason]
    if unindexed:
        remedy = "Until then, what its run needs on the disk is not known."
        return [*found, Line("data", WARNING, unindexed[0], remedy)]
    return found + _samples_and_disk(config, settings, path, here, sites)


def _samples_and_disk(
    config: Config, settings: dict[str, Any], path: Path, here: World, sites: Sites
) -> list[Line]:
    try:
        # Looking changes nothing: what is not there is fetched by the run.
        local = replace(config, data=replace(config.data, download=False))
        catalog, plan = catalog_and_plan(local, here)
    except PskdError as error:
        if config.data.download:
            remedy = "Until then, what its run needs on the disk is not known."
            return [Line("data", WARNING, f"the run will fetch it: {error}", remedy)]
        return [Line("data", WRONG, str(error))]
    text = f"{config.data.name}, {len(catalog.train)} training and {len(catalog.validation)} "
    found = [Line("data", OK, f"{text}validation images of {catalog.num_classes} classes")]
    try:
        model = network(config, catalog, here)
    except PskdError as error:
        return [*found, Line("network", WRONG, str(error))]
    need = disk.need_of(
        config,
        model,
        n=plan.n,
        classes=catalog.num_classes,
        ranks=here.size,
        sharded=deepspeed_config.stage(settings) > 0,
    )
    if sites.leads:
        try:
            found.append(Line("disk", OK, disk.check(path, need).removeprefix("disk: ")))
        except PskdError as error:
            found.append(Line("disk", WRONG, str(error)))
        except OSError as error:
            found.append(Line("disk", WRONG, f"{path}: {error.strerror}"))
    return found


def _check_files(config: Config) -> None:
    """Weights that the run begins with, or that teach it, are there."""
    named = {"model.init": config.model.init}
    if isinstance(config.method, TFKDSelfSection):
        named["method.teacher"] = config.method.teacher
    for key, value in named.items():
        if value is not None and not Path(value).exists():
            raise PskdError(f"{key} {value}: no such file. Name an export, a run or a file.")


def _described(config: Config, path: Path) -> str:
    name = config.run.recipe or f"{config.data.name} by {config.method.name}"
    held = (path / "config.yaml").exists()
    return f"{name}{', with which the run goes on' if held else ''}"


def _unindexed(config: Config) -> str | None:
    """Why a folder of images has no current index: building one may take long."""
    section = config.data
    if section.name != FOLDER or section.root is None:
        return None
    root = Path(section.root)
    train = root / "train" if (root / "train").is_dir() else root
    folders = [(train, section.index_path)]
    if not section.held_out and (root / "val").is_dir():
        folders.append((root / "val", section.val_index_path))
    for folder, place in folders:
        if not folder.is_dir():
            return None  # said by who reads it
        _, reason = index.find(folder, None if place is None else Path(place))
        if reason is not None:
            return f"{folder}: {reason}. The run builds one, or `{index.command(root)}` now."
    return None
