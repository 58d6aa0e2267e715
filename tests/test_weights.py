"""Weights: their average, those that are read from a file or a run, and a teacher's."""

import io

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pskd import command_line, deepspeed_config, models
from pskd.data import digits
from pskd.data.arrays import ArrayData
from pskd.data.interface import validation_batches
from pskd.engine import Engine
from pskd.errors import PskdError
from pskd.metrics import summarize
from pskd.weights import export_weights, read_weights
from tests.digits_runs import (
    DIGITS,
    EMA,
    EPOCHS,
    METHODS,
    NAME,
    complete,
    kill_in_mid_epoch,
    last_state,
    refused,
    same,
    state_of,
)
from tests.launches import metrics, result, status

# --- averaged weights ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(forks, tmp_path_factory):
    """A run that evaluates and exports the average, and one alike that does not."""
    root = tmp_path_factory.mktemp("averaged")
    flags = (*DIGITS, "--checkpoint.export_every=1", "--checkpoint.keep=100")
    complete(forks.start, root / "ema", *flags, *EMA)
    complete(forks.start, root / "training", *flags, "--model.ema_decay=0.9")
    return root


def evaluated(weights):
    """Measures of the digits' validation split, by plain torch."""
    network = models.build(NAME, 10)
    network.load_state_dict(weights)
    data = ArrayData(digits.load(None, False), torch.device("cpu"), 0, 0, False)
    ((images_BCHW, labels_B),) = validation_batches(data, 0, 1, 1000)
    with torch.no_grad():
        return summarize(network.eval()(images_BCHW), labels_B)


@pytest.mark.parametrize("which", ["ema", "training"])
def test_the_weights_that_are_evaluated_are_the_ones_exported(averaged, which):
    run_dir = averaged / which
    for epoch, line in enumerate(metrics(run_dir)):
        export = torch.load(run_dir / "models" / f"checkpoint_{epoch + 1}.pth", weights_only=True)
        path = run_dir / "checkpoints" / f"{epoch + 1:06d}-00000000" / "state.pt"
        engine = torch.load(path, weights_only=True)["engine"]
        assert same(export["net"], dict(engine["average" if which == "ema" else "model"]))
        assert not same(dict(engine["average"]), dict(engine["model"]))
        found = evaluated(export["net"])
        for name in ("top1_error", "nll", "ece"):
            assert line[name] == pytest.approx(found[name], rel=1e-4)


def test_the_average_changes_what_is_measured_and_not_what_is_trained(averaged):
    ema, training = averaged / "ema", averaged / "training"
    assert result(ema)["weights_sha256"] == result(training)["weights_sha256"]
    assert same(last_state(ema)["engine"], last_state(training)["engine"])
    for one, other in zip(metrics(ema), metrics(training), strict=True):
        assert one["train_loss"] == other["train_loss"]
        assert one["nll"] != other["nll"]


def test_an_export_after_an_epoch_without_evaluation_has_that_epochs_statistics(forks, tmp_path):
    run_dir = tmp_path / "run"
    flags = ("--checkpoint.export_every=1", "--checkpoint.keep=100", "--evaluation.every=2")
    complete(forks.start, run_dir, *DIGITS, *EMA, *flags)
    state = torch.load(run_dir / "checkpoints" / "000001-00000000" / "state.pt", weights_only=True)
    export = torch.load(run_dir / "models" / "checkpoint_1.pth", weights_only=True)["net"]
    statistics = [name for name in export if "running" in name]
    assert statistics
    for name in statistics:
        assert torch.equal(export[name], state["engine"]["model"][name]), name


def average_of_steps(world, accumulation, steps):
    """Weights after each optimizer step, the average after the last, and buffers of both."""
    config = command_line.load(["--optimizer.lr=0.3"])
    settings = deepspeed_config.complete(
        "fp32",
        batch=8 * world.size * accumulation,
        world=world.size,
        accumulation=accumulation,
        clip_norm=0.0,
    )
    torch.manual_seed(1)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3)
    )
    start = [p.detach().clone() for p in network.parameters()]
    engine = Engine(
        network,
        config.optimizer,
        config.engine,
        settings,
        world.timeout,
        0.8,
        evaluate_average=True,
    )
    engine.train()
    history = [start]
    generator = torch.Generator().manual_seed(world.rank)
    for _ in range(steps):
        for _ in range(accumulation):
            images = torch.randn(8, 3, 2, 2, generator=generator)
            labels = torch.randint(0, 3, (8,), generator=generator)
            engine.backward_and_step(F.cross_entropy(engine.forward(images), labels), lr=0.3)
        history.append([p.detach().clone() for p in engine.model.parameters()])
    engine.sync_buffers()
    average = [p.detach().numpy() for p in engine.evaluated.parameters()]
    buffers = [[b.numpy() for b in m.buffers()] for m in (engine.evaluated, engine.model)]
    training = engine.evaluated.training, engine.model.training
    return [[w.numpy() for w in weights] for weights in history], average, buffers, training


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 3), (2, 2)])
def test_the_average_is_that_of_the_weights_after_every_optimizer_step(pool, world, accumulation):
    for history, average, buffers, training in pool(world).run(average_of_steps, accumulation, 7):
        expected = [w.astype(np.float64) for w in history[0]]
        for weights in history[1:]:
            expected = [0.8 * a + 0.2 * w for a, w in zip(expected, weights, strict=True)]
        for found, wanted in zip(average, expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        for mine, trained in zip(*buffers, strict=True):
            np.testing.assert_array_equal(mine, trained)
        assert training == (False, True)


# --- what a teacher's weights may come as --------------------------------------------------------


@pytest.mark.parametrize("wrapping", ["plain", "net", "model", "state_dict", "module.", "export"])
def test_weights_are_read_from_what_people_have(tmp_path, wrapping):
    weights, path = state_of(), tmp_path / "weights.pth"
    match wrapping:
        case "plain":
            torch.save(weights, path)
        case "module.":
            torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
        case "export":
            network = models.build(NAME, 10)
            network.load_state_dict(weights)
            export_weights(path, network, {"model": NAME, "num_classes": 10, "epoch": 3})
        case _:
            torch.save({wrapping: weights, "epoch": 3}, path)
    assert same(read_weights(path), dict(weights))


def test_weights_are_read_from_runs_and_their_checkpoints(averaged):
    run_dir = averaged / "ema"
    last = torch.load(run_dir / "models" / f"checkpoint_{EPOCHS}.pth", weights_only=True)["net"]
    assert same(read_weights(run_dir), last)
    assert same(read_weights(run_dir / "models" / f"checkpoint_{EPOCHS}.pth"), last)
    checkpoint = run_dir / "checkpoints" / "000002-00000000"
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    assert same(read_weights(checkpoint), dict(state["engine"]["model"]))
    assert same(read_weights(checkpoint / "state.pt"), dict(state["engine"]["model"]))


def test_what_holds_no_weights_is_refused(tmp_path):
    contents = {
        "empty": b"",
        "cut off": _saved({"net": state_of()})[:500],
        "a list": _saved([1, 2]),
        "an empty dict": _saved({}),
        "numbers": _saved({"net": {"lr": 0.1}}),
        "an object": _saved({"net": np.zeros(3)}),
    }
    for what, content in contents.items():
        path = tmp_path / f"{what}.pth"
        path.write_bytes(content)
        with pytest.raises(PskdError, match=r"holds no weights"):
            read_weights(path)
    for missing in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(PskdError, match=r"no such file\. Name an export"):
            read_weights(missing)


def _saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "part"), [("{", r"result\.json cannot be read"), ("[]", r"holds no weights")]
)
def test_a_damaged_result_is_named(tmp_path, content, part):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(PskdError, match=part):
        read_weights(tmp_path)


@pytest.mark.parametrize("text", ["Quick notes\n", "Results of run 3\n", "bn1.weight: 64\n"])
def test_a_text_is_no_file_of_weights(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(PskdError, match=r"holds no weights"):
        read_weights(path)


# --- refusals ------------------------------------------------------------------------------------


def test_a_teacher_that_does_not_fit_is_refused_with_one_message(forks, tmp_path):
    incomplete = tmp_path / "stopped-run"
    (incomplete / "checkpoints").mkdir(parents=True)
    files = {
        "architecture": _saved(state_of("preact_resnet14_w24")),
        "classes": _saved({"net": state_of(classes=8)}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    expected = {
        "architecture": f"The teacher must be a {NAME} of 10 classes.",
        "classes": "linear.weight (8, 64), not (10, 64)",
        "missing": "no such file",
        "stopped-run": "no such file. Name an export, a complete run",
    }
    for name, message in expected.items():
        flags = (*DIGITS, *METHODS["tfkd_self"], f"--method.teacher={tmp_path / name}")
        found = refused(forks.start, tmp_path / f"run-{name}", *flags)
        assert message in found and str(tmp_path / name) in found, found
        assert status(tmp_path / f"run-{name}")["state"] == "failed"


def test_a_teacher_that_changed_between_two_starts_is_refused(forks, tmp_path):
    path, run_dir = tmp_path / "teacher.pth", tmp_path / "run"
    torch.save(state_of(), path)
    flags = (*DIGITS, *METHODS["tfkd_self"], f"--method.teacher={path}")
    kill_in_mid_epoch(forks.start, run_dir, *flags)
    torch.save(state_of(seed=8), path)
    message = refused(forks.start, run_dir)
    assert f"method.teacher {path} holds other weights than when the run began" in message
    torch.save({"net": state_of()}, path)  # wrapped otherwise, but the same weights
    complete(forks.start, run_dir)
