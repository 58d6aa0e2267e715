"""Encoded images through NVIDIA DALI: on the CPU, or decoded on a GPU, by the same graph.

DALI draws nothing: which file, which window of it, mirrored or not, is a function of (seed, epoch,
id) and comes from the plan, through an external source that runs in the trainer's thread some
batches ahead. Reading, decoding (of the window alone) and resizing run in DALI's threads; there are
no worker processes.

Letters: B samples of a batch, R rows of it (its samples, then their peers), H, W pixels.
"""

import logging
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pskd import draws
from pskd.data import colour
from pskd.data.batch import Batch
from pskd.data.graph import ImageOptions, Rows, joined, make_pipeline
from pskd.data.imagefolder import FolderCatalog
from pskd.data.views import PEER, PeerChoice
from pskd.errors import PskdError
from pskd.order import Ids, MicroBatch, Walk

log = logging.getLogger("pskd")

_GREY = np.frombuffer(str(Path(__file__).with_name("grey.png")).encode(), np.uint8)
_GREY_WINDOW = np.array([0, 0, 8, 8], np.int32)
_DRAWN_AT_A_TIME = 1024  # samples


def _groups(micros: Iterator[MicroBatch]) -> Iterator[list[MicroBatch]]:
    """Some micro-batches of one epoch at a time: drawing for few samples costs as much a call."""
    for _, epoch in groupby(micros, key=lambda micro: micro.epoch):
        group: list[MicroBatch] = []
        for micro in epoch:
            group.append(micro)
            if sum(len(each.ids_B) for each in group) >= _DRAWN_AT_A_TIME:
                yield group
                group = []
        if group:
            yield group


class DaliData:
    """The two splits of a folder, decoded ahead of the trainer."""

    def __init__(
        self,
        catalog: FolderCatalog,
        device: torch.device,
        seed: int,
        options: ImageOptions,
        peer: PeerChoice | None = None,
    ) -> None:
        """`peer`: for methods that want an image of another sample beside each."""
        self._train, self._validation = catalog.train, catalog.validation
        self._device = device
        self._seed = seed
        self._options = options
        self._peer = peer
        self._pipeline: Any = None
        self._walk: Walk | None = None
        indices = (catalog.train.index, catalog.validation.index)
        self._largest = tuple(
            max(int(getattr(index, name).max()) for index in indices)
            for name in ("widths_N", "heights_N")
        )

    def begin(self, walk: Walk, epoch: int, step: int) -> None:
        """Read ahead from this step on."""
        self._walk = walk
        self._start(epoch, step, 0, ())

    def train_batch(self, micro: MicroBatch) -> Batch:
        """The samples of the next micro-batch. On the CPU, valid until the next call.

        Raises:
            PskdError: an image cannot be decoded; names path, id, epoch and step.
        """
        absent: tuple[int, ...] = ()
        try:
            images, labels, maps = self._outputs(self._pipeline)
        except RuntimeError as error:
            bad = self._refuse_or_replace(micro, error)
            self._start(micro.epoch, micro.step, micro.micro, bad)
            images, labels, maps = self._outputs(self._pipeline)
            absent = tuple(sorted({row % len(micro.ids_B) for row in bad}))
        if self._options.augment == "pskd-imagenet":
            images = colour.apply(maps, images)
        size = len(micro.ids_B)
        weight_B = torch.ones(size)
        weight_B[list(absent)] = 0
        return Batch(
            ids_B=torch.from_numpy(micro.ids_B),
            images_BCHW=images[:size],
            labels_B=labels[:size],
            weight_B=weight_B.to(self._device, non_blocking=True),
            peer_BCHW=images[size:] if self._peer is not None else None,
            absent=absent,
        )

    def validation_batches(
        self, rank: int, world: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of the rank's contiguous share; every sample is in one share.

        Raises:
            PskdError: an image cannot be decoded; names its path and id.
        """
        n = len(self._validation)
        low, high = rank * n // world, (rank + 1) * n // world
        batches = [
            np.arange(start, min(start + batch_size, high))
            for start in range(low, high, batch_size)
        ]
        if not batches:
            return
        rows = map(self._validation_rows, batches)
        pipeline = self._graph(rows, batch_size, whole=True)
        for ids_B in batches:
            try:
                images, labels, _ = self._outputs(pipeline)
            except RuntimeError as error:
                bad = self._undecodable(self._validation_rows(ids_B), whole=True)
                if not bad:
                    raise
                path = self._validation.path(int(ids_B[bad[0]]))
                raise PskdError(
                    f"validation image {path} (sample {ids_B[bad[0]]}) cannot be decoded. Mend it, "
                    f"or leave it out: `pskd index {self._validation.index.root} --drop-bad "
                    "--verify`."
                ) from error
            yield images, labels

    def close(self) -> None:
        """End DALI's threads."""
        self._pipeline = None

    def _start(self, epoch: int, step: int, micro: int, bad: tuple[int, ...]) -> None:
        """A pipeline that begins with this micro-batch; `bad` rows of it are grey."""
        assert self._walk is not None, "begin comes first"
        rows = self._walk.plan.largest_micro_batch * (2 if self._peer is not None else 1)
        self._pipeline = None  # its memory first
        self._pipeline = self._graph(
            self._rows_of(self._walk.start(epoch, step, micro), bad), rows, whole=False
        )

    def _rows_of(self, micros: Iterator[MicroBatch], bad: tuple[int, ...]) -> Iterator[Rows]:
        """What each micro-batch needs; `bad` rows of the first are grey."""
        for group in _groups(micros):
            epoch, ids = group[0].epoch, np.concatenate([micro.ids_B for micro in group])
            views = [self._view(epoch, ids, "")]
            if self._peer is not None:
                views.append(self._view(epoch, self._peer(epoch, ids), PEER))
            first = 0
            for micro in group:
                part = slice(first, first + len(micro.ids_B))
                first = part.stop
                rows = joined([view.part(part) for view in views])
                for row in bad:
                    rows.paths[row] = _GREY
                    rows.windows_R4[row] = _GREY_WINDOW
                bad = ()
                yield rows

    def _view(self, epoch: int, ids_B: Ids, view: str) -> Rows:
        options, count = self._options, len(ids_B)
        widths_B, heights_B = self._train.sizes(ids_B)
        windows_B4 = draws.windows(
            self._seed,
            epoch,
            ids_B,
            widths_B,
            heights_B,
            scale=options.crop_scale,
            ratio=options.crop_ratio,
            view=view,
        )
        mirror_B = np.zeros(count, np.int32)
        if options.flip:
            mirror_B = draws.flips(self._seed, epoch, ids_B, view).astype(np.int32)
        maps_B37 = np.zeros((count, 3, 7), np.float32)
        if options.augment == "pskd-imagenet":
            maps_B37 = colour.maps(self._seed, epoch, ids_B, view)
        size_B2 = np.full((count, 2), options.size_at(epoch), np.float32)
        return Rows(
            self._train.paths(ids_B),
            windows_B4,
            np.zeros((count, 2), np.float32),
            mirror_B,
            size_B2,
            maps_B37,
            self._train.labels_N[ids_B],
        )

    def _validation_rows(self, ids_B: Ids) -> Rows:
        """Whole images, the shorter side resized; the centre is cut out afterwards."""
        widths_B, heights_B = self._validation.sizes(ids_B)
        # As torchvision's Resize: the longer side is rounded down.
        shorter_B = np.minimum(widths_B, heights_B)
        sides_B2 = np.stack([heights_B, widths_B], axis=1).astype(np.int64)
        size_B2 = sides_B2 * self._options.validation_resize // shorter_B[:, None]
        # As torchvision's CenterCrop: half a pixel goes to the even side.
        room_B2 = size_B2 - self._options.image_size
        centre_B2 = np.rint(room_B2 / 2) / np.maximum(room_B2, 1)
        count = len(ids_B)
        return Rows(
            self._validation.paths(ids_B),
            np.zeros((count, 4), np.int32),
            centre_B2.astype(np.float32),
            np.zeros(count, np.int32),
            size_B2.astype(np.float32),
            np.zeros((count, 3, 7), np.float32),
            self._validation.labels_N[ids_B],
        )

    def _graph(self, rows: Iterator[Rows], batch_size: int, whole: bool) -> Any:
        pipeline = make_pipeline(
            lambda: next(rows).feed(whole),
            self._options,
            batch_size,
            device_id=self._device.index if self._device.type == "cuda" else None,
            largest=self._largest,
            whole=whole,
        )
        pipeline.build()
        return pipeline

    def _outputs(self, pipeline: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and colour maps of the next batch, on the training device."""
        if self._device.type != "cuda":
            outputs = [from_dlpack(out.as_tensor()) for out in pipeline.run()]
        else:
            stream = torch.cuda.current_stream(self._device)
            # DALI will write the next batch over this one while the network still reads it.
            outputs = [from_dlpack(out.as_tensor()).clone() for out in pipeline.run(stream)]
        images, labels, maps = outputs
        if self._options.channels_last:
            images = images.permute(0, 3, 1, 2)
        return images, labels, maps

    def _refuse_or_replace(self, micro: MicroBatch, error: RuntimeError) -> tuple[int, ...]:
        """Which rows of the batch cannot be decoded.

        Raises:
            PskdError: they are not to be replaced.
            RuntimeError: it is something else.
        """
        bad = self._undecodable(next(self._rows_of(iter([micro]), ())), whole=False)
        if not bad:
            raise error
        ids = micro.ids_B.tolist()
        if self._peer is not None:
            ids += self._peer(micro.epoch, micro.ids_B).tolist()
        for row in bad:
            what = (
                f"image {self._train.path(ids[row])} (sample {ids[row]}) cannot be decoded, in "
                f"epoch {micro.epoch}, step {micro.step}"
            )
            if self._options.on_bad_image == "stop":
                raise PskdError(
                    f"{what}. Mend it, leave it out (`pskd index {self._train.index.root} "
                    "--drop-bad --verify`), or set data.on_bad_image substitute in a new run."
                ) from error
            log.error("%s: a grey image of weight 0 takes its place", what)
        return tuple(bad)

    def _undecodable(self, rows: Rows, whole: bool) -> list[int]:
        """Rows that fail alone, in a pipeline of one row."""
        bad: list[int] = []
        while True:
            first = bad[-1] + 1 if bad else 0
            singles = (rows.part(slice(row, row + 1)) for row in range(first, len(rows.paths)))
            pipeline = self._graph(singles, 1, whole)
            try:
                for row in range(first, len(rows.paths)):  # noqa: B007  (named in the handler)
                    pipeline.run()
                return bad
            except RuntimeError:
                bad.append(row)
