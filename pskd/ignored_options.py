"""Which options other options leave without effect. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pskd.data.catalog import DATASETS, FOLDER

_OF_ARRAYS = "data.download data.pad_to data.crop_padding"
_OF_FOLDERS = (
    "data.index_path data.val_index_path data.augment data.image_size data.resize_schedule "
    "data.crop_scale data.crop_ratio data.validation_resize data.interpolation data.on_bad_image "
    "data.decoder data.hw_decoder_load data.threads data.prefetch"
)


class Ignored(NamedTuple):
    """key: nothing reads it. by: the keys whose values are why."""

    key: str
    by: tuple[str, ...]
    reason: str


def ignored(values: Mapping[str, Any], keeps_predictions: bool) -> Iterator[Ignored]:
    """The options that nothing reads.

    values: flat `section.field` -> value, of all fields. keeps_predictions: see `MethodSection`.
    """
    yield from _of_data(values)
    yield from _of_augmentation(values)
    if values["schedule.name"] == "cosine":
        reason = "a cosine has no steps"
        yield from _all("schedule.milestones schedule.gamma", "schedule.name", reason)
    elif not values["schedule.milestones"]:
        reason = "the rate drops at no milestone"
        yield from _all("schedule.gamma", "schedule.milestones", reason)
    if values["model.init"] is None:
        yield from _all("model.new_head", "model.init", "there is no head to be replaced")
    if "method.averaging" in values and not keeps_predictions:
        yield from _all("method.averaging", "method.teacher", "no rows are kept to be averaged")
    if not keeps_predictions:
        yield from _all(
            "store.encoding store.read store.readahead_bytes",
            "method.name method.teacher",
            "the method keeps no past predictions",
        )
    if values["tracking.wandb"] == "off":
        yield from _all("tracking.wandb_project", "tracking.wandb", "nothing goes there")
    if not values["optimizer.weight_decay"]:
        reason = "there is no weight decay"
        yield from _all("optimizer.decay_norm_and_bias", "optimizer.weight_decay", reason)


def _of_data(values: Mapping[str, Any]) -> Iterator[Ignored]:
    if values["data.name"] == FOLDER:
        yield from _all(_OF_ARRAYS, "data.name", "only data sets held in memory read it")
        if values["data.held_out"]:
            reason = "training samples are held out instead of val/"
            yield from _all("data.val_index_path", "data.held_out", reason)
    elif values["data.name"] in DATASETS:
        yield from _all(_OF_FOLDERS, "data.name", f"only data.name {FOLDER} reads it")
    if values["data.name"] == "digits":
        yield from _all("data.root data.download", "data.name", "they come with scikit-learn")


def _of_augmentation(values: Mapping[str, Any]) -> Iterator[Ignored]:
    if values["mixing.name"] == "none":
        yield from _all("mixing.alpha mixing.probability", "mixing.name", "no images are mixed")
    erasing = values["erasing.name"]
    if erasing == "none":
        yield from _all(
            "erasing.size erasing.probability erasing.scale erasing.ratio",
            "erasing.name",
            "nothing is erased",
        )
    elif erasing == "cutout":
        reason = "cutout has a size"
        yield from _all("erasing.scale erasing.ratio", "erasing.name", reason)
    else:
        yield from _all("erasing.size", "erasing.name", "random-erasing has a scale and a ratio")


def _all(keys: str, by: str, reason: str) -> Iterator[Ignored]:
    for key in keys.split():
        yield Ignored(key, tuple(by.split()), reason)
