"""Ways of mixing and erasing that several files try, and the digits to try them on."""

from dataclasses import replace

import numpy as np

from pskd.data import digits
from pskd.data.sections import ErasingSection, MixingSection

SEED = 11
MIXUP, CUTMIX = MixingSection("mixup", 0.4), MixingSection("cutmix", 1.0, 0.9)
CUTOUT, RANDOM_ERASING = (
    ErasingSection("cutout", size=4),
    ErasingSection("random-erasing", probability=0.7),
)
NO_MIXING, NO_ERASING = MixingSection(), ErasingSection()


def digits_of(n):
    catalog = digits.load(None, False)
    return replace(catalog, train=catalog.train.take(np.arange(n)))
