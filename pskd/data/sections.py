"""What a configuration says of the data and their augmentation. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pskd.data.catalog import DATASETS, FOLDER
from pskd.fields import known, numerics, output, require, speed


@dataclass(frozen=True)
class DataSection:
    """What is trained on, and its augmentation."""

    name: str = numerics("digits", f"the data set; {FOLDER}: a folder of encoded images")
    root: str | None = output(None, "the folder that holds it (default: data)")
    download: bool = output(False, "fetch it if it is not there")
    limit: int = numerics(0, "train so many samples, the first (of a folder: of smallest hash)")
    held_out: int = numerics(0, "validate on so many training samples instead of the test split")
    pad_to: int = numerics(0, "black borders up to so many pixels; 0: none")
    crop_padding: int = numerics(0, "random crop out of the image padded by so many pixels")
    flip: bool = numerics(False, "random horizontal flip")
    last_batch: Literal["train", "drop"] = numerics("train", "what becomes of the short last batch")

    index_path: str | None = output(
        None, "folder: index of the training images (default: beside them, else in the cache)"
    )
    val_index_path: str | None = output(None, "folder: the same of the validation images")
    augment: Literal["standard", "pskd-imagenet"] = numerics(
        "standard", "folder: random resized crop; or with the public code's colours as well"
    )
    image_size: int = numerics(224, "folder: pixels of a side of what the network sees")
    resize_schedule: list[list[int]] = numerics(
        [], "folder: [[first epoch, pixels], ...] of training images, instead of image_size"
    )
    crop_scale: list[float] = numerics([0.08, 1.0], "folder: share of the area that is cut out")
    crop_ratio: list[float] = numerics([3 / 4, 4 / 3], "folder: its width by its height")
    validation_resize: int = numerics(
        256, "folder: pixels of the shorter side before the centre is cut out"
    )
    interpolation: Literal["linear", "cubic", "lanczos"] = numerics(
        "linear", "folder: how images are resized, anti-aliased"
    )
    on_bad_image: Literal["stop", "substitute"] = output(  # a run that had none is not changed
        "stop",
        "folder: an image that cannot be decoded stops the run, or is a grey one of weight 0",
    )
    decoder: Literal["auto", "cpu", "mixed"] = numerics(
        "auto", "folder: where images are decoded; auto: on the GPU (mixed) if there is one"
    )
    hw_decoder_load: float = numerics(
        0.65,
        "folder: share of a batch for the GPU's decoding engine, if it has one; 0 or 1: which "
        "decoder an image meets depends on no batch, and neither do its pixels",
    )
    threads: int = speed(0, "folder: decoding threads a rank; 0: its share of the cores")
    prefetch: int = speed(2, "folder: batches decoded ahead")

    def check(self) -> None:
        """The data set exists; ranges."""
        known(self.name, [*DATASETS, FOLDER], "data.name")
        for name in ("limit", "held_out", "pad_to", "crop_padding", "threads"):
            value = getattr(self, name)
            require(value >= 0, f"data.{name}", value, "use 0 or more.")
        require(self.root != "", "data.root", "''", "name a folder, or leave the flag out.")
        for name in ("image_size", "validation_resize", "prefetch"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name}", value, "use 1 or more.")
        require(
            self.validation_resize >= self.image_size,
            "data.validation_resize",
            self.validation_resize,
            f"use at least data.image_size {self.image_size}: the centre is cut out.",
        )
        _check_interval("data.crop_scale", self.crop_scale, 1.0)
        _check_interval("data.crop_ratio", self.crop_ratio, math.inf)
        epochs = [entry[0] for entry in self.resize_schedule if len(entry) == 2]
        require(
            len(epochs) == len(self.resize_schedule)
            and epochs == sorted(set(epochs))
            and all(e >= 0 and size >= 1 for e, size in self.resize_schedule),
            "data.resize_schedule",
            self.resize_schedule,
            "give [[epoch, pixels], ...] with rising epochs from 0 on.",
        )
        require(
            0 <= self.hw_decoder_load <= 1,
            "data.hw_decoder_load",
            self.hw_decoder_load,
            "use a share from 0 to 1.",
        )


def described(data: Mapping[str, Any]) -> str:
    """The validation samples of a data section, in words: what differs here does not compare."""
    root = f" {data.get('root')}" if data["name"] == FOLDER else ""
    held_out = f", {data['held_out']} held out" if data.get("held_out") else ""
    return f"{data['name']}{root}{held_out}"


@dataclass(frozen=True)
class MixingSection:
    """Images mixed with each other, for any method and data set."""

    name: Literal["none", "mixup", "cutmix"] = numerics("none", "how, if at all")
    alpha: float = numerics(1.0, "of the Beta(alpha, alpha) that the shares come from")
    probability: float = numerics(1.0, "of an image to be mixed")

    def check(self) -> None:
        """Ranges."""
        require(self.alpha > 0, "mixing.alpha", self.alpha, "use a positive value.")
        _check_probability("mixing", self.probability)


@dataclass(frozen=True)
class ErasingSection:
    """Parts of images made grey, for any method and data set."""

    name: Literal["none", "cutout", "random-erasing"] = numerics("none", "how, if at all")
    size: int = numerics(16, "cutout: pixels of a side of the square")
    probability: float = numerics(1.0, "of an image to lose something")
    scale: list[float] = numerics([0.02, 1 / 3], "random-erasing: share of the area")
    ratio: list[float] = numerics([0.3, 3.3], "random-erasing: height by width of the box")

    def check(self) -> None:
        """Ranges."""
        require(self.size >= 1, "erasing.size", self.size, "use 1 pixel or more.")
        _check_probability("erasing", self.probability)
        _check_interval("erasing.scale", self.scale, 1.0)
        _check_interval("erasing.ratio", self.ratio, math.inf)


def _check_probability(section: str, value: float) -> None:
    require(0 <= value <= 1, f"{section}.probability", value, "use a value in [0, 1].")


def _check_interval(key: str, value: list[float], top: float) -> None:
    require(
        len(value) == 2 and 0 < value[0] <= value[1] <= top and math.isfinite(value[1]),
        key,
        value,
        "give [smallest, largest], above 0" + (" and at most 1." if top == 1 else ", finite."),
    )
