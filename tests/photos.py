"""Folders of JPEGs that resemble ImageNet's, made from the photos that scikit-learn ships.

    from tests.photos import make_folder
    make_folder(Path("/tmp/photos"), classes=10, per_class=100)                     # 60 KB each
    make_folder(Path("/tmp/small"), classes=3, per_class=4, median_side=48)         # for tests

scikit-image's photos are used as well where it is installed; it is no requirement, as two photos
do. What matters to a decoder is size, shape, detail and quality, and those are drawn for each file;
the content depends on the class (a region of a photo and a tint), so a network can learn it.
"""

import io
import os
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

_PORTRAIT = 0.25  # of all images
_SPREAD = 0.18  # standard deviation of the logarithm of the longer side
_ASPECTS = (4 / 3, 4 / 3, 3 / 2, 1.0, 16 / 9)
_GRAIN = 4.0  # standard deviation of the noise: enlarged crops are smoother than photos


def make_folder(
    directory: Path,
    *,
    classes: int,
    per_class: int,
    seed: int = 0,
    median_side: int = 500,
    quality: tuple[int, int] = (90, 95),
) -> list[Path]:
    """Write DIR/class000/image00000.JPEG and so on; returns the files, sorted.

    median_side: of the longer side, in pixels. quality: of the JPEGs, from and to.
    """
    files = []
    for label in range(classes):
        folder = directory / f"class{label:03}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            rng = np.random.default_rng((seed, label, number))
            path = folder / f"image{number:05}.JPEG"
            image = _photo(rng, label, median_side)
            image.save(path, "JPEG", quality=int(rng.integers(quality[0], quality[1] + 1)))
            files.append(path)
    return files


def make_nasty(directory: Path) -> dict[str, Path]:
    """Write files that need care; returns them by what they are. `BAD` names those of no use."""
    directory.mkdir(parents=True, exist_ok=True)
    image = _photo(np.random.default_rng(0), 0, 200)
    whole = _encoded(image, "JPEG", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be shown turned by 90 degrees
    contents = {
        "half": whole[: len(whole) // 2],
        "without its last 200 bytes": whole[:-200],
        "empty": b"",
        "garbage": bytes(range(256)) * 8,
        "png named jpeg": _encoded(image, "PNG"),
        "rgba png": _encoded(image.convert("RGBA"), "PNG"),
        "cmyk": _encoded(image.convert("CMYK"), "JPEG"),
        "grey": _encoded(image.convert("L"), "JPEG"),
        "progressive": _encoded(image, "JPEG", progressive=True),
        "exif rotated": _encoded(image, "JPEG", exif=exif),
        "huge": _encoded(Image.new("RGB", (6000, 5000), (40, 90, 160)), "JPEG", quality=50),
        "1x1": _encoded(image.resize((1, 1)), "JPEG"),
    }
    files = {}
    for what, content in contents.items():
        suffix = ".png" if what == "rgba png" else ".JPEG"
        files[what] = directory / f"{what.replace(' ', '-')}{suffix}"
        files[what].write_bytes(content)
    for what, name in ODD_NAMES.items():
        files[what] = directory / os.fsdecode(name)
        files[what].write_bytes(whole)
    return files


BAD_HEADERS = ("empty", "garbage")
BAD_BODIES = ("half", "without its last 200 bytes")
ODD_NAMES = {
    "blank": b"a b.jpg",
    "newline": b"a\nb.jpg",
    "hash": b"#a#b.jpg",
    "quotes": b"a'b\"c.jpg",
    "not utf-8": b"a\xff\xfeb.jpg",
    "long": b"a" * 246 + b".jpg",
    "upper case": b"A.JpEg",
}


def _photo(rng: np.random.Generator, label: int, median_side: int) -> Image.Image:
    """A crop near the place of its class, enlarged or reduced, tinted and with grain."""
    side = max(8, round(median_side * np.exp(_SPREAD * rng.standard_normal())))
    other = max(8, round(side / _ASPECTS[rng.integers(len(_ASPECTS))]))
    width, height = (other, side) if rng.random() < _PORTRAIT else (side, other)
    photo = _photos()[label % len(_photos())]
    place = np.random.default_rng((label, 1)).random(2)  # of the class, whatever the seed
    zoom = rng.uniform(0.5, 0.9) * min(photo.width / width, photo.height / height)
    crop = np.array([width, height]) * zoom
    room = np.array([photo.width, photo.height]) - crop
    corner = np.clip(place * room + rng.normal(0, 0.05, 2) * crop, 0, room)
    box = (*corner.tolist(), *(corner + crop).tolist())
    enlarged = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels_HWC = np.asarray(enlarged, np.float32) * _tint(label)
    pixels_HWC += rng.normal(0, _GRAIN, (height, width, 1))
    return Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8))


def _tint(label: int) -> np.ndarray:
    """Factors of red, green and blue: hues a golden angle apart."""
    hue = label * 0.618 * 2 * np.pi
    return (1 + 0.25 * np.cos(hue - np.array([0, 2, 4]) * np.pi / 3)).astype(np.float32)


@cache
def _photos() -> list[Image.Image]:
    photos = [Image.fromarray(array) for array in load_sample_images().images]
    try:
        from skimage import data
    except ImportError:
        return photos
    return [*photos, *(Image.fromarray(f()) for f in (data.astronaut, data.coffee, data.chelsea))]


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
