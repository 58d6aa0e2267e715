"""The hard part of a target: one label a sample, or two with their shares if images were mixed.

Letters: B samples, C classes, K labels a sample (1 or 2).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pskd.data.batch import Batch


def one_label(labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """labels_B1 and shares_B1 float32, of images that are not mixed."""
    labels_B1 = labels_B[:, None]
    return labels_B1, torch.ones_like(labels_B1, dtype=torch.float32)


def labels_and_shares(batch: Batch) -> tuple[Tensor, Tensor]:
    """labels_BK int64 and shares_BK float32, which sum to 1."""
    if batch.mix is None:
        return one_label(batch.labels_B)
    other_B = batch.labels_B[batch.mix.partner_B]
    share_B = batch.mix.share_B
    return torch.stack((batch.labels_B, other_B), 1), torch.stack((share_B, 1 - share_B), 1)


def cross_entropy(logits_BC: Tensor, labels_BK: Tensor, shares_BK: Tensor) -> Tensor:
    """-sum_k share_k log softmax(z)_label_k of each sample, in nats: (B,)."""
    if labels_BK.shape[1] == 1:
        return F.cross_entropy(logits_BC, labels_BK[:, 0], reduction="none")
    return -(F.log_softmax(logits_BC, dim=1).gather(1, labels_BK) * shares_BK).sum(dim=1)


def add_at_labels(sums_BC: Tensor, labels_BK: Tensor, parts_BK: Tensor) -> None:
    """Add part k of each sample to the class of its label k, in place.

    One label after the other: where both labels of a sample are the same class, a single call on a
    GPU would add the two parts in any order, and the last bit with it.
    """
    for k in range(labels_BK.shape[1]):
        sums_BC.scatter_add_(1, labels_BK[:, k : k + 1], parts_BK[:, k : k + 1])
