"""Small pictures of training samples, for a page that needs no other file."""

import base64
import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pskd.data.catalog import Catalog
from pskd.loading import AnyCatalog

_SIDE = 96  # pixels, of the longer side of a decoded photo


def name_of(catalog: AnyCatalog, sample: int) -> str:
    """The path of an encoded image; of an array there is none."""
    return "" if isinstance(catalog, Catalog) else catalog.train.path(sample)


def data_uri(catalog: AnyCatalog, sample: int) -> str | None:
    """The image as `data:image/...;base64,...`; None if its file is gone or does not decode."""
    if isinstance(catalog, Catalog):
        pixels_HWC = catalog.train.images_NHWC[sample]
        grey = pixels_HWC.shape[2] == 1
        return _encoded(Image.fromarray(pixels_HWC[..., 0] if grey else pixels_HWC), "PNG")
    try:
        with Image.open(Path(catalog.train.path(sample))) as image:
            image.draft("RGB", (_SIDE, _SIDE))
            image.thumbnail((_SIDE, _SIDE))
            return _encoded(image.convert("RGB"), "JPEG")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


def _encoded(image: Image.Image, kind: str) -> str:
    content = io.BytesIO()
    image.save(content, kind)
    text = base64.b64encode(content.getbuffer()).decode()
    return f"data:image/{kind.lower()};base64,{text}"
