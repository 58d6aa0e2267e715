"""Weights for plain PyTorch, in and out, and the hash by which two runs are compared."""

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pskd.errors import DamagedError, PskdError
from pskd.files import read_run_json, write_atomically
from pskd.models.public_names import translate

_MOST_NAMED = 4


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names (sorted), dtype, shape and bytes of all parameters and buffers."""
    return _sha256(model.state_dict())


def _sha256(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        host = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {host.dtype} {tuple(host.shape)}\n".encode())
        digest.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def export_weights(path: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write {"net": state dict, "weights_sha256": its hash, **facts}.

    `torch.load(path, weights_only=True)` reads it.

    Raises:
        PskdError: the file cannot be written.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()
    torch.save({"net": state, "weights_sha256": _sha256(state), **facts}, content)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise PskdError(
            f"weights {path} cannot be written: {error.strerror}. "
            "Free some space and start again: the run resumes from its last checkpoint."
        ) from error


def export_path(run: Path, which: int | Literal["best"]) -> Path:
    """Where a run exports the weights of its best epoch, or of a 0-based one."""
    return run / "models" / f"checkpoint_{which if which == 'best' else which + 1}.pth"


def is_export_of(path: Path, line: Mapping[str, Any]) -> bool:
    """Whether a file holds weights that were exported with this line of metrics.jsonl.

    Reads no weights. False for a file that is missing, damaged, or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch's unpickler raises anything
        return False
    return isinstance(content, dict) and all(content.get(key) == line[key] for key in line)


def export_bytes(model: nn.Module) -> int:
    """Size of a file that `export_weights` writes, about."""
    return sum(tensor.nbytes + 512 for tensor in model.state_dict().values())


def read_saved(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, on the CPU: an export of ours, or another dict.

    Raises:
        PskdError: no such file; it holds something else, none of which was executed; or its weights
            are not those that were written there.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise PskdError(
            f"{path}: no such file. Name an export, a complete run, or a file of weights."
        ) from error
    except pickle.UnpicklingError as error:
        raise PskdError(
            f"{path} holds no weights but other things than tensors, numbers and text. It was "
            "not executed: name a file of weights."
        ) from error
    except Exception as error:  # of a foreign file, torch's unpickler raises anything
        first = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise PskdError(f"{path} holds no weights that can be read ({first}).") from error
    if not isinstance(content, dict):
        raise PskdError(f"{path} holds no weights: a dict of tensors is expected.")
    weights, written = content.get("net"), content.get("weights_sha256")
    if written is not None and isinstance(weights, dict) and _are_weights(weights):
        check_written(path, weights, written)
    return content


def check_written(path: Path, weights: Mapping[str, Tensor], sha256: str) -> None:
    """Compare weights with the hash of those that were written.

    Raises:
        DamagedError: they differ.
    """
    if _sha256(weights) != sha256:
        raise DamagedError(
            f"{path} is damaged: its weights are not those that were written (sha256 differs).",
            "Restore it from a copy, export it again, or name other weights.",
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Names and tensors, on the CPU, from what people have at hand.

    path: an export of ours, a complete run (its last epoch), RUN/checkpoints/NAME, or any file that
    `torch.load(weights_only=True)` reads: a state dict, or one under "net", "model" or
    "state_dict"; a leading "module." goes.

    Raises:
        PskdError: nothing of the kind.
    """
    file = path / "state.pt" if path.is_dir() else path
    result = read_run_json(path / "result.json")
    if result is not None:
        try:
            file = export_path(path, result["last"]["epoch"])
        except (KeyError, TypeError) as error:
            raise PskdError(
                f"{path} holds no weights: its result.json is of no run. Name a file of weights."
            ) from error
    content = read_saved(file)
    for key in ("engine", "net", "model", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    if not content or not _are_weights(content):
        raise PskdError(f"{file} holds no weights: a dict of tensors is expected.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def weights_for(model: str, path: Path) -> dict[str, Tensor]:
    """As `read_weights`, under the names that our network `model` has (see `public_names.py`)."""
    return translate(model, read_weights(path))


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """What keeps some weights from fitting a network, for a message; None if they fit."""
    shapes = [
        f"{name} {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and tensor.shape != found[name].shape
    ]
    parts = [
        _some("tensors are missing", [name for name in expected if name not in found]),
        _some("are unknown", [name for name in found if name not in expected]),
        _some("have another shape", shapes),
    ]
    return "; ".join(part for part in parts if part) or None


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f"{len(names)} {what} ({', '.join(names[:_MOST_NAMED])}{more})"


def head_of(model: nn.Module) -> list[str]:
    """Names of the tensors that turn features into logits: of the last linear layer.

    Raises:
        PskdError: it has none.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise PskdError(f"a {type(model).__name__} has no linear layer to tell its classes by.")
    return [name for name in model.state_dict() if name.startswith(f"{linear[-1]}.")]


def initialise(model: nn.Module, name: str, path: str, new_head: bool) -> None:
    """Begin with the weights of a file, for `model.init`; new_head: but for the last layer.

    Raises:
        PskdError: no weights there, or of another network; says which tensors differ.
    """
    own, found = model.state_dict(), weights_for(name, Path(path))
    head = {tensor: own[tensor] for tensor in head_of(model)}
    wrong = difference(own, {**found, **head} if new_head else found)
    if wrong is not None:
        hint = ""
        if not new_head and difference(own, {**found, **head}) is None:
            hint = " All but the last layer fits: model.new_head true begins that one anew."
        raise PskdError(f"model.init {path} does not fit a {name}: {wrong}.{hint}")
    model.load_state_dict({**found, **head} if new_head else found)


def _are_weights(content: dict[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
