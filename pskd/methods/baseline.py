"""Baseline: cross-entropy with the one-hot label."""

from torch.nn import functional as F

from pskd.data.batch import Batch
from pskd.methods.interface import Forward, Output, Past
from pskd.methods.sections import BaselineSection


class Baseline:
    """-log softmax(z)_y."""

    needs_store = False

    def __init__(self, section: BaselineSection) -> None:
        del section  # it has no parameter

    def begin_epoch(self, epoch: int, epochs: int) -> dict[str, float]:
        """The loss is the same in every epoch."""
        return {}

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """Cross-entropy of each sample."""
        logits_BC = forward(batch.images_BCHW)
        return Output(F.cross_entropy(logits_BC.float(), batch.labels_B, reduction="none"))
