"""Weights for plain PyTorch, and the hash by which two runs are compared."""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pskd.errors import PskdError
from pskd.files import write_atomically


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names (sorted), dtype, shape and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        host = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {host.dtype} {tuple(host.shape)}\n".encode())
        digest.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def export_weights(path: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write {"net": state dict, **facts}; `torch.load(path, weights_only=True)` reads it.

    Raises:
        PskdError: the file cannot be written.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()
    torch.save({"net": state, **facts}, content)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise PskdError(
            f"weights {path} cannot be written: {error.strerror}. "
            "Free some space and start again: the run resumes from its last checkpoint."
        ) from error
