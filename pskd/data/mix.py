"""Mixup, CutMix, Cutout and Random Erasing on the training device, with stateless draws.

Samples 2j and 2j + 1 of a global batch mix with each other (an odd last one stays as it is), so who
mixes with whom, and how, is the same on any world. Each draws its own share and box.

Erasing comes first, on every view, each with its own draws; then mixing. Erased pixels become 0,
the mean colour.

Letters: B samples, H, W pixels.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pskd import draws
from pskd.data.batch import Batch, Mix
from pskd.data.sections import ErasingSection, MixingSection
from pskd.data.transfer import to_device
from pskd.data.views import PEER
from pskd.order import Ids

Boxes = npt.NDArray[np.int64]  # (B, 4): top, left, bottom, right; empty where nothing is done


class Mixer:
    """Erases and mixes the batches of one run."""

    def __init__(self, seed: int, mixing: MixingSection, erasing: ErasingSection) -> None:
        self._seed, self._mixing, self._erasing = seed, mixing, erasing

    def __call__(self, batch: Batch, epoch: int) -> Batch:
        """Micro-batches begin with an even place of the global batch: pairs are neighbours."""
        if self._erasing.name != "none":
            batch = replace(batch, images_BCHW=self._erase(batch, batch.images_BCHW, epoch, ""))
            if batch.peer_BCHW is not None:
                erased_BCHW = self._erase(batch, batch.peer_BCHW, epoch, PEER)
                batch = replace(batch, peer_BCHW=erased_BCHW)
        if self._mixing.name == "none":
            return batch
        partner_B = partners(len(batch.ids_B), batch.absent)
        ids_B = batch.ids_B.numpy()
        share_B = shares(self._seed, epoch, ids_B, self._mixing)
        share_B = np.where(partner_B == np.arange(len(ids_B)), 1.0, share_B)
        height, width = batch.images_BCHW.shape[2:]
        boxes_B4 = None
        if self._mixing.name == "cutmix":
            boxes_B4 = cut_boxes(self._seed, epoch, ids_B, share_B, height, width)
            share_B = 1 - _areas(boxes_B4) / (height * width)
        device = batch.images_BCHW.device
        mix = Mix(
            to_device(partner_B, device),
            to_device(share_B.astype(np.float32), device),
            tuple(np.flatnonzero(share_B < 0.5).tolist()),
        )
        peer_BCHW = batch.peer_BCHW
        return replace(
            batch,
            images_BCHW=_mixed(batch.images_BCHW, mix, boxes_B4),
            # Peers stand for the same mixture: of the same classes, in the same shares.
            peer_BCHW=None if peer_BCHW is None else _mixed(peer_BCHW, mix, boxes_B4),
            mix=mix,
        )

    def _erase(self, batch: Batch, images_BCHW: Tensor, epoch: int, view: str) -> Tensor:
        height, width = images_BCHW.shape[2:]
        find = cutout_boxes if self._erasing.name == "cutout" else erased_boxes
        boxes_B4 = find(self._seed, epoch, batch.ids_B.numpy(), self._erasing, height, width, view)
        return images_BCHW.masked_fill(_inside(boxes_B4, images_BCHW), 0.0)


def partners(count: int, absent: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Place of each one's mixing partner: int64 (count,).

    Its own for an odd last one, and for a pair of which one is absent.
    """
    place_B = np.arange(count)
    partner_B = np.where(place_B ^ 1 < count, place_B ^ 1, place_B)
    for place in absent:
        pair = [place, partner_B[place]]
        partner_B[pair] = pair
    return partner_B


def shares(seed: int, epoch: int, ids_B: Ids, mixing: MixingSection) -> npt.NDArray[np.float64]:
    """Each image's own share, from Beta(alpha, alpha); 1 if it is not mixed. Stream "mix".

    Mixup's is folded to at least one half (ours): an image is mostly its own sample, which a
    method may then remember it for. Over both samples of a pair, the mixtures keep the published
    distribution; in one step, both samples have their mixture, where it could favour one twice.
    """
    u_B2 = draws.uniforms(seed, epoch, ids_B, "mix", 2)
    share_B = _beta_quantile(mixing.alpha, u_B2[:, 0])
    if mixing.name == "mixup":
        share_B = np.maximum(share_B, 1 - share_B)
    return np.where(u_B2[:, 1] < mixing.probability, share_B, 1.0)


def _beta_quantile(alpha: float, u_B: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where Beta(alpha, alpha) has the cumulative probabilities u_B."""
    if alpha == 1:
        return u_B
    from scipy.special import betaincinv  # noqa: PLC0415  (0.4 s of a start; few recipes need it)

    quantile_B: npt.NDArray[np.float64] = betaincinv(alpha, alpha, u_B)
    return quantile_B


def cut_boxes(
    seed: int, epoch: int, ids_B: Ids, share_B: npt.NDArray[np.float64], height: int, width: int
) -> Boxes:
    """Boxes of the other share of the area, around a uniform centre, cut off at the border.

    Yun et al. (ICCV 2019), equation 2. Stream "cut".
    """
    side_B = np.sqrt(1 - share_B)
    centre_B2 = draws.uniforms(seed, epoch, ids_B, "cut", 2) * (height, width)
    sides_B2 = np.stack([side_B * height, side_B * width], axis=1)
    return _clipped(np.floor(centre_B2), np.floor(sides_B2), height, width)


def cutout_boxes(
    seed: int, epoch: int, ids_B: Ids, erasing: ErasingSection, height: int, width: int, view: str
) -> Boxes:
    """Squares around a uniform centre, cut off at the border (DeVries and Taylor, 2017).

    Stream "erase".
    """
    u_B3 = draws.uniforms(seed, epoch, ids_B, f"{view}erase", 3)
    sides_B2 = np.where(u_B3[:, 2:] < erasing.probability, float(erasing.size), 0.0)
    centre_B2 = np.floor(u_B3[:, :2] * (height, width))
    return _clipped(centre_B2, np.repeat(sides_B2, 2, axis=1), height, width)


def erased_boxes(
    seed: int, epoch: int, ids_B: Ids, erasing: ErasingSection, height: int, width: int, view: str
) -> Boxes:
    """Boxes inside the image, as torchvision's RandomErasing distributes them. Stream "erase"."""
    u_BX = draws.uniforms(seed, epoch, ids_B, f"{view}erase", 1 + 4 * draws.TRIES)
    u_BT4 = u_BX[:, 1:].reshape(-1, draws.TRIES, 4)
    # Its ratio is of height by width, where that of the crop is of width by height.
    h_BT, w_BT = draws.drawn_sides(u_BT4, height, width, scale=erasing.scale, ratio=erasing.ratio)
    fits_BT = (h_BT < height) & (w_BT < width)
    y_B, x_B, h_B, w_B = draws.first_fit(u_BT4, h_BT, w_BT, fits_BT, height, width).T
    done_B = (u_BX[:, 0] < erasing.probability) & fits_BT.any(axis=1)
    boxes_B4 = np.stack([y_B, x_B, y_B + h_B, x_B + w_B], axis=1)
    return np.where(done_B[:, None], boxes_B4, 0).astype(np.int64)


def _clipped(
    centre_B2: npt.NDArray[np.float64], sides_B2: npt.NDArray[np.float64], height: int, width: int
) -> Boxes:
    first_B2 = centre_B2 - sides_B2 // 2
    corners_B4 = np.concatenate([first_B2, first_B2 + sides_B2], axis=1)
    boxes_B4: Boxes = np.clip(corners_B4, 0, [height, width, height, width]).astype(np.int64)
    return boxes_B4


def _areas(boxes_B4: Boxes) -> npt.NDArray[np.float64]:
    areas_B = (boxes_B4[:, 2] - boxes_B4[:, 0]) * (boxes_B4[:, 3] - boxes_B4[:, 1])
    return areas_B.astype(np.float64)


def _inside(boxes_B4: Boxes, images_BCHW: Tensor) -> Tensor:
    """bool (B, 1, H, W) on the images' device."""
    device = images_BCHW.device
    box_4B11 = to_device(boxes_B4, device).t()[:, :, None, None]
    y_H1 = torch.arange(images_BCHW.shape[2], device=device)[:, None]
    x_W = torch.arange(images_BCHW.shape[3], device=device)
    in_y_BH1 = (y_H1 >= box_4B11[0]) & (y_H1 < box_4B11[2])
    in_x_B1W = (x_W >= box_4B11[1]) & (x_W < box_4B11[3])
    return (in_y_BH1 & in_x_B1W)[:, None]


def _mixed(images_BCHW: Tensor, mix: Mix, boxes_B4: Boxes | None) -> Tensor:
    other_BCHW = images_BCHW[mix.partner_B]
    if boxes_B4 is not None:
        return torch.where(_inside(boxes_B4, images_BCHW), other_BCHW, images_BCHW)
    return torch.lerp(other_BCHW, images_BCHW, mix.share_B[:, None, None, None])
