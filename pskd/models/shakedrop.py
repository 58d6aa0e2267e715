"""ShakeDrop (Yamada 2019) as the public PS-KD code has it: noise on a residual branch.

With probability `survival` a branch passes as it is. Otherwise it is multiplied by alpha ~ U(-1, 1)
on the way forward, and its gradient by beta ~ U(0, 1) on the way back. One gate for the whole
batch; alpha and beta for every sample. Evaluation multiplies by `survival`, the mean of the factor.

Letters: B samples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def draw(survival: float, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors of one pass, forward and backward: float32 (B, 1, 1, 1) each.

    From the default generator of the device, all in the forward pass, so they do not depend on the
    order of the backward pass. The gate stays a tensor: nobody waits for the device.
    """
    shape = (batch, 1, 1, 1)
    passes = torch.rand((), device=device, dtype=torch.float32) < survival
    alpha_B111 = 2 * torch.rand(shape, device=device, dtype=torch.float32) - 1
    beta_B111 = torch.rand(shape, device=device, dtype=torch.float32)
    return torch.where(passes, 1.0, alpha_B111), torch.where(passes, 1.0, beta_B111)


class _TwoFactors(torch.autograd.Function):
    """x * forth, whose gradient is grad * back; both in the type of x, as autocast left it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forth_B111: Tensor, back_B111: Tensor) -> Tensor:
        ctx.save_for_backward(back_B111)
        return x * forth_B111.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back_B111,) = ctx.saved_tensors
        return grad * back_B111.to(grad.dtype), None, None


_scale: Callable[[Tensor, Tensor, Tensor], Tensor] = _TwoFactors.apply


class ShakeDrop(nn.Module):
    """The noise of one block, which passes with probability `survival`."""

    def __init__(self, survival: float) -> None:
        super().__init__()
        self.survival = survival

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if not self.training:
            return x * self.survival
        return _scale(x, *draw(self.survival, len(x), x.device))

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        return f"survival={self.survival:.4f}"
