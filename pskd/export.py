"""Trained networks for other programs, and public checkpoints for ours: `pskd export | import`.

Beside an export lies `<file>.json`: the network's name, the classes and preprocessing
(`data/preprocessing.py`), the data that it was trained and measured on and how (sections of
config.yaml), the measures of its epoch, the hash of its weights.
"""

import importlib.util
import io
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pskd import models
from pskd.errors import DamagedError, PskdError
from pskd.fields import known
from pskd.files import named_by, rewritten, write_atomically, write_json, written_again
from pskd.run_records import read_complete, read_preprocessing, read_result, saved_settings
from pskd.weights import (
    difference,
    export_path,
    export_weights,
    head_of,
    read_saved,
    weights_for,
    weights_sha256,
)

Format = Literal["state-dict", "torch-export", "onnx"]
SUFFIXES: dict[str, str] = {"state-dict": ".pth", "torch-export": ".pt2", "onnx": ".onnx"}

_ONNX_PACKAGES = ("onnx", "onnxscript")
_EXAMPLE = 2  # images; the exported graphs take any number


def export(
    run: Path, *, which: Literal["last", "best"], kind: Format, output: Path | None
) -> tuple[Path, Path]:
    """Write a run's network of its last or best epoch; returns the file and the JSON beside it.

    state-dict: names and tensors, for `load_state_dict`. torch-export: `torch.export.load`. onnx:
    input `images` float32 (batch, 3, height, width), output `logits`.

    Raises:
        PskdError: no complete run, damaged files, a missing package, or it cannot be written.
    """
    if kind == "onnx":
        _need(_ONNX_PACKAGES)
    facts = facts_of(run, which)
    preprocessing = read_preprocessing(run) or read_complete(run, "preprocessing.json")
    model = models.build(facts["model"], facts["num_classes"])
    model.load_state_dict(facts.pop("net"))
    model.eval()
    target = output or run / "exports" / f"{facts['model']}-{which}{SUFFIXES[kind]}"
    content = _content(model, kind, preprocessing["height"], preprocessing["width"])
    beside = target.with_name(target.name + ".json")
    settings = saved_settings(run)
    described = {
        "format": kind,
        **facts,
        "weights_sha256": weights_sha256(model),
        "preprocessing": preprocessing,
        **{name: settings.get(name) for name in ("data", "evaluation")},
    }
    with named_by("--output", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)
        write_json(beside, described)
    return target, beside


def import_public(path: Path, model: str, output: Path) -> None:
    """Make an export of ours from a checkpoint of public code, for `model.init` and teachers.

    path: a state dict, also under "net", "model" or "state_dict", also with "module." before names.

    Raises:
        PskdError: no weights there, or of another network: says which tensors differ.
    """
    network = public_network(path, model)
    classes = len(network.state_dict()[head_of(network)[0]])
    export_weights(output, network, {"model": model, "num_classes": classes})


def public_network(path: Path, model: str) -> nn.Module:
    """Our network `model` with weights of a file, of as many classes as they have.

    Raises:
        PskdError: no weights there, or of another network: says which tensors differ.
    """
    known(model, models.MODELS, "--model")
    weights = weights_for(model, path)
    network = models.build(model, 2)
    head = head_of(network)[0]
    if head in weights and weights[head].ndim == 2:
        network = models.build(model, len(weights[head]))
    wrong = difference(network.state_dict(), weights)
    if wrong is not None:
        raise PskdError(f"{path} does not hold a {model}: {wrong}.")
    network.load_state_dict(weights)
    return network


def facts_of(run: Path, which: str) -> dict[str, Any]:
    """The content of an export of the trainer, weights under "net".

    Raises:
        PskdError: the run is not complete, or has lost it, or a file is damaged.
    """
    last = read_result(run)["last"]
    file = export_path(run, "best" if which == "best" else last["epoch"])
    kept = "Restore it from a copy, or take the last epoch: --weights last."
    if not file.exists():
        raise PskdError(f"{file}: no such file. {kept if which == 'best' else rewritten(run)}")
    try:
        return read_saved(file)
    except PskdError as error:
        what = error.what if isinstance(error, DamagedError) else error
        raise PskdError(f"{what} {kept if which == 'best' else written_again(run)}") from error


def _content(model: nn.Module, kind: Format, height: int, width: int) -> bytes:
    content = io.BytesIO()
    example = torch.zeros(_EXAMPLE, 3, height, width)
    match kind:
        case "state-dict":
            torch.save(model.state_dict(), content)
        case "torch-export":
            torch.export.save(_graph(model, example), content)
        case "onnx":
            return _onnx(model, example)
    return content.getvalue()


def _graph(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))


def _onnx(model: nn.Module, example: Tensor) -> bytes:
    for noisy in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: "batch"},),
        input_names=["images"],
        output_names=["logits"],
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _need(packages: tuple[str, ...]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise PskdError(
            f"--format onnx needs {' and '.join(missing)}, which is not installed: "
            'pip install "pskd[onnx]", or .[onnx] in a clone.'
        )
