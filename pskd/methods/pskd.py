"""PS-KD: progressive self-knowledge distillation (Kim et al., ICCV 2021).

    t_i = (1 - alpha_e) * onehot(y_i) + alpha_e * p_i^(e-1)
    alpha_e = alpha_T * (e + 1) / E,  e = 0 .. E-1
    loss_i = -sum_k t_ik * log softmax(z_i)_k

p_i^(e-1) is the softmax of the training forward pass in which sample i was last trained, before
that step's update. In epoch 0, and for a sample that was never trained, it is the one-hot label.
No temperature, no further cross-entropy term.

Variants, all off by default. schedule: alpha constant at alpha_T, or along half a cosine.
averaging b: what is remembered is b * older row + (1 - b) * softmax (temporal ensembling, Laine
and Aila, 2017). teacher "model": p_i is the prediction of last epoch's final model, frozen in
evaluation mode, for the student's own image; nothing is stored.

Mixed images (our rule; the paper does not say it): the target is mixed as the labels are,
s t_i + (1 - s) t_j with both samples' own past predictions. The prediction for the mixed image is
remembered for sample i if at least half of the image is i's; else i keeps its older row.

Letters: B samples, C classes, K labels a sample (2 if images were mixed).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pskd.data.batch import Batch
from pskd.methods.interface import Forward, Method, Network, Output, Past
from pskd.methods.labels import add_at_labels, cross_entropy, labels_and_shares
from pskd.methods.sections import PSKDSection


def alpha_at(epoch: int, epochs: int, alpha_T: float, schedule: str = "linear") -> float:
    """Weight of the past prediction in 0-based `epoch`; the last epoch has exactly alpha_T."""
    progress = (epoch + 1) / epochs
    match schedule:
        case "constant":
            return alpha_T
        case "cosine":
            return alpha_T * ((1 - math.cos(math.pi * progress)) / 2)
        case _:
            return alpha_T * progress


def soft_targets(labels_B: Tensor, past_BC: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) * onehot(labels) + alpha * past: same shape and dtype as `past_BC`."""
    targets_BC = past_BC * alpha
    hard_B1 = torch.full_like(labels_B, 1, dtype=past_BC.dtype)[:, None] * (1 - alpha)
    return targets_BC.scatter_add(1, labels_B[:, None], hard_B1)


def soft_cross_entropy(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Mean over the batch of -sum_k t_k log softmax(z)_k, in nats: a scalar."""
    return soft_cross_entropy_per_sample(logits_BC, targets_BC).mean()


def soft_cross_entropy_per_sample(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """-sum_k t_k log softmax(z)_k of each sample, in nats: (B,)."""
    return -(targets_BC * F.log_softmax(logits_BC, dim=1)).sum(dim=1)


def refined_cross_entropy(
    logits_BC: Tensor, labels_B: Tensor, past_BC: Tensor, present_B: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """PS-KD's loss of each sample, and what to remember of it: the whole method in one call.

    The target is `soft_targets` where present_B, and the one-hot label elsewhere.

    Args:
        logits_BC: of any floating dtype, with gradient; computed with in float32, also under
            autocast.
        labels_B: int64. past_BC: float32. present_B: bool. All on the device of the logits.
        alpha: as `alpha_at` has it for the epoch.

    Returns:
        loss_B in nats, with gradient; probs_BC, the softmax, without. Both float32.
    """
    with torch.autocast(logits_BC.device.type, enabled=False):
        weight_B = present_B * alpha
        hard_B1 = 1 - weight_B[:, None]
        refined: tuple[Tensor, Tensor] = RefinedCrossEntropy.apply(
            logits_BC.float(), labels_B[:, None], hard_B1, past_BC, weight_B
        )
    return refined


class RefinedCrossEntropy(torch.autograd.Function):
    """The loss above and the softmax, in as few passes over (B, C) as they need.

    With t = sum_j h_j onehot(y_j) + w p, which must sum to 1:
    loss = logsumexp(z) - sum_j h_j z_(y_j) - w p.z and d loss / d z = softmax(z) - t.
    No target row and no one-hot row is ever made; `soft_targets` and `soft_cross_entropy` state
    the same.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_BC: Tensor,
        labels_BK: Tensor,
        hard_BK: Tensor,
        past_BC: Tensor,
        weight_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(loss_B in nats, softmax_BC without gradient). hard_BK: h; weight_B: w, 0 if absent."""
        probs_BC = logits_BC.softmax(dim=1)
        logsumexp_B = logits_BC.amax(dim=1) - probs_BC.amax(dim=1).log()
        hard_B = (logits_BC.gather(1, labels_BK) * hard_BK).sum(dim=1)
        soft_B = torch.linalg.vecdot(past_BC, logits_BC) * weight_B
        ctx.save_for_backward(probs_BC, labels_BK, hard_BK, past_BC, weight_B)
        ctx.mark_non_differentiable(probs_BC)
        return logsumexp_B - hard_B - soft_B, probs_BC

    @staticmethod
    def backward(
        ctx: Any, grad_B: Tensor, grad_of_probs: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        """With respect to the logits."""
        del grad_of_probs
        probs_BC, labels_BK, hard_BK, past_BC, weight_B = ctx.saved_tensors
        grad_BC = probs_BC * grad_B[:, None]
        grad_BC.addcmul_(past_BC, (-grad_B * weight_B)[:, None])
        add_at_labels(grad_BC, labels_BK, -grad_B[:, None] * hard_BK)
        return grad_BC, None, None, None, None


def _refined(
    logits_BC: Tensor, batch: Batch, past_BC: Tensor, weight_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses and softmax against targets with weight w of past rows, mixed if images were."""
    labels_BK, hard_BK = labels_and_shares(batch)
    if batch.mix is None:
        hard_BK = 1 - weight_B[:, None]
    else:
        partner_B, share_B = batch.mix.partner_B, batch.mix.share_B
        own_B, other_B = share_B * weight_B, (1 - share_B) * weight_B[partner_B]
        hard_BK = hard_BK - torch.stack((own_B, other_B), 1)
        past_BC = own_B[:, None] * past_BC + other_B[:, None] * past_BC[partner_B]
        weight_B = torch.ones_like(weight_B)
    refined: tuple[Tensor, Tensor] = RefinedCrossEntropy.apply(
        logits_BC, labels_BK, hard_BK, past_BC, weight_B
    )
    return refined


class PSKD(Method):
    """The loss above, with the table; remembers the float32 softmax of the forward pass."""

    def __init__(self, section: PSKDSection, network: Network | None = None) -> None:
        self._section = section
        self._alpha = 0.0

    def begin_epoch(self, epoch: int, epochs: int) -> dict[str, float]:
        """alpha rises by epoch and is constant inside one."""
        self._alpha = alpha_at(epoch, epochs, self._section.alpha_T, self._section.schedule)
        return {"alpha": self._alpha}

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """Soft cross-entropy of each sample against its refined target."""
        assert past is not None, "PS-KD needs the store"
        logits_BC = forward(batch.images_BCHW).float()
        # Without a past prediction the target is one-hot, whatever alpha is.
        loss_B, probs_BC = _refined(logits_BC, batch, past.rows_BC, past.present_B * self._alpha)
        kept = self._section.averaging
        if kept:
            averaged_BC = torch.lerp(probs_BC, past.rows_BC, kept)
            probs_BC = torch.where(past.present_B[:, None], averaged_BC, probs_BC)
        return Output(loss_B, remember_BC=probs_BC)


class PSKDByModel(Method):
    """The loss above, with last epoch's model as the teacher; one more forward pass, no table."""

    keeps_network = True

    def __init__(self, section: PSKDSection, network: Network) -> None:
        self._section = section
        self._network = network
        self._alpha = 0.0
        self._epoch = 0  # in which the teacher teaches
        self._teacher: nn.Module | None = None

    def begin_epoch(self, epoch: int, epochs: int) -> dict[str, float]:
        """The model as it is now becomes the teacher, unless the epoch was begun before."""
        self._alpha = alpha_at(epoch, epochs, self._section.alpha_T, self._section.schedule)
        if epoch != self._epoch:
            self._teacher, self._epoch = self._network.snapshot(), epoch
        return {"alpha": self._alpha}

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """Soft cross-entropy of each sample against its refined target."""
        logits_BC = forward(batch.images_BCHW).float()
        labels_BK, shares_BK = labels_and_shares(batch)
        if self._teacher is None:
            return Output(cross_entropy(logits_BC, labels_BK, shares_BK))
        # The teacher sees the image as it is mixed: its prediction needs no mixing.
        taught_BC = self._network.infer(self._teacher, batch.images_BCHW).softmax(dim=1)
        loss_B, _ = RefinedCrossEntropy.apply(
            logits_BC,
            labels_BK,
            shares_BK * (1 - self._alpha),
            taught_BC,
            torch.full_like(shares_BK[:, 0], self._alpha),
        )
        return Output(loss_B)

    def state_dict(self) -> dict[str, Any]:
        """The teacher, which is not the model any more once the epoch has begun."""
        weights = None if self._teacher is None else self._teacher.state_dict()
        return {"epoch": self._epoch, "teacher": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with that teacher."""
        self._epoch = state["epoch"]
        if state["teacher"] is not None:
            self._teacher = self._network.copy()
            self._teacher.load_state_dict(state["teacher"])
