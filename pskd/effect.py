"""Which options other options leave without effect. What only one data set reads: `config.py`."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Ignored(NamedTuple):
    """key: nothing reads it. by: the keys whose values are why."""

    key: str
    by: tuple[str, ...]
    reason: str


def ignored(values: Mapping[str, Any], keeps_predictions: bool) -> Iterator[Ignored]:
    """The options that nothing reads.

    values: flat `section.field` -> value, of all fields. keeps_predictions: see `MethodSection`.
    """
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
    if values["schedule.name"] == "cosine":
        reason = "a cosine has no steps"
        yield from _all("schedule.milestones schedule.gamma", "schedule.name", reason)
    elif not values["schedule.milestones"]:
        reason = "the rate drops at no milestone"
        yield from _all("schedule.gamma", "schedule.milestones", reason)
    if values["data.held_out"]:
        reason = "training samples are held out instead of val/"
        yield from _all("data.val_index_path", "data.held_out", reason)
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


def _all(keys: str, by: str, reason: str) -> Iterator[Ignored]:
    for key in keys.split():
        yield Ignored(key, tuple(by.split()), reason)
