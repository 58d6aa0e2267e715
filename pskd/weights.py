"""Weights for plain PyTorch, in and out, and the hash by which two runs are compared."""

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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


def export_bytes(model: nn.Module) -> int:
    """Size of a file that `export_weights` writes, about."""
    return sum(tensor.nbytes + 512 for tensor in model.state_dict().values())


def read_weights(path: Path) -> dict[str, Tensor]:
    """Names and tensors, on the CPU, from what people have at hand.

    path: an export of ours, a complete run (its last epoch), RUN/checkpoints/NAME, or any file that
    `torch.load(weights_only=True)` reads: a state dict, or one under "net", "model" or
    "state_dict"; a leading "module." goes.

    Raises:
        PskdError: nothing of the kind.
    """
    file = path
    try:
        if (path / "result.json").is_file():
            last = json.loads((path / "result.json").read_text())["last"]
            file = path / "models" / f"checkpoint_{last['epoch'] + 1}.pth"
        elif path.is_dir():
            file = path / "state.pt"
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise PskdError(
            f"{file}: no such file. Name an export, a complete run, or a file of weights."
        ) from error
    except pickle.UnpicklingError as error:
        raise PskdError(
            f"{file} holds other things than tensors, numbers and text. It was not executed: name "
            "a file of weights."
        ) from error
    except Exception as error:  # of a foreign file, torch's unpickler raises anything
        raise PskdError(f"{file} holds no weights that can be read: {error}") from error
    for key in ("engine", "net", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not _are_weights(content):
        raise PskdError(f"{file} holds no weights: a dict of tensors is expected.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """What keeps some weights from fitting a network, for a message; None if they fit."""
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    if missing or unknown:
        parts = [f"{len(missing)} tensors are missing ({missing[0]}, ...)"] if missing else []
        parts += [f"{len(unknown)} are unknown ({unknown[0]}, ...)"] if unknown else []
        return " and ".join(parts)
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            return f"{name} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
    return None


def _are_weights(content: dict[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
