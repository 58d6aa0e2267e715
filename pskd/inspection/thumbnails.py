"""Small pictures of training samples."""

import io
from pathlib import Path

from PIL import Image

from pskd.data.catalog import Catalog
from pskd.loading import AnyCatalog

SIDE = 112  # pixels, of the longer side of a photo: a multiple of 8 and of 28


def name_of(catalog: AnyCatalog, sample: int) -> str:
    """The path of an encoded image; an array's has none."""
    return "" if isinstance(catalog, Catalog) else catalog.train.path(sample)


def picture(catalog: AnyCatalog, sample: int) -> bytes | None:
    """A PNG of an array's image, a JPEG of an encoded one; None if it is gone or does not decode.

    The image as it is, not augmented.
    """
    if isinstance(catalog, Catalog):
        pixels_HWC = catalog.train.images_NHWC[sample]
        grey = pixels_HWC.shape[2] == 1
        return _encoded(Image.fromarray(pixels_HWC[..., 0] if grey else pixels_HWC), "PNG")
    try:
        with Image.open(Path(catalog.train.path(sample))) as image:
            image.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded at an eighth of its size, say
            image.thumbnail((SIDE, SIDE))
            return _encoded(image.convert("RGB"), "JPEG")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _encoded(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()
