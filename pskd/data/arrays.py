"""Resident images: one uint8 tensor on the training device, augmented by vectorised gathers.

Letters: N samples of the split, B of the batch, C = 3 channels (grey is repeated), H, W pixels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pskd import draws
from pskd.data.batch import Batch
from pskd.data.catalog import Catalog, Split
from pskd.data.transfer import to_device
from pskd.data.views import PEER, PeerChoice
from pskd.order import Ids, MicroBatch, Walk


class ArrayData:
    """The two splits of a catalog on a device, and the augmentation of the training split."""

    def __init__(
        self,
        catalog: Catalog,
        device: torch.device,
        seed: int,
        crop_padding: int,
        flip: bool,
        peer: PeerChoice | None = None,
    ) -> None:
        """`peer`: for methods that want an image of another sample beside each."""
        self._device = device
        self._seed = seed
        self._padding = crop_padding
        self._flip = flip
        self._peer = peer
        self._images_NCHW, self._labels_N = _resident(catalog.train, device)
        self._validation_NCHW, self._validation_labels_N = _resident(catalog.validation, device)
        self._mean_C11 = (
            torch.tensor(catalog.mean, dtype=torch.float32, device=device)[:, None, None] * 255
        )
        self._std_C11 = (
            torch.tensor(catalog.std, dtype=torch.float32, device=device)[:, None, None] * 255
        )

    def begin(self, walk: Walk, epoch: int, step: int) -> None:
        """Nothing to read ahead."""

    def close(self) -> None:
        """Nothing to end."""

    def expect_bad(self, samples: list[int]) -> None:
        """None is."""

    def name(self, sample: int) -> str:
        """Its number is all that there is."""
        return f"sample {sample}"

    def train_batch(self, micro: MicroBatch) -> Batch:
        """The samples of a micro-batch, augmented by the draws of its epoch."""
        ids_B, epoch = micro.ids_B, micro.epoch
        peer_BCHW = None
        if self._peer is not None:
            peer_BCHW = self._view(epoch, self._peer(epoch, ids_B), PEER)
        return Batch(
            ids_B=torch.from_numpy(ids_B),
            images_BCHW=self._view(epoch, ids_B, ""),
            labels_B=self._labels_N[to_device(ids_B, self._device)],
            weight_B=torch.ones(len(ids_B), device=self._device),
            peer_BCHW=peer_BCHW,
        )

    def _view(self, epoch: int, ids_B: Ids, view: str) -> Tensor:
        index_B = to_device(ids_B, self._device)
        y_BH, x_BW = (
            to_device(grid, self._device)
            for grid in draws.crop_grid(
                self._seed,
                epoch,
                ids_B,
                height=self._images_NCHW.shape[2],
                width=self._images_NCHW.shape[3],
                padding=self._padding,
                flip=self._flip,
                view=view,
            )
        )
        # Whole images by index_select, which copies them: [] would gather single bytes.
        images_BCHW = self._images_NCHW.index_select(0, index_B)
        return self._normalise(_gather(images_BCHW, y_BH, x_BW))

    @property
    def validation_size(self) -> int:
        """Number of validation samples."""
        return len(self._validation_labels_N)

    def validation_of(self, ranges: Sequence[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of some batches of validation samples, named by their numbers."""
        for numbers in ranges:
            part = slice(numbers.start, numbers.stop)
            yield self._normalise(self._validation_NCHW[part]), self._validation_labels_N[part]

    def _normalise(self, images_BCHW: Tensor) -> Tensor:
        scaled_BCHW = images_BCHW.float().sub_(self._mean_C11).div_(self._std_C11)
        return scaled_BCHW.expand(-1, 3, -1, -1).contiguous()


def _resident(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    images_NCHW = torch.from_numpy(split.images_NHWC).permute(0, 3, 1, 2).contiguous()
    return images_NCHW.to(device), torch.from_numpy(split.labels_N).to(device)


def _gather(images_BCHW: Tensor, y_BH: Tensor, x_BW: Tensor) -> Tensor:
    """Pixels at rows y_BH and columns x_BW; black where they lie outside the image."""
    batch, channels, height, width = images_BCHW.shape
    inside_BHW = ((y_BH >= 0) & (y_BH < height))[:, :, None] & ((x_BW >= 0) & (x_BW < width))[
        :, None, :
    ]
    row_BH, column_BW = y_BH.clamp(0, height - 1), x_BW.clamp(0, width - 1)
    place_BP = (row_BH[:, :, None] * width + column_BW[:, None, :]).flatten(1)
    pixels_BCP = images_BCHW.flatten(2).gather(2, place_BP[:, None].expand(-1, channels, -1))
    return pixels_BCP.view(batch, channels, height, width).mul_(inside_BHW[:, None])
