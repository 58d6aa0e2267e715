"""The DeepSpeed JSON: read, checked, and completed with what this program owns.

A name such as `bf16-zero1` means the file of that name in ds_configs/; all else is a path. What we
own may be left out, or be "auto" (which DeepSpeed does not know), or say what we would say.
"""

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from pskd.errors import PskdError

# In a checkout a link to the folder at the top; in an installed package the files themselves.
SHIPPED = Path(__file__).parent / "ds_configs"

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[str, Precision] = {"bfloat16": "bf16", "float16": "fp16"}

# The order of samples, the optimizer and its schedule are ours.
_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "zero_allow_untested_optimizer",
    "steps_per_print",
    "timers",
)
# How ZeRO-0's gradients travel; with any of them DeepSpeed sends them, after the backward pass.
_TRAVEL = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor")
# Left to the user. A key that is neither owned nor here is refused: DeepSpeed would ignore it.
_FREE = (
    "zero_optimization",
    "torch_autocast",
    *_TRAVEL,
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "csv_monitor",
    "tensorboard",
    "wandb",
)
_CLASSIC = ("fp16", "bf16", "amp")


def complete(
    name: str, *, batch: int, world: int, accumulation: int, clip_norm: float
) -> dict[str, Any]:
    """The settings for `deepspeed.initialize`. `batch`: samples of an optimizer step.

    Raises:
        PskdError: no such file, not a JSON object, an unknown key, a value of ours, or a
            combination that does not train what it says; each with its reason.
    """
    path = _path(name)
    settings = _read(path)
    # DeepSpeed only checks the arithmetic; parts may differ by two samples between ranks.
    owned: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": max(1, batch // (world * accumulation)),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,  # its word for SGD under ZeRO
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # waits for the device twice a step
    }
    for key in (*_OWNED, *_CLASSIC):
        given = settings.pop(key, "auto")
        if given == "auto" or given == owned.get(key):
            continue
        if key in _CLASSIC:
            if given == {"enabled": False}:
                continue
            raise PskdError(
                f"{path}: the '{key}' section would cast BatchNorm's parameters to half "
                'precision. Use "torch_autocast", as in ds_configs/bf16.json.'
            )
        raise PskdError(
            f"{path}: '{key}' is {given}, but this program sets it "
            '(train.*, optimizer.*, schedule.*). Remove it, or write "auto".'
        )
    for key in settings:
        if key not in _FREE:
            near = difflib.get_close_matches(key, (*_FREE, *_OWNED), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(_FREE)}."
            raise PskdError(f"{path}: unknown key '{key}'.{hint}")
    _check(path, settings)
    del owned["train_batch_size"]  # it would have to be the product of the others
    return {**settings, **owned}


def precision(settings: dict[str, Any]) -> Precision:
    """In which the forward pass computes convolutions and products; weights are always fp32."""
    autocast = settings.get("torch_autocast", {})
    return _DTYPES[autocast["dtype"]] if autocast.get("enabled") else "fp32"


def stage(settings: dict[str, Any]) -> int:
    """ZeRO stage."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def communicates(settings: dict[str, Any]) -> bool:
    """Whether the file says how gradients travel between the ranks."""
    return any(key in settings for key in _TRAVEL)


def _check(path: Path, settings: dict[str, Any]) -> None:
    zero, autocast = settings.get("zero_optimization", {}), settings.get("torch_autocast", {})
    if not isinstance(zero, dict) or not isinstance(autocast, dict):
        raise PskdError(f"{path}: zero_optimization and torch_autocast are sections, {{...}}.")
    if zero.get("stage", 0) not in (0, 1, 2):
        raise PskdError(
            f"{path}: zero_optimization.stage is {zero['stage']}: use 0, 1 or 2. Stage 3 has "
            "nothing to shard in these models, and its collective forward passes would break "
            "the exact evaluation."
        )
    if autocast.get("enabled") and autocast.get("dtype") not in _DTYPES:
        raise PskdError(
            f"{path}: torch_autocast.dtype is {autocast.get('dtype')}: use one of "
            f"{', '.join(_DTYPES)}."
        )
    if precision(settings) == "fp16" and stage(settings) > 0:
        raise PskdError(
            f"{path}: fp16 with ZeRO-{stage(settings)}: DeepSpeed would clip the scaled gradients "
            "and never lower the loss scale. Use bfloat16, or stage 0."
        )


def _path(name: str) -> Path:
    shipped = SHIPPED / f"{name}.json"
    if shipped.is_file():
        return shipped
    path = Path(name)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.json")))
        raise PskdError(
            f"engine.deepspeed_config {name}: no such file. Name one of {names}, or a JSON file."
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PskdError(f"{path} is no readable JSON file: {error}.") from error
    if not isinstance(settings, dict):
        raise PskdError(f"{path} must hold a JSON object.")
    return settings
