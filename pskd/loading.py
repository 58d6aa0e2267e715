"""From the configuration to samples: which there are, who trains them when, what decodes them."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pskd.config import Config
from pskd.data import colour, imagefolder
from pskd.data.arrays import ArrayData
from pskd.data.catalog import FOLDER, Catalog, load
from pskd.data.imagefolder import FolderCatalog
from pskd.data.interface import Data
from pskd.data.mix import Mixer
from pskd.data.preprocessing import described
from pskd.data.sections import DataSection
from pskd.data.views import SameClass
from pskd.errors import AgreedError, PskdError
from pskd.order import Plan

if TYPE_CHECKING:  # it imports DeepSpeed, which takes seconds and is not needed to read samples
    from pskd.world import World

_HEAD_START_S = 0.2

AnyCatalog = Catalog | FolderCatalog


def catalog_and_plan(config: Config, here: "World") -> tuple[AnyCatalog, Plan]:
    """Collective: the samples, and how they are dealt out."""
    catalog = agreed_catalog(config.data, here)
    plan = Plan(
        n=len(catalog.train),
        global_batch=config.train.batch_size,
        world=here.size,
        accumulation=config.train.accumulation,
        last_batch=config.data.last_batch,
    )
    with here.together():
        plan.check()
    return catalog, plan


def agreed_catalog(
    section: DataSection, here: "World", *, validation_only: bool = False
) -> AnyCatalog:
    """Collective: the samples, equal on all ranks.

    validation_only: of a folder, `val/` or one of classes will do; it stands for both splits.
    """
    with here.together():
        if section.decoder == "mixed" and here.device.type != "cuda":
            raise PskdError("data.decoder mixed decodes on a GPU, and there is none: use cpu.")
    if section.name == FOLDER and here.local_rank > 0:
        time.sleep(_HEAD_START_S)  # the first rank of a node builds an index, and says so
    # Fetching is for one process at a time: rank 0, then one of each other node, then the rest.
    turn = 0 if here.rank == 0 else 1 if here.local_rank == 0 else 2
    for now in range(3) if section.download else [turn]:
        with here.together():
            if turn == now:
                catalog = local_catalog(section, validation_only=validation_only)
    with here.together():
        _check_classes(section, catalog)
    fingerprints = here.gather(catalog.fingerprint)
    odd = [rank for rank, f in enumerate(fingerprints) if f != fingerprints[0]]
    if odd:
        raise AgreedError(
            f"data.name {section.name}: ranks {odd} read other samples than rank 0. "
            "Give every node the same data."
        )
    return catalog


def _check_classes(section: DataSection, catalog: AnyCatalog) -> None:
    if catalog.num_classes < 2:
        raise PskdError(
            f"data.name {section.name} has only the class {catalog.class_names[0]!r}: there is "
            "nothing to tell apart. Give it 2 classes or more; of a folder, data.root must hold "
            "train/<class>/*."
        )


def input_sizes(section: DataSection, catalog: AnyCatalog) -> tuple[set[tuple[int, int]], str]:
    """(height, width) of all images that the network will see, and the key that changes them."""
    if isinstance(catalog, Catalog):
        splits = (catalog.train, catalog.validation)
        return {split.images_NHWC.shape[1:3] for split in splits}, "data.pad_to"
    sides = {section.image_size, *(size for _, size in section.resize_schedule)}
    return {(side, side) for side in sides}, "data.image_size"


def loader(config: Config, here: "World", catalog: AnyCatalog, *, peers: bool) -> Data:
    """What turns ids into batches on this rank's device. peers: see `Method.needs_peers`."""
    section, seed = config.data, config.train.seed
    peer = SameClass(seed, catalog.train.labels_N) if peers else None
    if isinstance(catalog, Catalog):
        padding = section.crop_padding
        return ArrayData(catalog, here.device, seed, padding, section.flip, peer)
    from pskd.data.dali import DaliData  # noqa: PLC0415  (DALI is optional otherwise)
    from pskd.data.graph import ImageOptions  # noqa: PLC0415

    gpu = here.device.type == "cuda"
    cores = len(os.sched_getaffinity(0))
    options = ImageOptions(
        section,
        mixed=gpu and section.decoder != "cpu",
        threads=section.threads or max(1, cores // here.local_size),
        channels_last=config.engine.channels_last,
    )
    return DaliData(catalog, here.device, seed, options, peer)


def local_catalog(section: DataSection, *, validation_only: bool = False) -> AnyCatalog:
    """The samples, as this process alone finds them.

    Raises:
        PskdError: the samples are missing or damaged.
    """
    if section.name == FOLDER:
        if section.root is None:
            raise PskdError(
                f"data.name {FOLDER} needs --data.root DIR, which holds train/ and val/."
            )
        if validation_only and not section.held_out:
            return imagefolder.load_validation(
                Path(section.root), val_index_path=section.val_index_path
            )
        return imagefolder.load(
            Path(section.root),
            index_path=section.index_path,
            val_index_path=section.val_index_path,
            held_out=section.held_out,
            limit=section.limit,
        )
    return load(
        section.name,
        root=section.root,
        download=section.download,
        held_out=section.held_out,
        limit=section.limit,
        pad_to=section.pad_to,
    )


def preprocessing(section: DataSection, catalog: AnyCatalog) -> dict[str, Any]:
    """How validation images become the network's input; see `data/preprocessing.py`."""
    if isinstance(catalog, Catalog):
        height, width = catalog.validation.images_NHWC.shape[1:3]
        return described(
            catalog.class_names,
            mean=catalog.mean,
            std=catalog.std,
            height=height,
            width=width,
            pad_to=section.pad_to or None,
        )
    return described(
        catalog.class_names,
        mean=colour.MEAN,
        std=colour.STD,
        height=section.image_size,
        width=section.image_size,
        resize=section.validation_resize,
        interpolation=section.interpolation,
    )


def mixer(config: Config) -> Mixer:
    """What mixes and erases the images of a batch."""
    return Mixer(config.train.seed, config.mixing, config.erasing)
