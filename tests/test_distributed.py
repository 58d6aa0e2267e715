"""What several ranks do together equals what one process would do alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from pskd import command_line, deepspeed_config, job
from pskd.checkpoint import Checkpoints, Position
from pskd.data import digits
from pskd.data.arrays import ArrayData
from pskd.data.interface import validation_batches
from pskd.data.mix import Mixer
from pskd.data.sections import ErasingSection, MixingSection
from pskd.engine import Engine
from pskd.errors import AgreedDamage, AgreedError, DamagedError, PskdError
from pskd.exports import Exports
from pskd.guard import Guard
from pskd.history import History
from pskd.methods import registry
from pskd.metrics import MEASURES, per_sample, summarize
from pskd.order import Plan, epoch_order
from pskd.run_dir import RunDir
from pskd.saver import Saver
from pskd.sites import Sites
from pskd.store import open_generation
from pskd.store.sections import StoreSection
from pskd.store.store import Store
from pskd.trainer import Trainer
from pskd.weights import weights_sha256
from pskd.world import World

PLAIN_SGD = (
    "--optimizer.momentum=0",
    "--optimizer.nesterov=false",
    "--optimizer.weight_decay=0",
    "--optimizer.lr=0.5",
)


def network() -> nn.Module:
    """Without BatchNorm, so that the gradient of a batch is the sum over its samples."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


def trainer_of(
    world: World,
    model: nn.Module,
    *,
    batch: int,
    path: str,
    accumulation: int = 1,
    clip: float = 0.0,
    n: int = 100,
    recipe: str = "digits-baseline",
    engine: str = "fp32",
) -> Trainer:
    """A trainer of the first `n` digits, on the ranks of the pool."""
    flags = [f"--train.batch_size={batch}", f"--train.accumulation={accumulation}"]
    flags += [f"--optimizer.clip_norm={clip}", "--train.epochs=3", *PLAIN_SGD]
    config = command_line.load(["--recipe", recipe, *flags])
    catalog = digits.load(None, False)
    train, held_out = catalog.train, catalog.validation
    catalog = replace(
        catalog,
        train=replace(train, images_NHWC=train.images_NHWC[:n], labels_N=train.labels_N[:n]),
        validation=replace(
            held_out, images_NHWC=held_out.images_NHWC[:101], labels_N=held_out.labels_N[:101]
        ),
    )
    plan = Plan(n, batch, world.size, accumulation)
    plan.check()
    settings = deepspeed_config.complete(
        engine, batch=batch, world=world.size, accumulation=accumulation, clip_norm=clip
    )
    method = registry.create(config.method, None)
    sites = Sites(world, [0] * world.size)
    store = None
    if config.method.keeps_predictions:
        store = Store(
            Path(path),
            n=n,
            classes=10,
            identity=catalog.fingerprint,
            run="run",
            start=0,
            peers=sites,
            options=StoreSection("float32"),
            device=world.device,
        )
    trained = Engine(model, config.optimizer, config.engine, settings, world.timeout)
    history = History()
    return Trainer(
        config=config,
        world=world,
        run_dir=RunDir(Path(path)),
        mixer=Mixer(0, MixingSection(), ErasingSection()),
        data=ArrayData(catalog, world.device, 0, 1, False),
        plan=plan,
        num_classes=10,
        engine=trained,
        method=method,
        store=store,
        saver=Saver(config, world, sites, trained, store, Checkpoints(Path(path), 1), history),
        exports=Exports(config, Path(path), trained, sites, 10),
        history=history,
        status=None,
    )


def steps_of(
    world: World, batch: int, accumulation: int, clip: float, n: int, path: str
) -> tuple[list[list[float]], list[float]]:
    """Weights after each step of an epoch, and the losses that the guard agreed on."""
    trainer = trainer_of(
        world, network(), batch=batch, accumulation=accumulation, clip=clip, n=n, path=path
    )
    order_N = epoch_order(0, 0, n)
    weights, losses = [], []
    guard = Guard(world)
    trainer.engine.train()
    for step in range(trainer.plan.steps):
        trained = trainer.train_step(order_N, 0, step)
        guard.submit(False, False, trained.loss_B.sum(), absent=0)
        losses.append(guard.read().loss)
        flat = torch.cat([p.detach().flatten() for p in trainer.engine.model.parameters()])
        weights.append(flat.tolist())
    return weights, losses


def expected_steps(batch: int, clip: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Plain float64 SGD on whole global batches."""
    model = network().double()
    catalog = digits.load(None, False)
    data = ArrayData(catalog, torch.device("cpu"), 0, 1, False)
    order_N = epoch_order(0, 0, n)
    weights, losses = [], []
    for step in range(Plan(n, batch).steps):
        (micro,) = Plan(n, batch).micro_batches(order_N, 0, step, 0)
        whole = data.train_batch(micro)
        loss = nn.functional.cross_entropy(model(whole.images_BCHW.double()), whole.labels_B)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        factor = min(1.0, clip / float(norm)) if clip else 1.0
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(0.5 * factor * gradient)
        losses.append(loss.item())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).tolist())
    return np.array(weights), np.array(losses)


@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize(("batch", "n"), [(22, 100), (23, 100)])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)])
def test_the_gradient_is_that_of_the_whole_global_batch(
    pool, tmp_path, world, accumulation, batch, n, clip
):
    # Parts are uneven, micro-batches too, and the last step is short.
    want_weights, want_losses = expected_steps(batch, clip, n)
    results = pool(world).run(steps_of, batch, accumulation, clip, n, str(tmp_path))
    for weights, losses in results:
        np.testing.assert_allclose(weights, want_weights, rtol=0, atol=2e-6)
        np.testing.assert_allclose(losses, want_losses, rtol=1e-5)


def pskd_epochs(world: World, batch: int, accumulation: int, path: str) -> list[float]:
    """Three epochs of PS-KD by the trainer; weights at the end."""
    trainer = trainer_of(
        world,
        network(),
        batch=batch,
        accumulation=accumulation,
        path=path,
        recipe="digits-pskd",
    )
    for epoch in range(3):
        constants = trainer.method.begin_epoch(epoch, 3)
        assert trainer.train_epoch(epoch, 0, constants)
        trainer.store.begin_epoch(epoch + 1)
    return torch.cat([p.detach().flatten() for p in trainer.engine.model.parameters()]).tolist()


def expected_pskd(batch: int) -> tuple[list[float], np.ndarray]:
    """The same in float64, sample by sample, from the equations alone."""
    model = network().double()
    data = ArrayData(digits.load(None, False), torch.device("cpu"), 0, 1, False)
    past: dict[int, torch.Tensor] = {}
    for epoch in range(3):
        alpha = 0.8 * (epoch + 1) / 3
        order_N = epoch_order(0, epoch, 100)
        now = {}
        for step in range(Plan(100, batch).steps):
            (micro,) = Plan(100, batch).micro_batches(order_N, epoch, step, 0)
            whole = data.train_batch(micro)
            logits_BC = model(whole.images_BCHW.double())
            losses = []
            for i, z_C, y in zip(micro.ids_B.tolist(), logits_BC, whole.labels_B, strict=True):
                hard_C = torch.zeros(10, dtype=torch.float64)
                hard_C[y] = 1
                target_C = (1 - alpha) * hard_C + alpha * past.get(i, hard_C)
                losses.append(-(target_C * (z_C - z_C.logsumexp(0))).sum())
                now[i] = (z_C - z_C.logsumexp(0)).exp().detach()
            model.zero_grad()
            (sum(losses) / len(losses)).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.5 * parameter.grad)
        past = past | now
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return weights, torch.stack([past[i] for i in range(100)]).numpy()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 2)])
def test_pskd_trains_and_remembers_what_the_equations_say(pool, tmp_path, world, accumulation):
    want_weights, want_rows = expected_pskd(batch=23)
    for weights in pool(world).run(pskd_epochs, 23, accumulation, str(tmp_path)):
        np.testing.assert_allclose(weights, want_weights, rtol=0, atol=2e-5)
    rows = open_generation(tmp_path / "gen-000002")[np.arange(100)]
    np.testing.assert_allclose(rows, want_rows, rtol=0, atol=2e-5)


def fp16_epoch_with_overflow(world: World, path: str) -> tuple[bool, float, int]:
    """An epoch of PS-KD in fp16 of which the first updates overflow."""
    trainer = trainer_of(world, network(), batch=25, path=path, recipe="digits-pskd", engine="fp16")
    before = weights_sha256(trainer.engine.model)
    state = trainer.engine.state_dict()
    state["scaler"]["scale"] = 2.0**40
    trainer.engine.load_state_dict(state)
    constants = trainer.method.begin_epoch(0, 3)
    assert trainer.train_epoch(0, 0, constants)
    trainer.store.begin_epoch(1)
    skipped = before == weights_sha256(trainer.engine.model)
    return skipped, trainer.engine.state_dict()["scaler"]["scale"], trainer.history.samples


def test_a_skipped_fp16_update_still_counts_and_its_rows_are_remembered(pool, tmp_path):
    for skipped, scale, samples in pool(2).run(fp16_epoch_with_overflow, str(tmp_path)):
        assert skipped
        assert scale == 2.0**36  # halved in each of four steps
        assert samples == 100
    assert open_generation(tmp_path / "gen-000000")[np.arange(100)].shape == (100, 10)


def network_with_statistics(running_mean: float) -> nn.Module:
    """With BatchNorm buffers of this rank."""
    torch.manual_seed(5)
    norm = nn.BatchNorm1d(192)
    norm.running_mean.fill_(running_mean)
    return nn.Sequential(nn.Flatten(), norm, nn.Linear(192, 10))


def evaluate(world: World, path: str) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Measures of the sharded evaluation, and of all 101 logits at once with rank 0's buffers."""
    model = network_with_statistics(running_mean=float(world.rank))
    trainer = trainer_of(world, model, batch=20, path=path)
    sharded = trainer._evaluate(0)
    ((images_BCHW, labels_B),) = validation_batches(trainer.data, 0, 1, 1000)
    with torch.no_grad():
        whole = summarize(network_with_statistics(0.0).eval()(images_BCHW), labels_B)
    return sharded, whole


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_each_sample_once_and_uses_the_buffers_of_rank_0(pool, tmp_path, world):
    for sharded, whole in pool(world).run(evaluate, str(tmp_path)):
        assert sharded == pytest.approx(whole, rel=1e-5)


def evaluation_file(world: World, path: str) -> list[list[int]]:
    """Labels and ranks in evaluation.npz of 101 samples; what they should be; then, of a complete
    run that has lost the file and begins again.
    """
    model, found = network_with_statistics(running_mean=float(world.rank)), []
    for evaluated in (True, False):
        trainer = trainer_of(world, model, batch=20, path=path)
        trainer.history.lines.append({"epoch": 2})
        if evaluated:
            trainer._evaluate(2)
        trainer._complete()
        dist.barrier(group=world.control)
        with np.load(Path(path) / "evaluation.npz") as arrays:
            found.append(arrays["label"].tolist())
            found.append(arrays["rank"].tolist())
        dist.barrier(group=world.control)
        (Path(path) / "evaluation.npz").unlink(missing_ok=True)
    ((images_BCHW, labels_B),) = validation_batches(trainer.data, 0, 1, 1000)
    with torch.no_grad():
        records = per_sample(network_with_statistics(0.0).eval()(images_BCHW), labels_B)
    return [*found, records.label_N.tolist(), records.rank_N.tolist()]


@pytest.mark.parametrize("world", [2, 3])
def test_the_evaluation_file_is_in_the_order_of_samples_on_any_number_of_ranks(
    pool, tmp_path, world
):
    for first, ranks, again, ranks_again, labels, expected in pool(world).run(
        evaluation_file, str(tmp_path)
    ):
        assert first == again == labels
        assert ranks == ranks_again == expected


def evaluated_epochs(world: World, every: int, path: str) -> list[bool]:
    """Which of three epochs are evaluated."""
    trainer = trainer_of(world, network_with_statistics(0.0), batch=20, path=path)
    section = replace(trainer.config.evaluation, every=every)
    trainer.config = replace(trainer.config, evaluation=section)
    found = [trainer._evaluate(epoch) for epoch in range(3)]
    assert all(set(measures) == set(MEASURES) for measures in found)
    return [measures["nll"] is not None for measures in found]


@pytest.mark.parametrize(
    ("every", "expected"),
    [(1, [True, True, True]), (2, [False, True, True]), (5, [False, False, True])],
)
def test_every_so_many_epochs_are_evaluated_and_the_last(pool, tmp_path, every, expected):
    assert pool(2).run(evaluated_epochs, every, str(tmp_path)) == [expected] * 2


def verdict(world: World, stopping: int, saving: int, losses: list[float]) -> dict:
    """Of a step in which one rank was asked to stop, one found that it is time to save, and
    rank 1 met three images that it could not decode.
    """
    guard = Guard(world)
    loss = torch.tensor(losses[world.rank])
    guard.submit(world.rank == stopping, world.rank == saving, loss, absent=3 * world.rank)
    return guard.read()._asdict()


def test_all_ranks_learn_of_requests_and_of_a_bad_loss(pool):
    for stopping, saving in ((1, -1), (-1, 0), (0, 0), (-1, -1)):
        for found in pool(2).run(verdict, stopping, saving, [1.0, 2.0]):
            asked = {"stop": stopping >= 0, "save": saving >= 0}
            assert found == {**asked, "bad": False, "absent": 3, "loss": 1.5}
    for losses in ([1.0, float("nan")], [float("-inf"), float("inf")]):
        for found in pool(2).run(verdict, -1, -1, losses):
            assert found["bad"] and not found["stop"] and not found["save"]


def compare_configurations(world: World, flag: str) -> str:
    """What a rank hears when the last rank was given one more flag, `flag`."""
    flags = ["--recipe", "fashion-mnist-2k-pskd"] + [flag] * (world.rank == world.size - 1)
    try:
        job.compare_configurations(command_line.load(flags), world)
    except PskdError as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_ranks_with_different_command_lines_are_refused_by_key(pool):
    for message in pool(2).run(compare_configurations, "--optimizer.lr=0.3"):
        assert message.startswith("AgreedError: rank 1 has other values than rank 0")
        assert "optimizer.lr" in message
    assert pool(2).run(compare_configurations, "--data.root=/node/local") == ["fine"] * 2


def weights_not_finite(world: World, path: str) -> tuple[str, bool]:
    """What saving says of a weight that became nan, and whether a checkpoint was written."""
    trainer = trainer_of(world, network(), batch=20, path=path)
    checkpoints = trainer.saver._checkpoints
    checkpoints.register("engine", trainer.engine)
    if world.rank == 1:
        with torch.no_grad():
            next(trainer.engine.model.parameters())[0, 0] = float("nan")
    try:
        trainer._save(Position(0, 3))
    except PskdError as error:
        return str(error), checkpoints.latest() is not None
    return "saved", True


def test_weights_that_are_not_finite_are_never_saved(pool, tmp_path):
    for message, written in pool(2).run(weights_not_finite, str(tmp_path)):
        assert "weight 0.weight is not finite" in message
        assert not written


def fail_on(world: World, failing: list[int]) -> str:
    """What a rank hears when some ranks fail in a block that all run."""
    try:
        with world.together():
            if world.rank in failing:
                raise PskdError(f"told by rank {world.rank}")
    except PskdError as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def test_what_fails_on_one_rank_fails_on_all_with_one_message(pool):
    assert pool(3).run(fail_on, [1, 2]) == ["AgreedError: told by rank 1"] * 3
    assert pool(3).run(fail_on, []) == ["fine"] * 3


def damaged_on(world: World, damaged: list[int], failing: list[int]) -> tuple[str, str]:
    """What a rank hears when some ranks find damage, and others another failure."""
    try:
        with world.together():
            if world.rank in damaged:
                raise DamagedError(f"file of rank {world.rank}.", "Mend it.")
            if world.rank in failing:
                raise PskdError(f"told by rank {world.rank}")
    except AgreedDamage as damage:
        return damage.what, str(damage)
    except AgreedError as error:
        return "no damage", str(error)
    return "fine", ""


def test_damage_is_told_apart_from_other_failures_which_come_first(pool):
    damage = ("file of rank 1.", "file of rank 1. Mend it.")
    assert pool(3).run(damaged_on, [1, 2], []) == [damage] * 3
    assert pool(3).run(damaged_on, [0, 1], [2]) == [("no damage", "told by rank 2")] * 3
