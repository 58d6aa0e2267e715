"""Folders of images read by DALI, for its tests: batches, hashes, and what PIL makes of a file."""

import hashlib

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from pskd import draws
from pskd.data import colour, imagefolder
from pskd.data.dali import DaliData
from pskd.data.interface import validation_batches
from pskd.order import Plan, Walk
from tests.photos import BAD_BODIES, BAD_HEADERS
from tests.reading import changed, plain_options

CPU = torch.device("cpu")
SEED = 7
PLAIN = plain_options(image_size=32, validation_resize=36)
WHOLE = changed(PLAIN, crop_scale=(1.0, 1.0))  # about all of an image: its damage as well
INTERPOLATIONS = {
    "linear": InterpolationMode.BILINEAR,
    "cubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
}


def load(root, **options):
    chosen = {"index_path": None, "val_index_path": None, "held_out": 0, "limit": 0} | options
    return imagefolder.load(root, **chosen)


def batches(catalog, options=PLAIN, *, plan=None, rank=0, epochs=2, start=(0, 0), peer=None):
    """(micro, Batch) of one rank from a position to the end of the last epoch."""
    plan = plan or Plan(len(catalog.train), 24)
    plan.check()
    walk = Walk(plan, SEED, epochs, rank)
    data = DaliData(catalog, CPU, SEED, options, peer)
    data.begin(walk, *start)
    count = 0
    for micro in walk.start(*start):
        yield micro, data.train_batch(micro)
        count += 1
    data.close()
    first, step = start
    steps = max(0, plan.steps * (epochs - first) - step)
    assert count == steps * plan.accumulation, "whoever checks each batch has had them all"


def digest(image_CHW):
    return hashlib.sha256(image_CHW.contiguous().numpy().tobytes()).hexdigest()


def hashes(catalog, options=PLAIN, *, plan=None, **how):
    """(epoch, id) -> hash of its image, over all ranks of a plan; each exactly once."""
    plan = plan or Plan(len(catalog.train), 24)
    found = {}
    for rank in range(plan.world):
        for micro, batch in batches(catalog, options, plan=plan, rank=rank, **how):
            assert batch.ids_B.tolist() == micro.ids_B.tolist()
            for sample, image in zip(batch.ids_B.tolist(), batch.images_BCHW, strict=True):
                assert (micro.epoch, sample) not in found
                found[micro.epoch, sample] = digest(image)
    return found


def picture(path):
    """As PIL decodes it; stored pixels, whatever EXIF says."""
    with Image.open(path) as image:
        return image.convert("RGB")


def levels(images_BCHW):
    """Normalised images as float64 (B, H, W, 3) in 0..255."""
    mean, std = (torch.tensor(t, dtype=torch.float64) for t in (colour.MEAN, colour.STD))
    return ((images_BCHW.permute(0, 2, 3, 1).double() * std + mean) * 255).numpy()


def trained_by_pil(split, epoch, ids, options=PLAIN, size=None, view=""):
    """The window that was drawn, resized and flipped by PIL: (B, H, W, 3) in 0..255."""
    size = size or options.section.image_size
    windows = draws.windows(
        SEED,
        epoch,
        ids,
        *split.sizes(ids),
        scale=options.section.crop_scale,
        ratio=options.section.crop_ratio,
        view=view,
    )
    flips = draws.flips(SEED, epoch, ids, view) & options.section.flip
    images = []
    for sample, window, flip in zip(ids.tolist(), windows.tolist(), flips, strict=True):
        image = F.resized_crop(
            picture(split.path(sample)),
            *window,
            [size, size],
            INTERPOLATIONS[options.section.interpolation],
        )
        images.append(np.asarray(F.hflip(image) if flip else image, np.float64))
    return np.stack(images)


def validated_by_pil(split, options=PLAIN):
    """torchvision's Resize and CenterCrop: (N, H, W, 3) in 0..255."""
    images = []
    for sample in range(len(split)):
        image = F.resize(
            picture(split.path(sample)),
            options.section.validation_resize,
            INTERPOLATIONS[options.section.interpolation],
        )
        images.append(np.asarray(F.center_crop(image, options.section.image_size), np.float64))
    return np.stack(images)


def validated(catalog, options=PLAIN, *, rank=0, world=1, batch_size=64):
    """All images and labels of a rank's share."""
    data = DaliData(catalog, CPU, SEED, options)
    parts = [
        (images.clone(), labels.clone())
        for images, labels in validation_batches(data, rank, world, batch_size)
    ]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def damage(path, kind):
    """Make an image of no use, after it was indexed."""
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "without its last 200 bytes":
        path.write_bytes(content[:-200])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(bytes(range(256)) * 8)
    elif kind == "header only":
        path.write_bytes(content[:100])
    elif kind == "smaller":
        picture(path).resize((9, 7)).save(path, "JPEG")
    else:
        raise ValueError(kind)


UNDECODABLE = (*BAD_BODIES, *BAD_HEADERS, "header only", "smaller")
GONE = ("missing", "a folder")
DAMAGES = (*UNDECODABLE, *GONE)


def place_of(catalog, plan, sample, epoch=0):
    """(step, row) of a sample in an epoch of one rank."""
    for micro in Walk(plan, SEED, epoch + 1, 0).start(epoch, 0):
        if sample in micro.ids_B:
            return micro.step, micro.ids_B.tolist().index(sample)
    raise AssertionError(sample)


def sample_at(plan, epoch, step, row=0):
    """The id that one rank trains there."""
    return int(next(Walk(plan, SEED, epoch + 1, 0).start(epoch, step)).ids_B[row])


def assert_near(found, wanted, inside=2):
    """Equal but for rounding; farther off only on the border, where PIL cuts its filter.

    DALI repeats the outermost pixels instead. In 0..255, as seen: mean 0.15 to 0.19, inside at most
    1 and on the border 18. Of cubic and lanczos PIL clips what overshoots between its two passes:
    inside at most 8 and 16.
    """
    difference = np.abs(found - wanted)
    inner = difference[:, 1:-1, 1:-1]
    print(  # noqa: T201  (the figures, with -s)
        f"mean {difference.mean():.3f}, inside at most {inner.max():.1f}, "
        f"on the border {difference.max():.1f}"
    )
    assert difference.mean(axis=(1, 2, 3)).max() < 0.5  # of the worst image
    assert difference.mean() < 0.25
    assert inner.max() < inside
    assert difference.max() < 24
