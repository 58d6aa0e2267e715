"""A network that writes down the images that it is given. `--model.name=watching`.

$SEEN/<training|evaluation>-<process>.txt: a line a call, the hashes of its images in order
"""

import hashlib
import os
from pathlib import Path

from torch import Tensor, nn


class Watching(nn.Module):
    """Float32 (B, 3, H, W) -> logits (B, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Channels' means, linearly."""
        mode = "training" if self.training else "evaluation"
        if not images_BCHW.any():  # the probe, before training
            return self.head(images_BCHW.mean(dim=(2, 3)))
        name = f"{mode}-{os.environ['RANK']}-{os.getpid()}.txt"
        hashes = [
            hashlib.sha256(image.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]
            for image in images_BCHW.detach()
        ]
        with (Path(os.environ["SEEN"]) / name).open("a") as file:
            file.write(" ".join(hashes) + "\n")
        return self.head(images_BCHW.mean(dim=(2, 3)))


def build(num_classes: int) -> nn.Module:
    """As `pskd.models.build` wants it."""
    return Watching(num_classes)
