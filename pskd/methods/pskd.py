"""PS-KD: progressive self-knowledge distillation (Kim et al., ICCV 2021).

    t_i = (1 - alpha_e) * onehot(y_i) + alpha_e * p_i^(e-1)
    alpha_e = alpha_T * (e + 1) / E,  e = 0 .. E-1
    loss_i = -sum_k t_ik * log softmax(z_i)_k

p_i^(e-1) is the softmax of the training forward pass in which sample i was last trained, before
that step's update. In epoch 0, and for a sample that was never trained, it is the one-hot label.
No temperature, no further cross-entropy term.

Letters: B samples, C classes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pskd.data.batch import Batch
from pskd.methods.interface import Forward, Output, Past
from pskd.methods.sections import PSKDSection


def alpha_at(epoch: int, epochs: int, alpha_T: float) -> float:
    """Weight of the past prediction in 0-based `epoch`; the last epoch has exactly alpha_T."""
    return alpha_T * ((epoch + 1) / epochs)


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


class RefinedCrossEntropy(torch.autograd.Function):
    """The loss above and the softmax, in as few passes over (B, C) as they need.

    With t = (1 - w) onehot(y) + w p and S = sum_k t_k:
    loss = S logsumexp(z) - (1 - w) z_y - w p.z and d loss / d z = S softmax(z) - t. No target row
    and no one-hot row is ever made; `soft_targets` and `soft_cross_entropy` state the same.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BC: Tensor, labels_B: Tensor, past_BC: Tensor, weight_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss_B in nats, softmax_BC without gradient). weight_B: of past rows; 0 if absent."""
        probs_BC = logits_BC.softmax(dim=1)
        logsumexp_B = logits_BC.amax(dim=1) - probs_BC.amax(dim=1).log()
        total_B = 1 - weight_B + weight_B * past_BC.sum(dim=1)
        hard_B = logits_BC.gather(1, labels_B[:, None])[:, 0] * (1 - weight_B)
        soft_B = torch.linalg.vecdot(past_BC, logits_BC) * weight_B
        ctx.save_for_backward(probs_BC, labels_B, past_BC, weight_B, total_B)
        ctx.mark_non_differentiable(probs_BC)
        return total_B * logsumexp_B - hard_B - soft_B, probs_BC

    @staticmethod
    def backward(
        ctx: Any, grad_B: Tensor, grad_of_probs: Tensor
    ) -> tuple[Tensor, None, None, None]:
        """With respect to the logits."""
        del grad_of_probs
        probs_BC, labels_B, past_BC, weight_B, total_B = ctx.saved_tensors
        grad_BC = probs_BC * (grad_B * total_B)[:, None]
        grad_BC.addcmul_(past_BC, (-grad_B * weight_B)[:, None])
        hard_B = grad_B * (weight_B - 1)
        return grad_BC.scatter_add_(1, labels_B[:, None], hard_B[:, None]), None, None, None


class PSKD:
    """The loss above; remembers the float32 softmax of the forward pass."""

    needs_store = True

    def __init__(self, section: PSKDSection) -> None:
        self._alpha_T = section.alpha_T
        self._alpha = 0.0

    def begin_epoch(self, epoch: int, epochs: int) -> dict[str, float]:
        """alpha rises by epoch and is constant inside one."""
        self._alpha = alpha_at(epoch, epochs, self._alpha_T)
        return {"alpha": self._alpha}

    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """Soft cross-entropy of each sample against its refined target."""
        assert past is not None, "PS-KD needs the store"
        logits_BC = forward(batch.images_BCHW).float()
        # Without a past prediction the target is one-hot, whatever alpha is.
        weight_B = past.present_B * self._alpha
        loss_B, probs_BC = RefinedCrossEntropy.apply(
            logits_BC, batch.labels_B, past.rows_BC, weight_B
        )
        return Output(loss_B, remember_BC=probs_BC)
