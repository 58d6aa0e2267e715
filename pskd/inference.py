"""The forward pass outside training: of a run's evaluation, its teachers, and `pskd evaluate`.

Letters: B samples, C classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Inference:
    """precision: fp32, bf16 or fp16, of convolutions and products. channels_last: memory NHWC."""

    precision: str = "fp32"
    channels_last: bool = False

    @property
    def layout(self) -> torch.memory_format:
        """Of images and weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @torch.no_grad()
    def __call__(
        self, module: nn.Module, images_BCHW: Tensor, full_precision: bool = False
    ) -> Tensor:
        """Logits (B, C) float32 of a network in evaluation mode, without gradient."""
        half = self.precision != "fp32" and not full_precision
        images_BCHW = images_BCHW.contiguous(memory_format=self.layout)
        # A bare module bypasses DeepSpeed's autocast.
        with torch.autocast(images_BCHW.device.type, _DTYPES[self.precision], enabled=half):
            logits_BC: Tensor = module(images_BCHW)
        return logits_BC.float()


def choose_kernels(device: torch.device, *, tf32: bool, deterministic: bool) -> None:
    """On a GPU. tf32: TensorFloat-32 for fp32. deterministic: the same bits again, so equal weights
    after a resume; else cuDNN tries its kernels on each new shape and takes the fastest.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cudnn.benchmark = not deterministic
