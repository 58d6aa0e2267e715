"""Whether a network takes images of some size, before anything is trained."""

from collections.abc import Collection

import torch
from torch import nn

from pskd.errors import PskdError


def check_takes(
    model: nn.Module, name: str, sizes: Collection[tuple[int, int]], remedy: str
) -> None:
    """Refuse images (height, width) that the network cannot take, by one forward pass of each.

    In evaluation mode, so it changes no buffer and draws nothing.

    Raises:
        PskdError: names network, size, the reason and the remedy.
    """
    model.eval()
    device = next(model.parameters(), torch.empty(0)).device
    for height, width in sizes:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, height, width, device=device))
        except Exception as error:  # whatever its family raises
            reason = " ".join(str(error).split()).rstrip(".!") or type(error).__name__
            raise PskdError(
                f"model.name {name} cannot take images of {height}x{width} pixels ({reason}). "
                f"Use images of another size ({remedy}), or another model.name."
            ) from error
    model.train()
