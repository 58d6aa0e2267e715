"""Gradients that travel during the backward pass are those that DeepSpeed reduces after it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pskd import command_line, deepspeed_config, reduction
from pskd.engine import Engine
from pskd.weights import weights_sha256
from pskd.world import World

STEPS = 3


class Network(nn.Module):
    """Gradients of several sizes and layouts, one parameter that is frozen and one unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 64),
            nn.ReLU(),
            nn.Linear(64, 5),
        )
        self.unused = nn.Parameter(torch.ones(7))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.body(images_BCHW * self.frozen[:, None, None])


def engine_of(world: World, settings: str, accumulation: int, *flags: str) -> Engine:
    config = command_line.load([f"--engine.deepspeed_config={settings}", *flags])
    complete = deepspeed_config.complete(
        config.engine.deepspeed_config,
        batch=8 * world.size * accumulation,
        world=world.size,
        accumulation=accumulation,
        clip_norm=config.optimizer.clip_norm,
    )
    return Engine(Network(), config.optimizer, config.engine, complete, world.timeout)


def trained(world: World, settings: str, accumulation: int, bucket: int, *flags: str):
    """(whether gradients travel early, hash of the weights, the weights)."""
    reduction.BUCKET_BYTES = bucket
    engine = engine_of(world, settings, accumulation, *flags)
    engine.train()
    for step in range(STEPS):
        for micro in range(accumulation):
            generator = torch.Generator().manual_seed(100 * step + 10 * micro + world.rank)
            images_BCHW = torch.randn(8, 3, 6, 6, generator=generator)
            labels_B = torch.randint(0, 5, (8,), generator=generator)
            loss = F.cross_entropy(engine.forward(images_BCHW).float(), labels_B)
            engine.backward_and_step(loss, lr=0.1)
    flat = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
    # BatchNorm's statistics are of each rank's own samples.
    engine.sync_buffers()
    return engine._reducer is not None, weights_sha256(engine.model), flat.tolist()


@pytest.fixture
def after_the_pass(tmp_path):
    """Settings with which DeepSpeed reduces; the type is the one it would take anyway."""

    def of(precision: str) -> str:
        settings = json.loads((deepspeed_config.SHIPPED / f"{precision}.json").read_text())
        path = Path(tmp_path / f"{precision}.json")
        path.write_text(json.dumps({**settings, "communication_data_type": "fp32"}))
        return str(path)

    return of


@pytest.mark.parametrize(
    ("precision", "bucket", "accumulation", "flags"),
    [
        ("fp32", 1, 1, ()),
        ("fp32", 4096, 1, ()),
        ("fp32", 1 << 20, 1, ()),
        ("fp32", 4096, 2, ("--optimizer.clip_norm=0.05",)),
        ("fp32", 4096, 1, ("--engine.channels_last=true", "--optimizer.implementation=foreach")),
        ("bf16", 4096, 1, ()),
        ("fp16", 4096, 1, ()),
    ],
    ids=["alone", "some", "one", "accumulated-clipped", "channels_last", "bf16", "fp16"],
)
def test_two_ranks_train_the_bits_of_deepspeeds_own_reduction(
    pool, after_the_pass, precision, accumulation, flags, bucket
):
    """Halving is exact, and two numbers have one sum."""
    ours = pool(2).run(trained, precision, accumulation, bucket, *flags)
    theirs = pool(2).run(trained, after_the_pass(precision), accumulation, bucket, *flags)
    assert [early for early, *_ in (*ours, *theirs)] == [True, True, False, False]
    assert len({sha256 for _, sha256, _ in (*ours, *theirs)}) == 1


def test_three_ranks_train_what_deepspeeds_own_reduction_trains(pool, after_the_pass):
    ours = pool(3).run(trained, "fp32", 1, 4096)
    theirs = pool(3).run(trained, after_the_pass("fp32"), 1, 4096)
    assert len({sha256 for _, sha256, _ in ours}) == 1
    np.testing.assert_allclose(ours[0][2], theirs[0][2], atol=1e-6)


def test_one_rank_and_zero_are_left_to_deepspeed(pool):
    assert not pool(1).run(trained, "fp32", 1, 4096)[0][0]
    assert not pool(2).run(trained, "fp32-zero1", 1, 4096)[0][0]


def early_and_late(world: World) -> list[int]:
    """Buckets that were sent when the first layer's gradient is computed, and in all."""
    reduction.BUCKET_BYTES = 1
    engine = engine_of(world, "fp32", 1)
    engine.train()
    reducer = engine._reducer
    sent: list[int] = []
    first = engine.model.body[0]
    first.register_full_backward_hook(lambda *_: sent.append(reducer._next))
    images_BCHW = torch.randn(8, 3, 6, 6, requires_grad=True)
    engine.backward_and_step(engine.forward(images_BCHW).float().sum(), lr=0.1)
    return [*sent, len(reducer._buckets)]


def test_gradients_travel_before_the_backward_pass_is_over(pool):
    """The first layer has the last gradient."""
    for sent, buckets in pool(2).run(early_and_late):
        assert 0 < sent < buckets
