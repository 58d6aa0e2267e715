"""The store against a dict: any world, real files, real concurrency; and what it refuses.

The ranks are threads (`store_worlds.py`). Letters: N samples, B of a batch, C classes.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pskd.errors import PskdError
from pskd.store import open_generation
from tests.store_worlds import (
    ALL,
    C,
    N,
    World,
    assert_rows,
    bits,
    files,
    probabilities,
    refused,
    segments,
    worlds,
)

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class TestEpochs:
    @worlds
    def test_in_the_first_epoch_nothing_is_present(self, make, world):
        job = make(world)
        job.begin(0)
        assert job.past() == {}

    @worlds
    def test_an_epoch_reads_the_one_before_even_while_it_writes(self, make, world):
        job = make(world)
        first, second = probabilities(ALL, 1), probabilities(ALL, 2)
        job.begin(0)
        job.train(first)
        assert job.past() == {}
        job.begin(1)
        assert_rows(job.past(), first)
        job.train(second)
        job.checkpoint()
        assert_rows(job.past(), first)
        job.begin(2)
        assert_rows(job.past(), second)

    @worlds
    def test_a_skipped_sample_keeps_its_row_to_the_bit_for_any_number_of_epochs(self, make, world):
        job = make(world)
        want = probabilities(ALL[:20], 0)
        job.begin(0)
        job.train(want)
        for epoch in range(1, 5):
            job.begin(epoch)
            assert_rows(job.past(), want)
            trained = probabilities(range(3 * epoch, 3 * epoch + 4), epoch)
            want |= trained
            job.train(trained)
        job.begin(5)
        assert_rows(job.past(), want)
        job.begin(6)  # an epoch that trains nothing
        assert_rows(job.past(), want)

    @pytest.mark.parametrize("encoding", ["float32", "float16"])
    def test_contents_do_not_depend_on_the_world(self, tmp_path, encoding):
        """The same bits from 1, 2, 3 and 4 ranks, whatever was carried forward."""
        contents = []
        for world in (1, 2, 3, 4):
            job = World(tmp_path / str(world), world, encoding=encoding)
            for epoch in range(3):
                job.begin(epoch)
                rows = probabilities(np.random.default_rng(epoch).permutation(N)[:17], epoch)
                for low in range(0, 17, 8):
                    job.train({i: rows[i] for i in list(rows)[low : low + 8]})
            job.begin(3)
            contents.append({i: bits(row) for i, row in job.past().items()})
            job.end()
        assert len(contents[0]) > 17
        assert contents.count(contents[0]) == 4

    @given(st.integers(1, 40), st.integers(0, 10**6))
    @settings(untimed, max_examples=20)
    def test_float32_keeps_every_bit_and_float16_rounds_and_normalises(self, classes, seed):
        rows = probabilities(ALL, seed, classes)
        rows[0] = torch.eye(classes)[0]
        rows[1] = torch.full((classes,), 1 / classes)
        with tempfile.TemporaryDirectory() as directory:
            for encoding in ("float32", "float16"):
                job = World(Path(directory, encoding), encoding=encoding, classes=classes)
                job.begin(0)
                job.train(rows)
                job.begin(1)
                got_NC = job.stores[0].past(ALL)[0]
                job.begin(2)
                assert bits(job.stores[0].past(ALL)[0]) == bits(got_NC), "carried forward"
                job.end()
                want_NC = torch.stack([rows[i] for i in ALL.tolist()])
                if encoding == "float32":
                    assert bits(got_NC) == bits(want_NC)
                assert (got_NC - want_NC).abs().max() <= 2.5e-4
                assert (got_NC.sum(dim=1) - 1).abs().max() < 1e-6

    def test_float32_keeps_every_bit_of_odd_numbers(self, make):
        """Signed zeros and the smallest numbers: the encoding does not compute."""
        job = make()
        odd = torch.tensor([-0.0, 1e-45, 1e-39, 1 - 2**-24, 2**-24])
        job.begin(0)
        job.train({4: odd})
        job.begin(1)
        assert bits(job.past()[4]) == bits(odd)

    def test_of_repeated_samples_the_last_wins(self, make):
        """Within a step, between steps; between ranks the higher rank; then the later start."""
        job = make(2)
        rows = [probabilities([0, 1, 2, 3], seed) for seed in range(4)]
        job.begin(0)
        job.stores[0].remember(np.array([0, 1, 0]), torch.stack([rows[s][0] for s in range(3)]))
        job.stores[0].remember(np.array([1]), rows[2][1][None])
        job.stores[1].remember(np.array([2]), rows[0][2][None])
        job.stores[0].remember(np.array([2]), rows[1][2][None])
        job.stores[1].remember(np.array([3]), rows[0][3][None])
        again = make(1, start=1, state=job.checkpoint())
        again.begin(0)
        again.train({3: rows[3][3]})
        again.begin(1)
        want = {0: rows[2][0], 1: rows[2][1], 2: rows[0][2], 3: rows[3][3]}
        assert_rows(again.past(), want)

    @worlds
    def test_beginning_an_epoch_again_changes_nothing(self, make, store_dir, world):
        job = make(world)
        rows = probabilities(ALL, 0)
        job.begin(0)
        job.train(dict(list(rows.items())[:9]))
        job.begin(0)
        job.train(dict(list(rows.items())[9:]))
        job.begin(1)
        before, state = files(store_dir), job.checkpoint()
        job.begin(1)
        assert (files(store_dir), job.checkpoint()) == (before, state)
        assert_rows(job.past(), rows)

    @pytest.mark.parametrize("epoch", [2, -1])
    def test_epochs_follow_one_another(self, make, epoch):
        job = make()
        job.begin(0)
        with pytest.raises(AssertionError):
            job.begin(epoch)


class TestReading:
    def test_a_prefetch_never_changes_the_answer(self, make):
        """Used, for other ids, repeated, dropped, or from the epoch before."""
        job = make()
        store, first, second = job.stores[0], probabilities(ALL, 1), probabilities(ALL, 2)
        job.begin(0)
        job.train(first)
        job.begin(1)
        for ahead, asked in [([3, 1], [3, 1]), ([3, 1], [1, 3]), ([2], [2, 4]), ([5, 6], [5])]:
            store.prefetch(np.array(ahead))
            rows_BC, present_B = store.past(np.array(asked))
            assert present_B.tolist() == [True] * len(asked)
            assert bits(rows_BC) == b"".join(bits(first[i]) for i in asked)
        store.prefetch(np.array([7]))
        store.prefetch(np.array([8]))
        assert bits(store.past(np.array([7]))[0][0]) == bits(first[7])
        store.prefetch(np.array([9]))
        job.train(second)
        job.begin(2)
        assert bits(store.past(np.array([9]))[0][0]) == bits(second[9])

    @pytest.mark.parametrize("encoding", ["float32", "float16"])
    def test_absent_rows_are_zeros_and_marked(self, make, encoding):
        job = make(2, encoding=encoding)
        job.begin(0)
        job.train(probabilities([2, 5], 0))
        job.begin(1)
        rows_BC, present_B = job.stores[1].past(np.array([5, 6, 2, 5, 0]))
        assert present_B.tolist() == [True, False, True, True, False]
        assert torch.isfinite(rows_BC).all()
        assert not rows_BC[~present_B].any()
        assert bits(rows_BC[0]) == bits(rows_BC[3])

    @worlds
    def test_a_finished_generation_is_a_table(self, make, store_dir, tmp_path, world):
        job = make(world)
        rows = probabilities([0, 3, 7, 11, N - 1], 0)
        job.begin(0)
        job.train(rows)
        job.begin(1)
        moved = shutil.copytree(store_dir, tmp_path / "elsewhere")
        for path in (store_dir / "gen-000000", str(moved / "gen-000000")):
            table = open_generation(path)
            table.verify()
            assert np.flatnonzero(table.present_N).tolist() == sorted(rows)
            got_BC = table[[11, 0, 11]]
            assert got_BC.dtype == torch.float32
            assert bits(got_BC) == bits(torch.stack([rows[11], rows[0], rows[11]]))
            with pytest.raises(KeyError, match=r"never seen: \[1, 2\]"):
                table[[0, 1, 3, 2]]
            with pytest.raises(KeyError, match=r"outside 0\.\.22: \[-1, 23\]"):
                table[[0, -1, 1, 23]]

    @pytest.mark.parametrize("encoding", ["float32", "float16"])
    def test_asking_for_nothing_gives_nothing(self, make, store_dir, encoding):
        job = make(encoding=encoding)
        job.begin(0)
        job.train(probabilities(ALL, 0))
        job.begin(1)
        assert job.stores[0].past(np.array([], np.int64))[0].shape == (0, C)
        assert open_generation(store_dir / "gen-000000")[[]].shape == (0, C)

    def test_only_a_finished_generation_can_be_opened(self, make, store_dir):
        job = make()
        job.begin(0)
        job.train(probabilities(ALL, 0))
        for name in ("gen-000000", "gen-000001"):
            message = refused(lambda name=name: open_generation(store_dir / name))
            assert f"{store_dir / name} holds no finished generation" in message

    def test_a_damaged_manifest_is_refused_by_name(self, make, store_dir):
        """Any flipped bit is refused, or changes none of the rows."""
        job = make(2)
        rows = probabilities(ALL, 0)
        job.begin(0)
        job.train(rows)
        job.begin(1)
        path = store_dir / "gen-000000" / "manifest.json"
        content = path.read_bytes()
        for offset in range(len(content)):
            path.write_bytes(
                content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :]
            )
            try:
                table = open_generation(path.parent)
            except PskdError as error:
                assert str(store_dir) in str(error)
            else:
                assert bits(table[ALL]) == bits(torch.stack([rows[i] for i in ALL.tolist()]))

    def test_a_manifest_of_another_version_is_refused(self, make, store_dir):
        job = make()
        job.begin(0)
        job.begin(1)
        path = store_dir / "gen-000000" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 3}))
        assert "version 3" in refused(lambda: open_generation(path.parent))


class TestRefusals:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_non_finite_predictions_are_named_and_not_stored(self, make, store_dir, bad):
        """Said at the next call, as a thread writes; what follows them is not written either."""
        job = make()
        good, mixed = probabilities([1, 2], 0), torch.softmax(torch.rand(3, C), 1)
        mixed[0, 2] = mixed[2, 0] = bad
        job.begin(0)
        job.train(good)
        before = job.checkpoint()
        job.stores[0].remember(np.array([7, 8, 9]), mixed)
        for action in (job.checkpoint, job.checkpoint, lambda: job.train(probabilities([3], 0))):
            message = refused(action)
            assert "samples [7, 9] in epoch 0" in message
            assert "not finite" in message
            assert "optimizer.lr" in message
        (segment,) = segments(store_dir)
        assert bits(mixed[1]) not in (store_dir / segment).read_bytes()
        again = make(1, 1, before)
        again.begin(0)
        again.begin(1)
        assert_rows(again.past(), good)

    @pytest.mark.parametrize("wrong", [2.0, 0.0, -1.0])
    def test_what_is_no_probability_is_named_and_not_stored(self, make, store_dir, wrong):
        """Logits, for example."""
        job = make()
        rows = torch.softmax(torch.rand(3, C), 1)
        rows[1] = rows[1] * wrong
        job.begin(0)
        job.stores[0].remember(np.array([7, 8, 9]), rows)
        message = refused(job.checkpoint)
        message = message.replace("-0", "0")
        assert f"sum to {wrong:.4g}, not to 1, of samples [8] in epoch 0" in message
        assert "softmax" in message

    @pytest.mark.parametrize("encoding", ["float32", "uint8-log"])
    def test_a_negative_number_is_named_and_not_stored(self, make, encoding):
        """Though its row sums to 1."""
        job = make(encoding=encoding)
        rows = torch.softmax(torch.rand(3, C), 1)
        rows[1] = torch.tensor([1.5, -0.5] + [0.0] * (C - 2))
        job.begin(0)
        job.stores[0].remember(np.array([7, 8, 9]), rows)
        message = refused(job.checkpoint)
        assert "with a negative number, -0.5, of samples [8] in epoch 0" in message

    def test_a_softmax_in_half_precision_passes(self, make):
        job = make()
        job.begin(0)
        rows = torch.softmax(8 * torch.randn(N, C), 1).bfloat16().float()
        job.stores[0].remember(ALL, rows)
        job.begin(1)
        assert len(job.past()) == N

    @worlds
    @pytest.mark.parametrize(
        ("option", "was", "now"),
        [
            ("identity", "data", "other-data"),
            ("encoding", "float32", "float16"),
            ("classes", C, C + 1),
            ("n", N, N + 1),
            ("run", "run", "other-run"),
        ],
    )
    def test_predictions_of_another_run_are_refused_by_name(self, make, world, option, was, now):
        job = make(world)
        job.begin(0)
        job.train(probabilities(ALL, 0))
        growing = job.checkpoint()
        job.begin(1)
        for named in (growing, job.checkpoint()):
            state = named | ({"runs": []} if option == "run" else {})
            message = refused(lambda state=state: make(1, 1, state, **{option: now}))
            assert f"{was}, not {now}" in message
            assert "seg-000000-00000-of-" in message

    @worlds
    @pytest.mark.parametrize("part", ["finished", "growing"])
    def test_damage_anywhere_is_found_when_loading(self, make, store_dir, world, part):
        """The ranks share the work; one of them finds it and names the file."""
        job = make(3)
        for epoch in (0, 1):
            job.begin(epoch)
            job.train(probabilities(ALL, epoch))
        state = job.checkpoint()
        assert len(state[part]) == 3
        for name, *_ in state[part]:
            path = store_dir / name
            content = path.read_bytes()
            last_row = max(i for i, byte in enumerate(content) if byte)
            path.write_bytes(content[:last_row] + b"\0" + content[last_row + 1 :])
            assert str(path) in refused(lambda: make(world, 1, state))
            path.unlink()
            assert str(path) in refused(lambda: make(world, 1, state))
            path.write_bytes(content)
        make(world, 1, state)
