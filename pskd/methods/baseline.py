"""Baseline: cross-entropy with the one-hot label (of a mixed image, with both in their shares)."""

from pskd.data.batch import Batch
from pskd.methods.interface import Forward, Method, Output, Past
from pskd.methods.labels import cross_entropy, labels_and_shares


class Baseline(Method):
    """-log softmax(z)_y."""

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """Cross-entropy of each sample."""
        logits_BC = forward(batch.images_BCHW).float()
        return Output(cross_entropy(logits_BC, *labels_and_shares(batch)))
