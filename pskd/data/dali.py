"""Encoded images through NVIDIA DALI: on the CPU, or decoded on a GPU, by the same graph.

DALI draws nothing: which file, which window of it, mirrored or not, is a function of (seed, epoch,
id) and comes from the plan, through an external source that runs in the trainer's thread some
batches ahead. Reading, decoding (of the window alone) and resizing run in DALI's threads; there are
no worker processes.

Letters: B samples of a batch, R rows of it (its samples, then their peers), H, W pixels.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pskd import draws
from pskd.data import colour
from pskd.data.bad_images import Probe, left_out, remedies, unreadable
from pskd.data.batch import Batch
from pskd.data.graph import ImageOptions, Rows, joined, make_pipeline
from pskd.data.imagefolder import EncodedSplit, FolderCatalog
from pskd.data.transfer import to_device
from pskd.data.views import PEER, PeerChoice
from pskd.errors import CommonError, PskdError
from pskd.order import Ids, MicroBatch, Walk, where

log = logging.getLogger("pskd")

GREY = np.frombuffer(str(Path(__file__).with_name("grey.png")).encode(), np.uint8)
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
        self._suspects: set[int] = set()  # failed before: looked at alone, before they are fed
        self._grey: dict[tuple[int, int, int], tuple[int, ...]] = {}  # rows, by micro-batch
        indices = (catalog.train.index, catalog.validation.index)
        self._largest = tuple(
            max(int(getattr(index, name).max()) for index in indices)
            for name in ("widths_N", "heights_N")
        )
        self._device_id = device.index if device.type == "cuda" else None
        self._probe = self._make_probe(whole=False)

    def begin(self, walk: Walk, epoch: int, step: int) -> None:
        """Read ahead from this step on."""
        self._walk = walk
        self._start(epoch, step, 0, None)

    def train_batch(self, micro: MicroBatch) -> Batch:
        """The samples of the next micro-batch. On the CPU, valid until the next call.

        Raises:
            PskdError: an image cannot be read or decoded; names path, id, epoch and step.
        """
        key = (micro.epoch, micro.step, micro.micro)
        try:
            images, labels, maps = self._outputs(self._pipeline)
        except RuntimeError as error:
            rows = next(self._rows_of(iter([micro]), ()))
            bad = self._probe.failing(rows, list(range(len(rows.paths))))
            if not bad:
                raise
            self._refuse_or_say(micro, bad, error)
            self._suspects |= {self._ids(micro)[row] for row in bad}
            self._start(*key, bad)
            images, labels, maps = self._outputs(self._pipeline)
            self._grey.pop(key)
        else:
            bad = self._grey.pop(key, ())
            self._refuse_or_say(micro, bad, None)
        absent = tuple(sorted({row % len(micro.ids_B) for row in bad}))
        ids = self._ids(micro) if bad else []
        if self._options.section.augment == "pskd-imagenet":
            images = colour.apply(maps, images)
        size = len(micro.ids_B)
        weight_B = np.ones(size, np.float32)
        weight_B[list(absent)] = 0
        return Batch(
            ids_B=torch.from_numpy(micro.ids_B),
            images_BCHW=images[:size],
            labels_B=labels[:size],
            weight_B=to_device(weight_B, self._device),
            peer_BCHW=images[size:] if self._peer is not None else None,
            absent=absent,
            bad=tuple(sorted({ids[row] for row in bad})),
        )

    @property
    def validation_size(self) -> int:
        """Number of validation samples."""
        return len(self._validation)

    def validation_of(self, ranges: Sequence[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of some batches of validation samples, named by their numbers.

        Raises:
            PskdError: an image cannot be decoded; names its path and id.
        """
        batches = [np.arange(numbers.start, numbers.stop) for numbers in ranges]
        if not batches:
            return
        largest = max(map(len, batches))
        pipeline = self._graph(map(self._validation_rows, batches), largest, whole=True)
        for ids_B in batches:
            try:
                images, labels, _ = self._outputs(pipeline)
            except RuntimeError as error:
                rows = self._validation_rows(ids_B)
                bad = self._make_probe(whole=True).failing(rows, list(range(len(ids_B))))
                if not bad:
                    raise
                sample = int(ids_B[bad[0]])
                what = f"validation image {self._validation.path(sample)} (sample {sample})"
                self._refuse_if_gone(self._validation, sample, what, error)
                raise PskdError(
                    f"{what} cannot be decoded. {remedies(self._validation, sample)} "
                    f"{left_out(self._validation)}"
                ) from error
            yield images, labels

    def expect_bad(self, samples: list[int]) -> None:
        """These have failed before, on whatever rank: meeting them shall not cost a new start."""
        self._suspects |= set(samples)

    def name(self, sample: int) -> str:
        """Path of a training sample."""
        return self._train.path(sample)

    def close(self) -> None:
        """End DALI's threads."""
        self._pipeline = None
        self._probe = self._make_probe(whole=False)

    def _start(self, epoch: int, step: int, micro: int, bad: tuple[int, ...] | None) -> None:
        """A pipeline that begins with this micro-batch; `bad`: see `_rows_of`."""
        assert self._walk is not None, "begin comes first"
        rows = self._walk.plan.largest_micro_batch * (2 if self._peer is not None else 1)
        self._pipeline = None  # its memory first
        self._grey.clear()
        self._pipeline = self._graph(
            self._rows_of(self._walk.start(epoch, step, micro), bad), rows, whole=False
        )

    def _rows_of(self, micros: Iterator[MicroBatch], bad: tuple[int, ...] | None) -> Iterator[Rows]:
        """What each micro-batch needs; rows that are known to fail are grey.

        bad: those of the first, where they are known; else suspects are looked at.
        """
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
                if bad is None:
                    bad = self._failing_suspects(micro, rows)
                if bad:
                    self._grey[micro.epoch, micro.step, micro.micro] = bad
                for row in bad:
                    rows.paths[row] = GREY
                    rows.windows_R4[row] = _GREY_WINDOW
                bad = None
                yield rows

    def _failing_suspects(self, micro: MicroBatch, rows: Rows) -> tuple[int, ...]:
        """A window may miss an image's damage, so each is tried."""
        if not self._suspects:
            return ()
        ids = self._ids(micro)
        places = [row for row, sample in enumerate(ids) if sample in self._suspects]
        return self._probe.failing(rows, places)

    def _ids(self, micro: MicroBatch) -> list[int]:
        """Of the rows of a micro-batch."""
        ids: list[int] = micro.ids_B.tolist()
        if self._peer is not None:
            ids += self._peer(micro.epoch, micro.ids_B).tolist()
        return ids

    def _view(self, epoch: int, ids_B: Ids, view: str) -> Rows:
        options, count = self._options, len(ids_B)
        widths_B, heights_B = self._train.sizes(ids_B)
        windows_B4 = draws.windows(
            self._seed,
            epoch,
            ids_B,
            widths_B,
            heights_B,
            scale=options.section.crop_scale,
            ratio=options.section.crop_ratio,
            view=view,
        )
        mirror_B = np.zeros(count, np.int32)
        if options.section.flip:
            mirror_B = draws.flips(self._seed, epoch, ids_B, view).astype(np.int32)
        maps_B37 = np.zeros((count, 3, 7), np.float32)
        if options.section.augment == "pskd-imagenet":
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
        size_B2 = sides_B2 * self._options.section.validation_resize // shorter_B[:, None]
        # As torchvision's CenterCrop: half a pixel goes to the even side.
        room_B2 = size_B2 - self._options.section.image_size
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
            device_id=self._device_id,
            largest=self._largest,
            whole=whole,
        )
        pipeline.build()
        return pipeline

    def _make_probe(self, whole: bool) -> Probe:
        return Probe(self._options, device_id=self._device_id, largest=self._largest, whole=whole)

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

    def _refuse_or_say(
        self, micro: MicroBatch, bad: tuple[int, ...], error: RuntimeError | None
    ) -> None:
        """Say which rows of a micro-batch cannot be decoded.

        Raises:
            PskdError: they are not to be replaced, or files have gone.
        """
        ids = self._ids(micro)
        place = f"in {where(micro.epoch, micro.step)}"
        for row in bad:
            sample = ids[row]
            what = f"image {self._train.path(sample)} (sample {sample})"
            self._refuse_if_gone(self._train, sample, f"{what}, {place},", error)
            if self._options.section.on_bad_image == "stop":
                raise PskdError(
                    f"{what} cannot be decoded, {place}. {remedies(self._train, sample)} Or set "
                    "data.on_bad_image substitute: the run goes on with a grey image of weight 0 "
                    f"in its place. {left_out(self._train)}"
                ) from error
            log.error(
                "%s cannot be decoded, %s: a grey image of weight 0 takes its place", what, place
            )

    @staticmethod
    def _refuse_if_gone(
        split: EncodedSplit, sample: int, what: str, error: RuntimeError | None
    ) -> None:
        """A file that has gone is no bad image: with it, the whole folder may be away."""
        reason = unreadable(split.path(sample))
        if reason is not None:
            raise CommonError(
                f"{what} cannot be read: {reason}. Bring the images back (is {split.index.root} "
                "mounted?) and start again, the run goes on."
            ) from error
