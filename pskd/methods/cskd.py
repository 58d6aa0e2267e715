"""CS-KD: class-wise self-knowledge distillation (Yun et al., CVPR 2020).

    loss = CE(z, y) + lambda * T^2 * KL(softmax(z'/T) || softmax(z/T))

z' is the output for another image of the same class, without gradient, by the same network in
training mode: each half is normalised by its own BatchNorm statistics, and both update the running
ones. The peer is drawn among all samples of the class and may be the sample itself; a class of one
sample is its own peer. For a mixed image the peers are mixed alike.

Letters: B samples, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pskd.data.batch import Batch
from pskd.methods.interface import Forward, Method, Network, Output, Past
from pskd.methods.labels import cross_entropy, labels_and_shares
from pskd.methods.sections import CSKDSection


def kd_loss(logits_BC: Tensor, peer_logits_BC: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(z'/T) || softmax(z/T)), mean over the batch, in nats: a scalar."""
    return _kd_per_sample(logits_BC, peer_logits_BC, temperature).mean()


def _kd_per_sample(logits_BC: Tensor, peer_logits_BC: Tensor, temperature: float) -> Tensor:
    log_BC = F.log_softmax(logits_BC / temperature, dim=1)
    peer_BC = F.log_softmax(peer_logits_BC.detach() / temperature, dim=1)
    kl_B = F.kl_div(log_BC, peer_BC, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * kl_B


class CSKD(Method):
    """The loss above."""

    needs_peers = True

    def __init__(self, section: CSKDSection, network: Network | None = None) -> None:
        self._temperature, self._weight = section.temperature, section.weight

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """Of each sample."""
        assert batch.peer_BCHW is not None, "CS-KD needs peers"
        logits_BC = forward(batch.images_BCHW).float()
        with torch.no_grad():
            peer_BC = forward(batch.peer_BCHW).float()
        hard_B = cross_entropy(logits_BC, *labels_and_shares(batch))
        return Output(hard_B + self._weight * _kd_per_sample(logits_BC, peer_BC, self._temperature))
