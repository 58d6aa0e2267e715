"""Another number of ranks, another host, another path: the same run goes on.

Letters: N samples, R ranks.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pskd.order import epoch_order
from pskd.store import open_generation
from pskd.store.format import Entry
from pskd.store.segment import SegmentReader
from pskd.weights import read_weights
from tests import forked
from tests.launches import cut_back, metrics, result, status, train, wait_for_no_trace
from tests.refusals import assert_refused
from tests.system import needs_root

N, BATCH, EPOCHS, STEPS = 256, 32, 3, 8
FLAGS = (
    "--data.name=digits",
    f"--data.limit={N}",
    "--method.name=pskd",
    f"--train.batch_size={BATCH}",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[]",
    "--optimizer.lr=0.02",
    "--store.encoding=float32",
    "--checkpoint.every_steps=3",
    "--checkpoint.keep=100",
    "--run.threads=1",
)


def complete(run_dir, *flags, processes):
    job = forked.train(run_dir, *flags, processes=processes)
    assert job.process.returncode == 0, job.output()
    return job.output()


def segments(run_dir, epoch):
    """start -> rank -> segment of a finished generation."""
    manifest = json.loads((run_dir / f"store/gen-{epoch:06d}/manifest.json").read_text())
    found = {}
    for entry in manifest["content"]["entries"]:
        segment = SegmentReader(run_dir / "store" / entry[0], Entry(*entry))
        found.setdefault(segment.header.start, {})[segment.header.rank] = segment
    return found


def ids_by_step(run_dir, epoch):
    """The ids of each step, from the chunks of all ranks of the start that trained it."""
    steps = []
    for _, ranks in sorted(segments(run_dir, epoch).items()):
        chunks = [[ids for ids, _ in ranks[rank].ids_and_units()] for rank in sorted(ranks)]
        steps += [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
    return steps


def rows_of(run_dir, epoch):
    return open_generation(run_dir / f"store/gen-{epoch:06d}")[range(N)]


def one_to_two_to_four_to_one(tmp_path, model):
    """The final run directory; checks ids and rows at every change of the number of ranks."""
    flags = (*FLAGS, f"--model.name={model}")
    run_dir = tmp_path / "run"
    complete(run_dir, *flags, processes=1)
    shutil.copytree(run_dir, tmp_path / "undisturbed")
    for epoch, before, ranks in ((0, 1, 2), (1, 2, 4), (2, 4, 1)):
        old = {e: rows_of(run_dir, e) for e in range(epoch + 1)}
        cut_back(run_dir, f"{epoch:06d}-00000003")
        output = complete(run_dir, processes=ranks)
        assert f"world was {before}, now {ranks}" in output
        trained = epoch_order(0, epoch, N)[: 3 * BATCH]
        assert torch.equal(rows_of(run_dir, epoch)[trained], old[epoch][trained])
        for earlier in range(epoch):
            assert torch.equal(rows_of(run_dir, earlier), old[earlier])
    worlds = {e: {len(r) for r in segments(run_dir, e).values()} for e in range(EPOCHS)}
    assert worlds == {0: {1, 2}, 1: {2, 4}, 2: {4, 1}}
    for epoch in range(EPOCHS):
        order = epoch_order(0, epoch, N)
        steps = ids_by_step(run_dir, epoch)
        assert len(steps) == STEPS
        for step, ids in enumerate(steps):
            assert ids.tolist() == order[step * BATCH : (step + 1) * BATCH].tolist()
    assert [line["epoch"] for line in metrics(run_dir)] == list(range(EPOCHS))
    wait_for_no_trace(run_dir)
    return run_dir


def test_without_batchnorm_the_weights_differ_by_rounding_only(tmp_path):
    """A batch's gradient is a sum over ranks: in another order, it rounds differently."""
    run_dir = one_to_two_to_four_to_one(tmp_path, "plain")
    found, want = (read_weights(path) for path in (run_dir, tmp_path / "undisturbed"))
    for name, tensor in want.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5), name
    assert result(run_dir)["weights_sha256"] != result(tmp_path / "undisturbed")["weights_sha256"]
    lines, expected = metrics(run_dir), metrics(tmp_path / "undisturbed")
    for line, other in zip(lines, expected, strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)


@pytest.mark.slow
def test_with_batchnorm_ids_and_rows_are_exact_all_the_same(tmp_path):
    """Each rank normalises its own part of the batch, so weights differ by more than rounding."""
    run_dir = one_to_two_to_four_to_one(tmp_path, "preact_resnet8_w16")
    assert status(run_dir)["state"] == "complete"


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 4)])
@pytest.mark.slow
def test_zero_shards_are_resumed_by_as_many_ranks_only(tmp_path, stage, ranks):
    run_dir = tmp_path / "run"
    flags = (*FLAGS, "--train.epochs=1", f"--deepspeed_config=fp32-zero{stage}")
    complete(run_dir, *flags, "--model.name=plain", processes=2)
    job = forked.train(run_dir, processes=ranks)
    assert_refused(job, f"shards of 2 ranks, this job has {ranks}. Start 2 ranks")
    assert status(run_dir)["state"] == "failed"
    complete(run_dir, processes=2)
    assert status(run_dir)["state"] == "complete"


def test_saved_by_the_clock_a_run_has_the_same_bits(tmp_path):
    """All ranks save after the same step, which rank 0's clock decides."""
    flags = (*FLAGS, "--model.name=preact_resnet8_w16", "--checkpoint.every_steps=0")
    complete(tmp_path / "reference", *flags, processes=2)
    run_dir = tmp_path / "run"
    complete(run_dir, *flags, "--checkpoint.every_minutes=0.0003", processes=2)
    inside = [p.name for p in (run_dir / "checkpoints").glob("[0-9]*") if not p.match("*-00000000")]
    assert inside
    assert not list((tmp_path / "reference/checkpoints").glob("*-*[1-9]"))
    wanted = result(tmp_path / "reference")["weights_sha256"]
    assert result(run_dir)["weights_sha256"] == wanted
    cut_back(run_dir, sorted(inside)[len(inside) // 2])
    complete(run_dir, processes=2)
    assert result(run_dir)["weights_sha256"] == wanted


@needs_root
def test_moved_to_another_path_and_host_it_goes_on(tmp_path):
    flags = (*FLAGS, "--model.name=preact_resnet8_w16")
    complete(tmp_path / "run", *flags, processes=None)
    wanted = result(tmp_path / "run")["weights_sha256"]
    cut_back(tmp_path / "run", "000001-00000003")
    moved = tmp_path / "elsewhere" / "under another name"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    prefix = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$0" "$@"']
    job = train(moved, processes=None, prefix=prefix)
    assert job.process.returncode == 0, job.output()
    assert "resuming" in job.output()
    assert result(moved)["weights_sha256"] == wanted
    assert status(moved)["host"] == "elsewhere"
    assert "elsewhere" in (moved / "lock").read_text()
    assert str(tmp_path / "run") not in "".join(
        path.read_text() for path in Path(moved).glob("*.json") if path.name != "env.json"
    )
