"""A store of one rank, and rows to remember. Letters: N samples, C classes."""

import numpy as np
import torch

from pskd.store.peers import Alone
from pskd.store.sections import StoreSection
from pskd.store.store import Store

N, C = 64, 6


def new_store(directory, start=0, n=N, classes=C, device="cpu", **options):
    return Store(
        directory,
        n=n,
        classes=classes,
        identity="data",
        run="run",
        start=start,
        peers=Alone(),
        options=StoreSection(**({"encoding": "float32"} | options)),
        device=torch.device(device),
    )


def probabilities(seed, n=N, classes=C):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(4 * torch.randn(n, classes, generator=generator), dim=1)


def filled(directory, epochs=1, **options):
    """A store in which each sample has a row, at the beginning of epoch `epochs`; and the rows."""
    store = new_store(directory, **options)
    for epoch in range(epochs):
        store.begin_epoch(epoch)
        store.remember(np.arange(N), probabilities(epoch))
    store.begin_epoch(epochs)
    return store, probabilities(epochs - 1)
