"""Colour jitter, PCA lighting and normalisation of the public PS-KD code, as one affine map.

Every step of it is affine in an image's pixels x and its mean colour m (contrast moves towards the
mean grey, which is linear in m; nothing is clipped). So the whole is x -> M x + C m + t, with
numbers of the sample alone: exact, and one pass over the pixels. The published code applies
brightness, contrast and saturation in random order; without clipping they commute: we need none.

Letters: B samples, P pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager

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
    [-0.4, 0.4]; then lighting; then ImageNet's normalisation.
    """
    u_3B11 = draws.uniforms(seed, epoch, ids_B, f"{view}jitter", 3).T[:, :, None, None]
    brightness, contrast, saturation = _STRENGTH * (2 * u_3B11 - 1)
    grey_33 = np.tile(_GREY, (3, 1))  # every channel becomes the grey value
    saturated_B33 = (1 - saturation) * np.eye(3) + saturation * grey_33
    m_B33 = (1 - brightness) * (1 - contrast) * saturated_B33
    c_B33 = (1 - brightness) * contrast * grey_33
    light_B3 = _LIGHTING * draws.normals(seed, epoch, ids_B, f"{view}lighting", 3)
    t_B3 = (light_B3 * _EIGENVALUES) @ _EIGENVECTORS.T - np.array(MEAN)
    whole_B37 = np.concatenate([m_B33, c_B33, t_B3[:, :, None]], axis=2)
    normalised_B37: Maps = (whole_B37 / np.array(STD)[:, None]).astype(np.float32)
    return normalised_B37


def apply(maps_B37: Tensor, images_BCHW: Tensor) -> Tensor:
    """The maps on images in [0, 1]: float32 (B, 3, H, W), contiguous. Exact, also with tf32."""
    pixels_B3P = images_BCHW.flatten(2)
    mean_B31 = pixels_B3P.mean(dim=2, keepdim=True)
    with _without_tf32():
        shift_B31 = torch.baddbmm(maps_B37[:, :, 6:], maps_B37[:, :, 3:6], mean_B31)
        return torch.baddbmm(shift_B31, maps_B37[:, :, :3], pixels_B3P).view_as(images_BCHW)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Inside, a GPU multiplies with all bits of float32, whatever the network may use."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    try:
        if allowed:
            matmul.allow_tf32 = False
        yield
    finally:
        if allowed:
            matmul.allow_tf32 = True
