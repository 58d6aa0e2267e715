"""Views of a sample: its own image of an epoch, and the one it gives as somebody's peer.

Letters: B samples, N samples of the data set, K classes.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pskd import draws
from pskd.order import Ids

PEER = "peer/"  # begins the names of the streams of draws of the second view

PeerChoice = Callable[[int, Ids], Ids]  # (epoch, ids_B) -> ids_B of the peers


class SameClass:
    """Draws a peer for each sample: a function of (seed, epoch, id). Stream "peer-choice"."""

    def __init__(self, seed: int, labels_N: npt.NDArray[np.int64]) -> None:
        self._seed = seed
        self._labels_N = labels_N
        self._by_class_N = np.argsort(labels_N, kind="stable")
        self._count_K = np.bincount(labels_N)
        self._first_K = np.cumsum(self._count_K) - self._count_K

    def __call__(self, epoch: int, ids_B: Ids) -> Ids:
        """Ids of the peers."""
        u_B = draws.uniforms(self._seed, epoch, ids_B, "peer-choice", 1)[:, 0]
        label_B = self._labels_N[ids_B]
        place_B = (u_B * self._count_K[label_B]).astype(np.int64)
        peers_B: Ids = self._by_class_N[self._first_K[label_B] + place_B]
        return peers_B
