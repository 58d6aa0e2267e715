"""TF-KD: teacher-free knowledge distillation (Yuan et al., CVPR 2020).

    self: (1 - a) CE(z, y) + a T^2 m KL(softmax(z_teacher / T) || softmax(z / T))
    reg:  (1 - a) CE(z, y) + a m KL(softmax(u / T) || softmax(z))

self: the teacher is a network of the same architecture, trained before. reg: u is made by hand,
0.99 for the label, the rest shared by the others; as published, the softmax is of these
*probabilities* over T, the student's logits are not divided by T, and there is no T^2. The
published code averages the KL over batch and classes ("mean"), which is K times less than the
textbook's "batchmean"; its multipliers are tuned to that. Of a mixed image, u mixes both labels.

Letters: B samples, C classes.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pskd.data.batch import Batch
from pskd.errors import PskdError
from pskd.methods.interface import Forward, Method, Network, Output, Past
from pskd.methods.labels import add_at_labels, cross_entropy, labels_and_shares, one_label
from pskd.methods.sections import TFKDRegSection, TFKDSelfSection

Reduction = Literal["mean", "batchmean"]

_CORRECT = 0.99  # of the label, in the teacher made by hand


def reg_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    alpha: float,
    temperature: float,
    multiplier: float,
    kl_reduction: Reduction = "mean",
) -> Tensor:
    """Mean over the batch, in nats: a scalar."""
    labels_B1, shares_B1 = one_label(labels_B)
    kl_B = _reg_kl(logits_BC, labels_B1, shares_B1, temperature, kl_reduction)
    hard_B = cross_entropy(logits_BC, labels_B1, shares_B1)
    return _total(hard_B, kl_B, alpha, multiplier).mean()


def self_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    teacher_logits_BC: Tensor,
    alpha: float,
    temperature: float,
    multiplier: float,
    kl_reduction: Reduction = "mean",
) -> Tensor:
    """Mean over the batch, in nats: a scalar."""
    kl_B = _self_kl(logits_BC, teacher_logits_BC, temperature, kl_reduction)
    hard_B = cross_entropy(logits_BC, *one_label(labels_B))
    return _total(hard_B, kl_B, alpha, multiplier).mean()


def _total(hard_B: Tensor, kl_B: Tensor, alpha: float, multiplier: float) -> Tensor:
    return (1 - alpha) * hard_B + alpha * multiplier * kl_B


def _reg_kl(
    logits_BC: Tensor,
    labels_BK: Tensor,
    shares_BK: Tensor,
    temperature: float,
    kl_reduction: Reduction,
) -> Tensor:
    """KL of each sample against the teacher made by hand: (B,)."""
    classes = logits_BC.shape[1]
    other = (1 - _CORRECT) / (classes - 1)
    made_BC = torch.full_like(logits_BC, other)
    add_at_labels(made_BC, labels_BK, (_CORRECT - other) * shares_BK.to(made_BC.dtype))
    teacher_BC = F.log_softmax(made_BC / temperature, dim=1)
    return _kl(F.log_softmax(logits_BC, dim=1), teacher_BC, kl_reduction)


def _self_kl(
    logits_BC: Tensor, teacher_logits_BC: Tensor, temperature: float, kl_reduction: Reduction
) -> Tensor:
    """T^2 KL of each sample against the teacher's softened prediction: (B,)."""
    log_BC = F.log_softmax(logits_BC / temperature, dim=1)
    teacher_BC = F.log_softmax(teacher_logits_BC / temperature, dim=1)
    return temperature**2 * _kl(log_BC, teacher_BC, kl_reduction)


def _kl(log_BC: Tensor, teacher_log_BC: Tensor, kl_reduction: Reduction) -> Tensor:
    kl_B = F.kl_div(log_BC, teacher_log_BC, reduction="none", log_target=True).sum(dim=1)
    return kl_B / log_BC.shape[1] if kl_reduction == "mean" else kl_B


class TFKDReg(Method):
    """The second loss above."""

    def __init__(self, section: TFKDRegSection, network: Network | None = None) -> None:
        self._section = section

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """Of each sample."""
        section = self._section
        logits_BC = forward(batch.images_BCHW).float()
        labels_BK, shares_BK = labels_and_shares(batch)
        kl_B = _reg_kl(logits_BC, labels_BK, shares_BK, section.temperature, section.kl_reduction)
        hard_B = cross_entropy(logits_BC, labels_BK, shares_BK)
        return Output(_total(hard_B, kl_B, section.alpha, section.multiplier))


class TFKDSelf(Method):
    """The first loss above. The teacher runs in evaluation mode, on the student's image."""

    def __init__(self, section: TFKDSelfSection, network: Network) -> None:
        self._section = section
        self._network = network
        self._teacher = network.trained(section.teacher)

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """Of each sample."""
        section = self._section
        logits_BC = forward(batch.images_BCHW).float()
        teacher_BC = self._network.infer(self._teacher, batch.images_BCHW)
        kl_B = _self_kl(logits_BC, teacher_BC, section.temperature, section.kl_reduction)
        hard_B = cross_entropy(logits_BC, *labels_and_shares(batch))
        return Output(_total(hard_B, kl_B, section.alpha, section.multiplier))

    def state_dict(self) -> dict[str, Any]:
        """Which teacher it is."""
        return {"teacher_sha256": self._network.sha256(self._teacher)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the teacher with the one that the run began with.

        Raises:
            PskdError: the file holds other weights now.
        """
        if state["teacher_sha256"] != self._network.sha256(self._teacher):
            raise PskdError(
                f"method.teacher {self._section.teacher} holds other weights than when the run "
                "began. Bring them back, or start a new run."
            )
