"""Label smoothing (Szegedy et al., 2016): the label gives some of its mass to other classes.

Two conventions exist for the rest: "k" spreads eps evenly over all K classes, the label's included
(torch); "k-1" over the K - 1 others (TF-KD's code).

Letters: B samples, C classes.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from pskd.data.batch import Batch
from pskd.methods.interface import Forward, Method, Network, Output, Past
from pskd.methods.labels import labels_and_shares, one_label
from pskd.methods.sections import LabelSmoothingSection

Convention = Literal["k", "k-1"]


def loss(logits_BC: Tensor, labels_B: Tensor, eps: float, convention: Convention = "k") -> Tensor:
    """Mean over the batch, in nats: a scalar."""
    return _loss_per_sample(logits_BC, *one_label(labels_B), eps, convention).mean()


def _loss_per_sample(
    logits_BC: Tensor, labels_BK: Tensor, shares_BK: Tensor, eps: float, convention: Convention
) -> Tensor:
    log_BC = F.log_softmax(logits_BC, dim=1)
    hard_B = -(log_BC.gather(1, labels_BK) * shares_BK).sum(dim=1)
    all_B = -log_BC.sum(dim=1)
    classes = logits_BC.shape[1]
    if convention == "k":
        return (1 - eps) * hard_B + eps / classes * all_B
    return (1 - eps) * hard_B + eps / (classes - 1) * (all_B - hard_B)


class LabelSmoothing(Method):
    """The loss above."""

    def __init__(self, section: LabelSmoothingSection, network: Network | None = None) -> None:
        self._eps, self._convention = section.eps, section.convention

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """Of each sample."""
        logits_BC = forward(batch.images_BCHW).float()
        labels_BK, shares_BK = labels_and_shares(batch)
        return Output(
            _loss_per_sample(logits_BC, labels_BK, shares_BK, self._eps, self._convention)
        )
