"""The store and the methods in somebody else's loop: plain PyTorch, DDP, the README's examples.

Letters: N samples, B of a batch, C classes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pskd import models
from pskd.cli import main
from pskd.errors import PskdError
from pskd.methods.pskd import (
    alpha_at,
    refined_cross_entropy,
    soft_cross_entropy,
    soft_targets,
)
from pskd.order import epoch_order
from pskd.store import open_for_training, open_generation
from pskd.weights import weights_sha256
from tests import forked
from tests.launches import metrics, result
from tests.own_stores import assert_whole, remember
from tests.photos import make_folder

ROOT = Path(__file__).parents[1]
EPOCHS, N, C = 3, 253, 10  # an odd last batch
ALL = np.arange(N)


# --- the trainer's loop, and a plain one in its order ----------------------------------------


def digits(n=N):
    """Images (N, 3, 8, 8), labels, ids: as the recipe has them, by other means."""
    data = load_digits()
    pixels = torch.from_numpy(np.rint(data.images[:n] * (255 / 16)).astype(np.float32))
    scaled = (pixels - torch.tensor(0.3054) * 255) / (torch.tensor(0.3753) * 255)
    images = scaled[:, None].expand(-1, 3, -1, -1).contiguous()
    return TensorDataset(images, torch.from_numpy(data.target[:n]), torch.arange(n))


def in_our_order(dataset, epoch, batch_size=64):
    order = epoch_order(3, epoch, len(dataset)).tolist()
    return DataLoader(
        dataset, batch_sampler=[order[i : i + batch_size] for i in range(0, N, batch_size)]
    )


def plain_loop(store):
    """Weights, and for each epoch the mean loss and the rows of all samples."""
    torch.manual_seed(3)
    model = models.build("preact_resnet8_w16", C)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    dataset, losses, rows = digits(), [], []
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1 ** (epoch >= 2)
        store.begin_epoch(epoch)
        total = 0.0
        for images_BCHW, labels_B, ids_B in in_our_order(dataset, epoch):
            past_BC, present_B = store.past(ids_B)
            loss_B, probs_BC = refined_cross_entropy(
                model(images_BCHW), labels_B, past_BC, present_B, alpha_at(epoch, EPOCHS, 0.8)
            )
            loss = (loss_B * (1 / len(ids_B))).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            store.remember(ids_B, probs_BC)
            total += loss.item() * len(ids_B)
        store.end_epoch()
        losses.append(total / N)
        rows.append(open_generation(store.directory / f"gen-{epoch:06d}")[ALL])
    return model, losses, rows


@pytest.fixture
def one_thread():
    """As the trainer's: the number of threads changes the last bits of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_plain_loop_is_the_trainer_to_the_bit(tmp_path, one_thread):
    job = forked.train(
        tmp_path / "run",
        "--recipe=digits-pskd",
        "--run.threads=1",
        "--train.seed=3",
        "--data.crop_padding=0",
        f"--data.limit={N}",
        f"--train.epochs={EPOCHS}",
        "--schedule.milestones=[2]",
        "--checkpoint.keep=9",
        "--store.encoding=float32",
        processes=None,
    )
    assert job.process.returncode == 0, job.output()
    with open_for_training(tmp_path / "own", n=N, classes=C, encoding="float32") as store:
        model, losses, rows = plain_loop(store)
    assert losses[-1] < losses[0]
    assert losses == [line["train_loss"] for line in metrics(tmp_path / "run")]
    for epoch, rows_NC in enumerate(rows):
        theirs_NC = open_generation(tmp_path / f"run/store/gen-{epoch:06d}")[ALL]
        assert torch.equal(rows_NC, theirs_NC)
    assert weights_sha256(model) == result(tmp_path / "run")["weights_sha256"]
    for directory in ("run", "run/store", "own"):
        assert_whole(tmp_path / directory)


# --- several ranks ---------------------------------------------------------------------------


def train_mlp(directory, rank, world, epochs=EPOCHS):
    """A loop in our order, over the ranks: each takes every world-th sample of a batch."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, C))
    if world > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dataset, losses = digits(252), []  # a multiple of 2: equal shares
    with open_for_training(directory, n=252, classes=C, encoding="float32") as store:
        for epoch in range(epochs):
            store.begin_epoch(epoch)
            order = epoch_order(0, epoch, 252)
            for first in range(0, 252, 36):
                images_BCHW, labels_B, ids_B = dataset[order[first : first + 36][rank::world]]
                past_BC, present_B = store.past(ids_B)
                loss_B, probs_BC = refined_cross_entropy(
                    model(images_BCHW), labels_B, past_BC, present_B, alpha_at(epoch, epochs, 0.8)
                )
                optimizer.zero_grad()
                loss_B.mean().backward()
                optimizer.step()
                store.remember(ids_B, probs_BC)
                losses.append(loss_B.mean().item())
            store.end_epoch()
    return losses


def ddp(here, directory):
    return train_mlp(directory, here.rank, here.size)


def test_two_ranks_are_as_one(tmp_path, pool):
    both = np.array(pool(2).run(ddp, tmp_path / "two"))
    alone = train_mlp(tmp_path / "one", 0, 1)
    # Sums of gradients in another order: the last bits of float32, grown over 21 steps.
    np.testing.assert_allclose(both.mean(axis=0), alone, rtol=1e-4)
    two, one = (open_generation(tmp_path / d / "gen-000002") for d in ("two", "one"))
    assert [e.rows for e in two.entries] == [126, 126]
    torch.testing.assert_close(two[range(252)], one[range(252)], rtol=0, atol=1e-4)
    assert (two[range(252)].amax(dim=1) > 0.3).any()


def padded_epoch(here, directory):
    """Of 5 samples DistributedSampler gives each of two ranks 3: which rows it has remembered."""
    sampler = DistributedSampler(range(5), shuffle=False)
    with open_for_training(directory, n=5, classes=2, encoding="float32") as store:
        store.begin_epoch(0)
        for step, i in enumerate(sampler):
            p = 0.1 * (1 + step + 3 * here.rank)
            store.remember(torch.tensor([i]), torch.tensor([[p, 1 - p]]))
        store.end_epoch()
        seen = open_generation(store.directory / "gen-000000")[range(5)]
    return list(sampler), seen[:, 0].tolist()


def test_of_a_sample_that_pads_the_last_batch_the_highest_rank_counts(tmp_path, pool):
    (first, seen), (second, also_seen) = pool(2).run(padded_epoch, tmp_path)
    assert (first, second) == ([0, 2, 4], [1, 3, 0])
    assert seen == also_seen == pytest.approx([0.6, 0.4, 0.2, 0.5, 0.3])


def test_of_a_sample_in_two_steps_or_twice_in_one_the_last_row_counts(tmp_path):
    with open_for_training(tmp_path, n=2, classes=2, encoding="float32") as store:
        store.begin_epoch(0)
        for p in (0.1, 0.2):
            ids_B = torch.tensor([0, 1, 0])
            store.remember(ids_B, torch.tensor([[p, 1 - p], [0.5, 0.5], [1 - p, p]]))
        store.end_epoch()
    seen = open_generation(tmp_path / "gen-000000")[[0, 1]]
    assert seen.flatten().tolist() == pytest.approx([0.8, 0.2, 0.5, 0.5])


def open_elsewhere(here, directory):
    with pytest.raises(PskdError) as refused:
        open_for_training(directory / str(here.rank), n=5, classes=2)
    return str(refused.value)


def open_with_other_numbers(here, directory):
    with pytest.raises(PskdError) as refused:
        open_for_training(directory, n=5 + here.rank, classes=2)
    return str(refused.value)


def begin_other_epochs(here, directory):
    with open_for_training(directory, n=5, classes=2) as store:
        with pytest.raises(PskdError) as refused:
            store.begin_epoch(here.rank)
        store.begin_epoch(0)
    return str(refused.value)


@pytest.mark.parametrize(
    ("misuse", "parts"),
    [
        (open_elsewhere, ("rank 1 does not see", "/1 ", "share")),
        (open_with_other_numbers, ("n 5 and not 6",)),
        (begin_other_epochs, ("[0, 1]",)),
    ],
)
def test_ranks_that_do_not_agree_are_told_on_every_rank(tmp_path, pool, misuse, parts):
    messages = pool(2).run(misuse, tmp_path)
    assert messages[0] == messages[1]
    for part in parts:
        assert part in messages[0]


def test_a_launch_without_init_process_group_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PskdError, match="init_process_group"):
        open_for_training(tmp_path, n=5, classes=2)


# --- the loss, the imports, the README -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_soft_targets(dtype):
    generator = torch.Generator().manual_seed(0)
    logits_BC = (3 * torch.randn(7, C, generator=generator)).to(dtype).requires_grad_()
    labels_B = torch.arange(7)
    past_BC = torch.softmax(torch.randn(7, C, generator=generator), dim=1)
    present_B = torch.tensor([True] * 4 + [False] * 3)
    past_BC[~present_B] = 0.0
    with torch.autocast("cpu", torch.bfloat16):  # changes nothing
        loss_B, probs_BC = refined_cross_entropy(logits_BC, labels_B, past_BC, present_B, 0.6)
    (gradient_BC,) = torch.autograd.grad(loss_B.mean(), logits_BC)
    one_hot_BC = torch.eye(C)[labels_B]
    target_BC = torch.where(present_B[:, None], soft_targets(labels_B, past_BC, 0.6), one_hot_BC)
    want = soft_cross_entropy(logits_BC.float(), target_BC)
    (want_BC,) = torch.autograd.grad(want, logits_BC)
    torch.testing.assert_close(loss_B.mean(), want)
    torch.testing.assert_close(gradient_BC, want_BC)
    assert torch.equal(probs_BC, logits_BC.float().softmax(dim=1))
    assert not probs_BC.requires_grad


def test_the_library_imports_neither_deepspeed_nor_dali(tmp_path):
    program = (
        "import sys; import pskd.methods.pskd; from pskd.store import open_for_training as o;"
        "o(sys.argv[1], n=2, classes=2).close();"
        "print({m.partition('.')[0] for m in sys.modules} & {'deepspeed', 'nvidia', 'timm'})"
    )
    assert script("-c", program, "past", cwd=tmp_path).stdout == "set()\n"


def script(*arguments, cwd, **environment):
    """Run Python on this checkout, without the network."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def example(directory, uses):
    """The README's block of Python that uses a package, as a file."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if uses in block]
    path = directory / "example.py"
    path.write_text(block)
    return path


def assert_falls(output, what, epochs):
    values = re.findall(rf"^epoch \d+: {what} (\S+)( %)?$", output, re.MULTILINE)
    assert len(values) == epochs
    assert float(values[-1][0]) < 0.9 * float(values[0][0])


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("launch", [(), TORCHRUN])
def test_the_example_of_the_readme_runs_as_it_stands(tmp_path, launch):
    done = script(*launch, example(tmp_path, uses="load_digits"), cwd=tmp_path)
    assert_falls(done.stdout, "loss", epochs=5)
    if launch:
        assert_whole(tmp_path / "past")
    else:
        verified = script("-m", "pskd.cli", "store", "verify", "past", cwd=tmp_path).stdout
        assert re.findall("^ok", verified, re.MULTILINE) == ["ok"] * 4
    rows_NC = open_generation(tmp_path / "past/gen-000004")[range(1797)]
    labels_N = torch.from_numpy(load_digits().target)
    assert (rows_NC.argmax(dim=1) == labels_N).float().mean() > 0.9


def test_the_example_with_timm_runs_as_it_stands(tmp_path):
    make_folder(tmp_path / "photos/train", classes=10, per_class=49, median_side=48)
    done = script(example(tmp_path, uses="timm"), cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert_falls(done.stdout, "training error", epochs=3)
    assert_whole(tmp_path / "past-of-timm")
    last = open_generation(tmp_path / "past-of-timm/gen-000002")
    assert last.n == 490
    assert last.present_N.sum() >= 480  # timm drops a short last batch


# --- pskd store, wherever a store is ---------------------------------------------------------


def test_pskd_store_finds_a_loop_s_directory_by_any_name(tmp_path, capsys, monkeypatch):
    for name in ("past", "store", "a/store", "checkpoints"):
        with open_for_training(tmp_path / name, n=6, classes=4) as store:
            for epoch in range(2):
                store.begin_epoch(epoch)
                remember(store, [1, 2, 3])
                store.end_epoch()
            store.retain([store.state_dict()])
        assert main(["store", "info", str(tmp_path / name)]) == 0
        lines = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:]]
        assert lines == [
            ["1", "manifest", "3/6", "4"],
            ["2", "manifest", "3/6", "4"],
            ["2", "state", "1", "3/6"],
        ]
    monkeypatch.chdir(tmp_path / "past")
    assert_whole(".")
    with next(Path.cwd().rglob("seg-*")).open("r+b") as segment:
        segment.seek(4096 + 70)
        segment.write(b"\xff")
    assert main(["store", "verify", "."]) == 1
    assert "DAMAGED" in capsys.readouterr().out


def test_pskd_store_says_what_it_looks_for(tmp_path, capsys):
    assert main(["store", "verify", str(tmp_path)]) == 1
    assert "open_for_training" in capsys.readouterr().err
