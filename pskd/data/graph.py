"""The graph of DALI operators that images go through, what it is fed, and its options.

Letters: R rows of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from nvidia.dali import Pipeline, fn, types

from pskd.data import colour
from pskd.data.sections import DataSection

_INTERPOLATIONS = {
    "linear": types.INTERP_LINEAR,
    "cubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}


@dataclass(frozen=True)
class ImageOptions:
    """How images are read and augmented, as `section` says.

    mixed, threads: what its decoder and threads come to on this machine. channels_last: layout.
    """

    section: DataSection
    mixed: bool
    threads: int
    channels_last: bool

    def size_at(self, epoch: int) -> int:
        """Pixels of a side in an epoch: of the last entry of the schedule that has begun."""
        begun = [size for first, size in self.section.resize_schedule if first <= epoch]
        return begun[-1] if begun else self.section.image_size


class Rows(NamedTuple):
    """What DALI is fed for one batch.

    windows: y, x, height, width in pixels. size: height, width after resizing. centre: where the
    crop of a whole image lies, from 0 (top, left) to 1.
    """

    paths: list[npt.NDArray[np.uint8]]
    windows_R4: npt.NDArray[np.int32]
    centre_R2: npt.NDArray[np.float32]
    mirror_R: npt.NDArray[np.int32]
    size_R2: npt.NDArray[np.float32]
    maps_R37: npt.NDArray[np.float32]
    labels_R: npt.NDArray[np.int64]

    def part(self, rows: slice) -> "Rows":
        """Some of the rows."""
        columns: Any = (column[rows] for column in self)
        return Rows(*columns)

    def feed(self, whole: bool) -> tuple[Any, ...]:
        """As the external source returns it; with windows, or of whole images with centres."""
        common = (self.paths, self.labels_R, self.maps_R37, self.size_R2, self.mirror_R)
        if whole:
            y_R, x_R = np.ascontiguousarray(self.centre_R2.T)
            return (*common, y_R, x_R)
        start_R2 = np.ascontiguousarray(self.windows_R4[:, :2])
        shape_R2 = np.ascontiguousarray(self.windows_R4[:, 2:])
        return (*common, start_R2, shape_R2)


def joined(parts: list[Rows]) -> Rows:
    """One below the other."""
    if len(parts) == 1:
        return parts[0]
    arrays: Any = zip(*(part[1:] for part in parts), strict=True)
    paths = [path for part in parts for path in part.paths]
    return Rows(paths, *(np.concatenate(views) for views in arrays))


def make_pipeline(
    source: Callable[[], tuple[Any, ...]],
    options: ImageOptions,
    batch_size: int,
    *,
    device_id: int | None,
    largest: tuple[int, ...],
    whole: bool,
    ahead: int | None = None,
) -> Any:
    """The graph: read, decode a window (`whole`: all of it), resize, mirror, normalise.

    Not built yet. largest: width and height of the largest image, for the decoder's buffers.
    ahead: batches decoded ahead, else as the options say.
    Outputs: images float32 in the layout asked for, labels int64, colour maps float32.
    """
    section, decoder = options.section, _decoder(options, largest)
    plain = section.augment == "standard" or whole
    mean = [255 * m for m in colour.MEAN] if plain else [0.0]
    std = [255 * s for s in colour.STD] if plain else [255.0]

    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=options.threads,
        device_id=device_id,
        prefetch_queue_depth=ahead or section.prefetch,
    )
    with pipeline:
        path, label, maps, size, mirror, first, second = fn.external_source(
            source, num_outputs=7, batch=True
        )
        # Read by DALI's threads, several at a time; its mapped files would open one by one.
        encoded = fn.io.file.read(path, dont_use_mmap=True)
        if whole:
            image = fn.decoders.image(encoded, **decoder)
        else:
            image = fn.decoders.image_slice(
                encoded, start=first, shape=second, axis_names="HW", **decoder
            )
        if device_id is not None:
            image, label, maps = image.gpu(), label.gpu(), maps.gpu()
        image = fn.resize(
            image,
            size=size,
            interp_type=_INTERPOLATIONS[section.interpolation],
            antialias=True,
        )
        image = fn.crop_mirror_normalize(
            image,
            crop=(section.image_size, section.image_size) if whole else None,
            crop_pos_y=first if whole else None,
            crop_pos_x=second if whole else None,
            mirror=mirror,
            dtype=types.FLOAT,
            mean=mean,
            std=std,
            output_layout="HWC" if options.channels_last else "CHW",
        )
        pipeline.set_outputs(image, label, maps)
    return pipeline


def _decoder(options: ImageOptions, largest: tuple[int, ...]) -> dict[str, Any]:
    """Arguments of the decoding operators."""
    common: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False}
    if not options.mixed:
        return common
    return {
        **common,
        "device": "mixed",
        "hw_decoder_load": options.section.hw_decoder_load,
        "jpeg_fancy_upsampling": True,  # as the CPU's decoder does
        "preallocate_width_hint": largest[0],
        "preallocate_height_hint": largest[1],
    }
