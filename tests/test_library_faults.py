"""The store in somebody else's loop: kills, and misuse. N samples, B of a batch, C classes."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from pskd.errors import PskdError
from pskd.store import open_for_training, open_generation
from tests import loops
from tests.own_stores import assert_whole, remember
from tests.system import processes

# --- kills -----------------------------------------------------------------------------------


def run(*arguments, **options):
    process = processes.Process(target=loops.made_loop, args=arguments, kwargs=options)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Rows of epoch 4 of 5."""
    path = tmp_path_factory.mktemp("undisturbed")
    assert run(path / "past", path / "weights", 5) == 0
    return open_generation(path / "past/gen-000004")[range(12)]


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("where", ["begun", 1, "ended", "saved"])
def test_killed_anywhere_and_started_again(tmp_path, undisturbed, epoch, where, every_step):
    past, weights = tmp_path / "past", tmp_path / "weights"
    killed = run(past, weights, 5, die=(epoch, where), every_step=every_step)
    assert killed == -signal.SIGKILL
    assert run(past, weights, 5, every_step=every_step) == 0
    assert torch.equal(open_generation(past / "gen-000004")[range(12)], undisturbed)
    assert_whole(past)
    assert sorted(p.name for p in past.glob("gen-*")) == ["gen-000003", "gen-000004"]


def test_killed_at_every_turn(tmp_path, undisturbed):
    past, weights = tmp_path / "past", tmp_path / "weights"
    for die in ((0, 0), (0, "ended"), (1, 2), (1, 2), (1, "ended"), (2, "begun"), (4, "ended")):
        assert run(past, weights, 5, die=die) == -signal.SIGKILL
    assert run(past, weights, 5) == 0
    assert torch.equal(open_generation(past / "gen-000004")[range(12)], undisturbed)
    assert len(list(past.rglob("seg-*"))) == 2


def test_an_older_checkpoint_that_is_retained_can_be_loaded_after_restarts(tmp_path):
    states = []
    for start in range(3):  # two epochs each, with a checkpoint in the middle of the second
        with open_for_training(tmp_path, n=12, classes=4) as store:
            if start:
                store.load_state_dict(states[-1])
            for epoch in (2 * start, 2 * start + 1):
                store.begin_epoch(epoch)
                for first in (0, 6):
                    remember(store, range(first, first + 6), p=0.1 + epoch / 20 + first / 60)
                    if first == 0 and epoch % 2:
                        store.commit()
                        states.append(store.state_dict())
                        store.retain(states[:1])
                store.end_epoch()
            states.append(store.state_dict())
    assert_whole(tmp_path)
    with open_for_training(tmp_path, n=12, classes=4) as store:
        store.load_state_dict(states[0])
        store.begin_epoch(1)
        remember(store, range(6, 12), p=0.9)
        store.end_epoch()
        rows_NC = open_generation(tmp_path / "gen-000001")[range(12)]
    assert rows_NC[:, 0].tolist() == pytest.approx([0.15] * 6 + [0.9] * 6, abs=1e-3)
    assert_whole(tmp_path)


def test_a_generation_of_which_a_state_keeps_a_part_counts_as_finished_no_more(tmp_path):
    with open_for_training(tmp_path, n=12, classes=4) as store:
        store.begin_epoch(0)
        remember(store, range(6))
        store.commit()
        state = store.state_dict()
        store.retain([state])
    with open_for_training(tmp_path, n=12, classes=4) as store:
        store.load_state_dict(state)
        for epoch in range(3):
            store.begin_epoch(epoch)
            remember(store, range(6 * (epoch == 0), 12))
            store.end_epoch()
    assert [p.name for p in (tmp_path / "gen-000000").iterdir()] == [
        "seg-000001-00000-of-00001.psk"
    ]
    assert_whole(tmp_path)


def test_old_generations_do_not_pile_up(tmp_path):
    sizes = []
    with open_for_training(tmp_path, n=1000, classes=4) as store:
        for epoch in range(6):
            store.begin_epoch(epoch)
            remember(store, range(1000))
            store.end_epoch()
            sizes.append(sum(p.stat().st_size for p in tmp_path.rglob("seg-*")))
            assert len(list(tmp_path.glob("gen-*"))) <= 2
    assert sizes[1:] == [sizes[1]] * 5
    assert sizes[1] < 2.2 * sizes[0]


def test_samples_that_an_epoch_leaves_out_keep_their_row(tmp_path):
    with open_for_training(tmp_path, n=6, classes=4) as store:
        for epoch, ids in enumerate(([0, 1, 2], [2, 3], [4])):
            store.begin_epoch(epoch)
            remember(store, ids, p=0.3 + epoch / 10)
        store.begin_epoch(3)  # ends the epoch before
        past_BC, present_B = store.past(np.arange(6))
    assert present_B.tolist() == [True] * 5 + [False]
    assert past_BC[:, 0].tolist() == pytest.approx([0.3, 0.3, 0.4, 0.4, 0.5, 0], abs=1e-3)


def test_what_past_gave_stays_as_it_is(tmp_path):
    with open_for_training(tmp_path, n=8, classes=4, encoding="float32") as store:
        store.begin_epoch(0)
        for i in range(0, 8, 2):
            remember(store, [i], p=0.3 + i / 20)
        store.begin_epoch(1)
        kept = [store.past(torch.tensor([i])) for i in range(8)]
        store.prefetch(torch.tensor([0]))
        assert store.past(torch.tensor([0]))[0][0, 0].item() == pytest.approx(0.3)
    assert [row[0, 0].item() for row, _ in kept] == pytest.approx([0.3, 0, 0.4, 0, 0.5, 0, 0.6, 0])
    assert [present.item() for _, present in kept] == [True, False] * 4


# --- misuse ----------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    with open_for_training(tmp_path / "past", n=6, classes=4) as opened:
        opened.begin_epoch(0)
        yield opened


FAIR_BC = torch.full((2, 4), 0.25)


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        (torch.tensor([0, 6]), r"outside 0\.\.5: \[6\]"),
        (np.array([-1, 2]), r"outside 0\.\.5: \[-1\]"),
        (torch.tensor([0, 1], dtype=torch.int32), "int32"),
        (torch.tensor([0.0, 1.0]), "float32"),
        (np.array([[0, 1]]), r"shape \(1, 2\)"),
        ([0, 1], "list"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "on meta"),  # as on a GPU
    ],
)
def test_ids_that_are_none_are_refused(store, ids, part):
    for ask in (store.past, store.prefetch, lambda ids: store.remember(ids, FAIR_BC)):
        with pytest.raises(PskdError, match=part):
            ask(ids)


@pytest.mark.parametrize(
    ("rows_BC", "part"),
    [
        (FAIR_BC[:1], r"shape \(1, 4\).*\(2, 4\)"),
        (FAIR_BC[:, :3], r"shape \(2, 3\)"),
        (torch.ones(2, 4, dtype=torch.int64), "int64"),
    ],
)
def test_rows_of_another_shape_or_kind_are_refused(store, rows_BC, part):
    with pytest.raises(PskdError, match=part):
        store.remember(torch.tensor([0, 1]), rows_BC)


@pytest.mark.parametrize(
    ("rows_BC", "part"),
    [(torch.ones(2, 4), "sum to 4"), (torch.tensor([[0.25] * 4, [torch.nan] * 4]), "not finite")],
)
def test_rows_that_are_no_probabilities_are_refused_with_their_samples(store, rows_BC, part):
    store.remember(torch.tensor([3, 5]), rows_BC)
    with pytest.raises(PskdError, match=rf"{part}.*5\] in epoch 0"):
        store.end_epoch()


@pytest.mark.parametrize(
    ("other", "part"),
    [
        ({"n": 7}, "n 6 and not 7"),
        ({"classes": 5}, "classes 4 and not 5"),
        ({"encoding": "float32"}, "encoding 'float16' and not 'float32'"),
        ({"dataset": "b"}, "dataset '' and not 'b'"),
    ],
)
def test_a_directory_for_something_else_is_refused(tmp_path, other, part):
    options = {"n": 6, "classes": 4}
    open_for_training(tmp_path, **options).close()
    with pytest.raises(PskdError, match=part) as refused:
        open_for_training(tmp_path, **{**options, **other})
    assert str(tmp_path) in str(refused.value)
    open_for_training(tmp_path, **options).close()  # the lock was given back


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"n": 0}, "n is 0"),
        ({"classes": 1}, "classes is 1"),
        ({"encoding": "float61"}, "did you mean 'float16'"),
        ({"encoding": "top4"}, "keeps 4 of 4 classes"),
        ({"device": "meta"}, "device meta is no CPU"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_directory_is_made(tmp_path, options, part):
    with pytest.raises(PskdError, match=part):
        open_for_training(tmp_path / "past", **({"n": 6, "classes": 4} | options))
    assert not (tmp_path / "past").exists()


def test_a_store_of_the_trainer_and_a_damaged_record_are_refused(tmp_path):
    (tmp_path / "run/gen-000000").mkdir(parents=True)
    with pytest.raises(PskdError, match=r"run of the trainer"):
        open_for_training(tmp_path / "run", n=6, classes=4)
    open_for_training(tmp_path / "own", n=6, classes=4).close()
    record = tmp_path / "own/store.json"
    record.write_text(record.read_text().replace('"classes": 4', '"classes": 5'))
    with pytest.raises(PskdError, match=r"own/store\.json is damaged"):
        open_for_training(tmp_path / "own", n=6, classes=4)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PskdError, match="cannot be written"):
        open_for_training(tmp_path / "file/past", n=6, classes=4)


def test_a_second_process_is_refused_and_told_who_owns_the_directory(store):
    here, there = multiprocessing.Pipe()
    second = processes.Process(target=loops.open_and_tell, args=(store.directory, there))
    second.start()
    assert here.poll(60)
    assert f"in use by process {os.getpid()}" in here.recv()
    second.join(60)


def test_epochs_follow_one_another(tmp_path):
    with open_for_training(tmp_path, n=6, classes=4) as store:
        with pytest.raises(PskdError, match="begin_epoch comes first"):
            store.past(torch.tensor([0]))
        with pytest.raises(PskdError, match=r"epoch 1 cannot begin.*goes on with epoch 0,"):
            store.begin_epoch(1)
        for epoch in range(4):
            store.begin_epoch(epoch)
            assert store.epoch == epoch
            remember(store, range(6), p=0.3 + epoch / 10)
            if epoch == 2:
                with pytest.raises(PskdError, match="epoch 4 cannot begin: the next one is 3"):
                    store.begin_epoch(4)
        store.end_epoch()
        assert store.epoch == 4
        with pytest.raises(PskdError, match="begin_epoch comes first"):
            store.remember(torch.tensor([0]), FAIR_BC[:1])
        with pytest.raises(PskdError, match="epoch 3 cannot begin: the next one is 4"):
            store.begin_epoch(3)
    with open_for_training(tmp_path, n=6, classes=4) as store:
        assert store.epoch == 4
        for far in (0, 2, 5):
            with pytest.raises(PskdError, match=f"epoch {far} cannot .* epoch 3 or 4, and the wei"):
                store.begin_epoch(far)
        store.begin_epoch(3)  # the weights were not saved
        assert store.past(torch.tensor([0]))[0][0, 0].item() == pytest.approx(0.5, abs=1e-3)
        assert not (tmp_path / "gen-000003/manifest.json").exists()


def test_a_state_comes_after_the_first_epoch_and_goes_in_before_it(tmp_path, store):
    state = store.state_dict()
    with pytest.raises(PskdError, match="before the first begin_epoch"):
        store.load_state_dict(state)
    with open_for_training(tmp_path / "b", n=6, classes=4) as other:
        with pytest.raises(PskdError, match="no state"):
            other.state_dict()
        state["growing"] = [["gen-000000/seg-000001-00000-of-00001.psk", 2, 3]]
        with pytest.raises(PskdError, match=r"seg-000001-00000-of-00001\.psk: No such file"):
            other.load_state_dict(state)
    for call in (lambda: other.begin_epoch(0), lambda: other.load_state_dict(state)):
        with pytest.raises(PskdError, match="closed"):
            call()
    other.close()  # once more does nothing


def test_a_second_opening_by_one_process_is_refused_and_the_first_goes_on(tmp_path):
    """A cell that is run twice. Closing a second descriptor would give up the lock of the first."""
    options = {"n": 6, "classes": 4}
    first = open_for_training(tmp_path, **options)
    with pytest.raises(PskdError, match=r"in use by this process: close\(\)"):
        open_for_training(tmp_path / "." / "", **options)
    code = "import sys, pathlib; from pskd.store.record import own; own(pathlib.Path(sys.argv[1]))"
    other = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert f"in use by process {os.getpid()} on host" in other.stderr
    first.close()
    open_for_training(tmp_path, **options).close()
    del first
    open_for_training(tmp_path, **options)  # nobody keeps it: it is closed, and free again
    open_for_training(tmp_path, **options).close()
