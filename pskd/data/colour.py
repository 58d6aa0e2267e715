"""Colour jitter, PCA lighting and normalisation of the public PS-KD code, as one affine map.

Every step of it is affine in an image's pixels x and its mean colour m (contrast moves towards the
mean grey, which is linear in m; nothing is clipped). So the whole is x -> M x + C m + t, with
numbers of the sample alone: exact, and one pass over the pixels.

Letters: B samples, P pixels.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pskd import draws
from pskd.order import Ids

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], and their deviation
STD = (0.229, 0.224, 0.225)

_STRENGTH = 0.4  # of brightness, contrast and saturation
_LIGHTING = 0.1
_GREY = np.array([0.299, 0.587, 0.114])
# Principal components of ImageNet's colours (Krizhevsky et al., 2012, section 4.1).
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)

Maps = npt.NDArray[np.float32]


def maps(seed: int, epoch: int, ids_B: Ids, view: str = "") -> Maps:
    """M, C and t of each sample, side by side: float32 (B, 3, 7). Streams "jitter", "lighting".

    Brightness, contrast and saturation, each by linear interpolation with a weight from
    [-0.4, 0.4], in random order; then lighting; then ImageNet's normalisation.
    """
    count = len(ids_B)
    u_B6 = draws.uniforms(seed, epoch, ids_B, f"{view}jitter", 6)
    weight_B3 = _STRENGTH * (2 * u_B6[:, :3] - 1)
    order_B3 = np.argsort(u_B6[:, 3:], axis=1, kind="stable")
    m_B33, c_B33 = np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 3, 3))
    grey_33 = np.tile(_GREY, (3, 1))  # every channel becomes the grey value
    for place in range(3):
        step_B = order_B3[:, place][:, None, None]
        a_B11 = np.take_along_axis(weight_B3, order_B3[:, place : place + 1], axis=1)[:, :, None]
        mixed_B33 = (1 - a_B11) * np.eye(3) + a_B11 * grey_33
        contrast_B33 = (1 - a_B11) * c_B33 + a_B11 * (grey_33 @ (m_B33 + c_B33))
        c_B33 = np.select(
            [step_B == 0, step_B == 1], [(1 - a_B11) * c_B33, contrast_B33], mixed_B33 @ c_B33
        )
        m_B33 = np.where(step_B == 2, mixed_B33 @ m_B33, (1 - a_B11) * m_B33)
    light_B3 = _LIGHTING * draws.normals(seed, epoch, ids_B, f"{view}lighting", 3)
    t_B3 = (light_B3 * _EIGENVALUES) @ _EIGENVECTORS.T - np.array(MEAN)
    whole_B37 = np.concatenate([m_B33, c_B33, t_B3[:, :, None]], axis=2)
    normalised_B37: Maps = (whole_B37 / np.array(STD)[:, None]).astype(np.float32)
    return normalised_B37


def apply(maps_B37: Tensor, images_BCHW: Tensor) -> Tensor:
    """The maps on images in [0, 1]: float32 (B, 3, H, W), contiguous."""
    pixels_B3P = images_BCHW.flatten(2)
    mean_B31 = pixels_B3P.mean(dim=2, keepdim=True)
    shift_B31 = torch.baddbmm(maps_B37[:, :, 6:], maps_B37[:, :, 3:6], mean_B31)
    return torch.baddbmm(shift_B31, maps_B37[:, :, :3], pixels_B3P).view_as(images_BCHW)
