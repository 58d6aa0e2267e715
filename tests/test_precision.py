"""Precisions and ZeRO stages through real DeepSpeed engines, on toy networks.

Half-precision convolutions are a dozen times slower on a CPU, so the networks are tiny.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pskd import command_line, deepspeed_config
from pskd.checkpoint import Checkpoints, Position
from pskd.config import OptimizerSection
from pskd.engine import Engine, _parameter_groups
from pskd.errors import PskdError
from pskd.weights import weights_sha256
from pskd.world import World

STEPS = 6


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (
        torch.randn(8, 3, 6, 6, generator=generator),
        torch.randint(0, 5, (8,), generator=generator),
    )


def engine_of(world: World, name: str, *flags: str) -> Engine:
    config = command_line.load([f"--engine.deepspeed_config={name}", *flags])
    settings = deepspeed_config.complete(
        config.engine.deepspeed_config,
        batch=8 * world.size,
        world=world.size,
        accumulation=1,
        clip_norm=config.optimizer.clip_norm,
    )
    return Engine(network(), config.optimizer, config.engine, settings, world.timeout)


def train_steps(world: World, engine: Engine, steps: range, scale: float = 1.0) -> list[float]:
    """Losses of a few steps; `scale` multiplies the loss that is trained."""
    losses = []
    engine.train()
    for step in steps:
        images_BCHW, labels_B = batch(step, world.rank)
        loss = F.cross_entropy(engine.forward(images_BCHW).float(), labels_B)
        engine.backward_and_step(loss * scale, lr=0.1)
        losses.append(loss.item())
    return losses


def flat(engine: Engine) -> list[float]:
    return torch.cat([p.detach().flatten() for p in engine.model.parameters()]).tolist()


def run(world: World, name: str, *flags: str) -> tuple[list[float], list[float]]:
    engine = engine_of(world, name, *flags)
    losses = train_steps(world, engine, range(STEPS))
    assert all(p.dtype == torch.float32 for p in engine.model.parameters())
    assert all(b.dtype in (torch.float32, torch.int64) for b in engine.model.buffers())
    return losses, flat(engine)


# --- close to fp32 -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "atol"),
    [("bf16", 2e-2), ("fp16", 3e-3), ("bf16-zero1", 2e-2), ("bf16-zero2", 2e-2)],
)
def test_half_precision_trains_close_to_fp32_with_fp32_weights(pool, name, atol):
    reference = pool(2).run(run, "fp32")
    for (losses, weights), (want_losses, want_weights) in zip(
        pool(2).run(run, name), reference, strict=True
    ):
        np.testing.assert_allclose(losses, want_losses, atol=atol)
        np.testing.assert_allclose(weights, want_weights, atol=atol)
        assert losses != want_losses  # it did compute in half precision


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("name", ["fp32-zero1", "fp32-zero2"])
def test_zero_stages_train_what_stage_0_trains(pool, name, clip):
    flag = f"--optimizer.clip_norm={clip}"
    for (losses, weights), (want_losses, want_weights) in zip(
        pool(2).run(run, name, flag), pool(2).run(run, "fp32", flag), strict=True
    ):
        np.testing.assert_allclose(losses, want_losses, atol=1e-6)
        np.testing.assert_allclose(weights, want_weights, atol=1e-6)


@pytest.mark.parametrize(
    "flag",
    [
        "--engine.channels_last=true",
        "--optimizer.implementation=foreach",
        "--optimizer.implementation=fused",
    ],
)
def test_options_for_speed_train_what_the_default_trains(pool, flag):
    for (losses, weights), (want_losses, want_weights) in zip(
        pool(2).run(run, "fp32", flag), pool(2).run(run, "fp32"), strict=True
    ):
        np.testing.assert_allclose(losses, want_losses, atol=1e-5)
        np.testing.assert_allclose(weights, want_weights, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_network_trains_what_the_eager_one_trains(pool):
    ((losses, weights),) = pool(1).run(run, "fp32", "--engine.compile=true")
    ((want_losses, want_weights),) = pool(1).run(run, "fp32")
    np.testing.assert_allclose(losses, want_losses, atol=1e-5)
    np.testing.assert_allclose(weights, want_weights, atol=1e-5)


def predictions(world: World) -> tuple[float, float, bool]:
    """Largest difference of evaluation logits: training's precision, and fp32, from the module."""
    engine = engine_of(world, "bf16")
    images_BCHW, _ = batch(0, 0)
    want_BC = network().eval()(images_BCHW)
    half_BC, full_BC = engine.predict(images_BCHW, False), engine.predict(images_BCHW, True)
    same_type = half_BC.dtype == full_BC.dtype == torch.float32
    return float((half_BC - want_BC).abs().max()), float((full_BC - want_BC).abs().max()), same_type


def test_evaluation_is_in_training_precision_or_in_fp32(pool):
    ((half, full, same_type),) = pool(1).run(predictions)
    assert 0 < half < 2e-2
    assert full == 0
    assert same_type


def test_norms_and_biases_may_be_spared_the_weight_decay():
    model = network()
    (everything,) = _parameter_groups(model, OptimizerSection(weight_decay=0.1))
    assert everything["weight_decay"] == 0.1
    assert len(everything["params"]) == len(list(model.parameters()))
    section = OptimizerSection(weight_decay=0.1, decay_norm_and_bias=False)
    weights, spared = _parameter_groups(model, section)
    assert (weights["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in weights["params"]} == {2, 4}
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(weights["params"]) + len(spared["params"]) == len(everything["params"])


# --- overflow, and state -------------------------------------------------------------------


def overflow(world: World, directory: str) -> dict:
    """A step whose scaled gradients overflow on one rank, then ordinary ones, then a resume."""
    engine = engine_of(world, "fp16")
    before = flat(engine)
    train_steps(world, engine, range(1), scale=1e6 if world.rank == 1 else 1.0)
    after = flat(engine)
    scale = engine.state_dict()["scaler"]["scale"]
    checkpoints = Checkpoints(Path(directory), 1)
    checkpoints.register("engine", engine)
    if world.rank == 0:
        checkpoints.save(Position(0, 1))
    world.gather(None)
    train_steps(world, engine, range(1, STEPS))

    again = engine_of(world, "fp16")
    _, state = checkpoints.read(checkpoints.latest())
    again.load_state_dict(state["engine"])
    resumed = again.state_dict()["scaler"]["scale"]
    train_steps(world, again, range(1, STEPS))
    return {
        "skipped": before == after,
        "scales": (scale, resumed),
        "moved": flat(engine) != after,
        "equal": flat(engine) == flat(again),
    }


def test_an_overflow_skips_the_step_lowers_the_scale_and_is_resumed(pool, tmp_path):
    for found in pool(2).run(overflow, str(tmp_path)):
        assert found == {
            "skipped": True,
            "scales": (32768.0, 32768.0),  # from 65536
            "moved": True,
            "equal": True,
        }


def saved_and_resumed(world: World, name: str, directory: str, *flags: str) -> tuple[str, str]:
    """Weights hash of a run of STEPS, and of one that was saved in the middle and resumed."""
    path = Path(directory)
    engine = engine_of(world, name, *flags)
    checkpoints = Checkpoints(path, 2)
    checkpoints.register("engine", engine)
    train_steps(world, engine, range(STEPS // 2))
    position = Position(0, STEPS // 2)
    if engine.sharded:
        aside = checkpoints.open_aside(position, create=world.rank == 0)
        world.gather(None)
        engine.save_shards(aside)
    if world.rank == 0:
        checkpoints.save(position)
    world.gather(None)
    train_steps(world, engine, range(STEPS // 2, STEPS))

    again = engine_of(world, name, *flags)
    read = Checkpoints(path, 2)
    _, state = read.read(position.name)
    again.load_state_dict(state["engine"])
    if again.sharded:
        again.load_shards(path / position.name)
    train_steps(world, again, range(STEPS // 2, STEPS))
    engine.sync_buffers()
    again.sync_buffers()
    return weights_sha256(engine.model), weights_sha256(again.model)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("fp32", ["--engine.channels_last=true"]),
        ("fp32", ["--optimizer.implementation=fused"]),
        ("bf16", []),
        ("fp16", []),
        ("fp32-zero1", []),
        ("fp32-zero2", []),
        ("bf16-zero1", []),
        ("bf16-zero2", []),
    ],
)
def test_every_engine_resumes_to_the_same_bits(pool, tmp_path, name, flags):
    for straight, resumed in pool(2).run(saved_and_resumed, name, str(tmp_path), *flags):
        assert straight == resumed


def settings_after_loading(world: World, name: str, directory: str, *flags: str) -> dict:
    """Of an engine with these flags, which goes on from one with the default settings."""
    path = Path(directory)
    before = engine_of(world, name)
    train_steps(world, before, range(2))
    checkpoints = Checkpoints(path, 1)
    checkpoints.register("engine", before)
    position = Position(0, 2)
    if before.sharded:
        aside = checkpoints.open_aside(position, create=world.rank == 0)
        world.gather(None)
        before.save_shards(aside)
    if world.rank == 0:
        checkpoints.save(position)
    world.gather(None)
    engine = engine_of(world, name, *flags)
    _, state = checkpoints.read(position.name)
    engine.load_state_dict(state["engine"])
    if engine.sharded:
        engine.load_shards(path / position.name)
    same_weights = flat(engine) == flat(before)
    settings = [
        {key: group[key] for key in ("weight_decay", "momentum", "nesterov", "foreach")}
        for group in engine._optimizer.param_groups
    ]
    clip_norm = engine._optimizer.clip_grad if engine.sharded else None
    train_steps(world, before, range(2, 4))
    train_steps(world, engine, range(2, 4))
    return {
        "settings": settings,
        "clip_norm": clip_norm,
        "same weights": same_weights,
        "trained alike": flat(engine) == flat(before),
    }


@pytest.mark.parametrize("name", ["fp32", "fp32-zero1", "fp32-zero2"])
def test_the_settings_of_the_new_run_count_after_loading(pool, tmp_path, name):
    """Weights and momentum are the other run's; weight decay and the rest are not."""
    flags = (
        "--optimizer.weight_decay=0.01",
        "--optimizer.momentum=0.5",
        "--optimizer.nesterov=false",
        "--optimizer.implementation=foreach",
        "--optimizer.clip_norm=0.25",
    )
    settings = {"weight_decay": 0.01, "momentum": 0.5, "nesterov": False, "foreach": True}
    for found in pool(2).run(settings_after_loading, name, str(tmp_path), *flags):
        assert found == {
            "settings": [settings],
            "clip_norm": None if name == "fp32" else 0.25,
            "same weights": True,
            "trained alike": False,
        }


def from_fp32_to_fp16(world: World) -> tuple[float, bool]:
    """The scale that an fp16 engine has after it has loaded fp32 state; whether it trains on."""
    before, engine = engine_of(world, "fp32"), engine_of(world, "fp16")
    train_steps(world, before, range(2))
    engine.load_state_dict(before.state_dict())
    scale = engine.state_dict()["scaler"]["scale"]
    train_steps(world, engine, range(2, 4))
    return scale, flat(engine) != flat(before)


def test_fp16_goes_on_from_fp32_with_a_fresh_scale(pool):
    assert pool(2).run(from_fp32_to_fp16) == [(65536.0, True)] * 2


def shards_of_another_world(world: World) -> str:
    engine = engine_of(world, "fp32-zero1")
    try:
        engine.load_state_dict({"ranks": 2})
    except PskdError as error:
        return str(error)
    return "accepted"


def test_shards_are_for_the_number_of_ranks_that_wrote_them(pool):
    (message,) = pool(1).run(shards_of_another_world)
    assert "shards of 2 ranks, this job has 1" in message
    assert "Start 2 ranks" in message


def channels_last_with_zero(world: World) -> str:
    try:
        engine_of(world, "fp32-zero1", "--engine.channels_last=true")
    except PskdError as error:
        return str(error)
    return "accepted"


def test_channels_last_with_zero_is_refused(pool):
    (message,) = pool(1).run(channels_last_with_zero)
    assert "channels_last with ZeRO-1 or 2" in message


# --- the JSON file -------------------------------------------------------------------------


def complete(path: str) -> dict:
    return deepspeed_config.complete(path, batch=64, world=2, accumulation=2, clip_norm=1.5)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"train_batch_size": 63}, ["'train_batch_size' is 63", "train.*"]),
        ({"gradient_clipping": 2.0}, ["'gradient_clipping' is 2.0"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'"]),
        ({"fp16": {"enabled": True}}, ["'fp16' section", "BatchNorm", "torch_autocast"]),
        ({"bf16": {"enabled": True}}, ["'bf16' section", "BatchNorm"]),
        ({"zero_optimization": {"stage": 3}}, ["stage is 3", "nothing to shard"]),
        (
            {
                "zero_optimization": {"stage": 1},
                "torch_autocast": {"enabled": True, "dtype": "float16"},
            },
            ["fp16 with ZeRO-1", "loss scale", "bfloat16"],
        ),
        ({"torch_autocast": {"enabled": True, "dtype": "int8"}}, ["dtype is int8", "bfloat16"]),
        ({"zero_optimisation": {"stage": 1}}, ["unknown key", "'zero_optimization'"]),
        ({"zzz": 1}, ["unknown key 'zzz'", "Known: zero_optimization"]),
        ([], ["JSON object"]),
    ],
)
def test_a_file_that_sets_what_we_own_or_cannot_be_trained_is_refused(tmp_path, settings, parts):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(PskdError) as refusal:
        complete(str(path))
    for part in (str(path), *parts):
        assert part in str(refusal.value)


def test_no_such_file_names_those_that_there_are():
    with pytest.raises(PskdError, match=r"bf17: no such file.*bf16, bf16-zero1.*fp32"):
        complete("bf17")


def test_auto_and_our_own_values_are_accepted(tmp_path):
    path = tmp_path / "ds.json"
    given = {
        "train_batch_size": 64,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto",
        "fp16": {"enabled": False},
        "bf16": "auto",
    }
    path.write_text(json.dumps(given))
    settings = complete(str(path))
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 1.5
    assert settings["train_micro_batch_size_per_gpu"] == 16
    assert "auto" not in json.dumps(settings)
    assert "bf16" not in settings


@pytest.mark.parametrize(
    "path", sorted(deepspeed_config.SHIPPED.glob("*.json")), ids=lambda p: p.stem
)
def test_every_shipped_file_says_what_its_name_says(path):
    settings = complete(path.stem)
    precision, _, zero = path.stem.partition("-zero")
    assert deepspeed_config.precision(settings) == precision
    assert deepspeed_config.stage(settings) == int(zero or 0)


def unknown_zero_key(world: World, path: str) -> str:
    try:
        engine_of(world, path)
    except PskdError as error:
        return str(error)
    return "accepted"


def test_a_key_that_deepspeed_does_not_know_is_refused(pool, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, "stagee": 2}}))
    (message,) = pool(1).run(unknown_zero_key, str(path))
    assert "stagee" in message
