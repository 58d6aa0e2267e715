"""What travels between sites, each part by itself, and which ranks are one site. N samples."""

import logging
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pskd import mirror, sites
from pskd.checkpoint import Checkpoints, Position
from pskd.errors import AgreedError, DamagedError
from pskd.order import partition
from pskd.sites import Sites, discover
from pskd.store.sections import StoreSection
from pskd.store.store import Store
from tests.separate_sites import BATCH, STEPS, N, apart, order_of, rows_of, site_of


def spread(world, leaders, paths, vouched, block_bytes):
    """Bytes that this rank took part in sending; the message if it fails."""
    here, sent, broadcast = Sites(world, leaders), [], dist.broadcast

    def count(tensor, *args, **options):
        sent.append(tensor.numel())
        return broadcast(tensor, *args, **options)

    before, sites._BLOCK_BYTES, dist.broadcast = sites._BLOCK_BYTES, block_bytes, count
    try:
        here.spread(paths[world.rank], vouched[world.rank])
    except AgreedError as error:
        return sum(sent), str(error)
    finally:
        sites._BLOCK_BYTES, dist.broadcast = before, broadcast
    return sum(sent), None


def train_and_count(world, root, leaders):
    """A run without checkpoints: bytes that were sent for its segments, commit by commit."""
    here, sent, broadcast = Sites(world, leaders), [0], dist.broadcast
    store = Store(
        site_of(root, leaders[world.rank]),
        n=N,
        classes=100,
        identity="data",
        run="run",
        start=0,
        peers=here,
        options=StoreSection("float32"),
        device=torch.device("cpu"),
    )

    def count(tensor, *args, **options):
        sent[-1] += tensor.numel()
        return broadcast(tensor, *args, **options)

    dist.broadcast = count
    try:
        for epoch in range(2):
            store.begin_epoch(epoch)
            for step in range(STEPS):
                low, high = partition(BATCH, world.size)[world.rank :][:2]
                ids = order_of(epoch)[BATCH * step + low : BATCH * step + high]
                store.remember(ids, rows_of(epoch, 100)[ids])
                sent.append(0)
                store.commit()
            sent.append(0)
            store.commit()  # nothing new
        sent.append(0)
        store.begin_epoch(2)
    finally:
        dist.broadcast = broadcast
        store.close()
    return sent


class TestTransfer:
    @pytest.mark.parametrize("block_bytes", [1, 7, 1000, 1 << 24])
    def test_each_site_gets_what_it_lacks_from_one_that_has_it(self, pool, tmp_path, block_bytes):
        """Nothing, a part, all, and garbage beyond what it vouches for."""
        content = np.random.default_rng(0).integers(0, 256, 50, np.uint8).tobytes()
        paths = [tmp_path / str(rank) for rank in range(4)]
        vouched = [{"gen/a": 20}, {}, {"gen/a": 50, "b": 0}, {"gen/a": 7}]
        for rank, (path, files) in enumerate(zip(paths, vouched, strict=True)):
            (path / "gen").mkdir(parents=True)
            if files:
                garbage = b"garbage" if rank == 3 else b""
                (path / "gen/a").write_bytes(content[: files["gen/a"]] + garbage)
        answers = pool(4).run(spread, [0, 1, 2, 3], paths, vouched, block_bytes)
        assert answers == [(50, None)] * 4
        for path in paths:
            assert (path / "gen/a").read_bytes() == content

    def test_what_all_have_is_not_sent(self, pool, tmp_path):
        paths = [tmp_path / str(rank) for rank in range(2)]
        answers = pool(2).run(spread, [0, 1], paths, [{"a": 10}, {"a": 10}], 1 << 24)
        assert answers == [(0, None)] * 2

    @apart
    def test_a_commit_sends_only_what_is_new(self, pool, tmp_path, leaders):
        """Each byte of each segment once; a commit without news nothing."""
        size = len(leaders)
        answers = pool(size).run(train_and_count, tmp_path, leaders)
        site = site_of(tmp_path, 0)
        segments = sum(p.stat().st_size for p in site.glob("gen-*/*.psk"))
        for rank, sent in enumerate(answers):
            if rank in leaders:
                assert sum(sent) == segments
                assert sent[0] == 0
                assert sent[STEPS + 1] == 0
                assert max(sent) < segments / 3
            else:
                assert sum(sent) == 0, "its leader receives for it"

    @pytest.mark.parametrize("there", [False, True])
    def test_a_source_that_lacks_what_it_vouches_for_is_an_error(self, pool, tmp_path, there):
        paths = [tmp_path / str(rank) for rank in range(2)]
        for path in paths:
            path.mkdir()
        if there:
            (paths[0] / "a").write_bytes(b"123")
        answers = pool(2).run(spread, [0, 1], paths, [{"a": 10}, {}], 1 << 24)
        assert all(message is not None and str(paths[0]) in message for _, message in answers)


def small_files(world, leaders, directories, what):
    here = Sites(world, leaders)
    if what == "copy":
        here.copy(directories[world.rank], ["a", "b", "c"])
    else:
        here.recover(directories[world.rank], ["a", "b", "key"], key="key")


class TestSmallFiles:
    def write(self, tmp_path, contents):
        paths = [tmp_path / str(rank) for rank in range(len(contents))]
        for path, files in zip(paths, contents, strict=True):
            path.mkdir()
            for name, text in files.items():
                (path / name).write_text(text)
        return paths

    def read(self, paths):
        return [{p.name: p.read_text() for p in path.iterdir()} for path in paths]

    def test_copies_are_rank_0s(self, pool, tmp_path):
        paths = self.write(tmp_path, [{"a": "0"}, {"a": "old", "b": "mine"}])
        pool(2).run(small_files, [0, 1], paths, "copy")
        assert self.read(paths) == [{"a": "0"}, {"a": "0", "b": "mine"}]

    def test_rank_0_recovers_the_longest_record(self, pool, tmp_path):
        longest = {"key": "123", "a": "new"}
        paths = self.write(tmp_path, [{"a": "stray"}, {"key": "1"}, longest, {}])
        pool(4).run(small_files, [0, 1, 2, 3], paths, "recover")
        assert self.read(paths) == [longest, {"key": "1"}, longest, {}]

    @pytest.mark.parametrize("others", [{"key": "123"}, {}])
    def test_rank_0_keeps_its_record(self, pool, tmp_path, others):
        paths = self.write(tmp_path, [{"key": "1"}, others])
        pool(2).run(small_files, [0, 1], paths, "recover")
        assert self.read(paths) == [{"key": "1"}, others]


def discover_on(world, local_size, sees_rank_0, sees_own):
    """On nodes of `local_size` ranks."""
    here = replace(world, local_rank=world.rank % local_size, local_size=local_size)
    try:
        found = discover(here, sees_rank_0[world.rank], sees_own[world.rank])
    except AgreedError as error:
        return str(error)
    return found.leaders, found.colleagues, found.leads, found.separate


class TestDiscovery:
    def test_a_shared_directory_is_one_site(self, pool):
        for own in ([True] * 4, [True, False, False, False]):
            answers = pool(4).run(discover_on, 2, [True] * 4, own)
            assert answers == [([0], (0, 1, 2, 3), rank == 0, False) for rank in range(4)]

    def test_two_nodes_of_two(self, pool):
        answers = pool(4).run(discover_on, 2, [True, True, False, False], [True] * 4)
        assert [a[1] for a in answers] == [(0, 1)] * 2 + [(2, 3)] * 2
        assert [a[2] for a in answers] == [True, False, True, False]
        assert all(a[0] == [0, 2] and a[3] for a in answers)

    def test_a_node_that_shares_rank_0s_disk_beside_one_that_does_not(self, pool):
        answers = pool(4).run(discover_on, 1, [True, True, False, True], [True] * 4)
        assert [a[1] for a in answers] == [(0, 1, 3), (0, 1, 3), (2,), (0, 1, 3)]

    def test_a_rank_that_sees_neither_is_named_on_every_rank(self, pool):
        answers = pool(4).run(discover_on, 2, [True, True, False, False], [True, True, True, False])
        assert len(set(answers)) == 1
        assert "rank 3 sees neither the run directory of rank 0 nor that of rank 2" in answers[0]
        assert "--run.dir" in answers[0]


class Content:
    """A part of a checkpoint."""

    def state_dict(self):
        return {"values": torch.arange(10_000)}


def repaired(world, leaders, root, damage):
    """Both sites have a checkpoint; it is damaged on some, then repaired. Who can read it?"""
    here, directory = Sites(world, leaders), root / f"site-{leaders[world.rank]}" / "checkpoints"
    checkpoints, position = Checkpoints(directory, 2), Position(0, 3)
    checkpoints.register("part", Content())
    if here.leads:
        directory.parent.mkdir()
        checkpoints.prepare()
        checkpoints.save(position)
    how = damage.get(world.rank)
    if how == "lost":
        shutil.rmtree(directory / position.name)
    elif how is not None:
        os.truncate(directory / position.name / how, 700)
    mirror.repair(checkpoints, position.name, here)
    world.gather(None)
    try:
        return checkpoints.latest(), len(checkpoints.read(position.name)[1]["part"]["values"])
    except DamagedError:
        return "damaged"


def overruled(world, leaders, root):
    """Rank 0's site has gone back by hand, the other one has not; what is warned of, and where."""
    here, directory = Sites(world, leaders), root / f"site-{leaders[world.rank]}" / "checkpoints"
    checkpoints = Checkpoints(directory, 2)
    checkpoints.register("part", Content())
    if here.leads:
        directory.parent.mkdir()
        checkpoints.prepare()
        for step in (3, 6):
            checkpoints.save(Position(0, step))
        if world.rank == 0:
            (directory / "latest").write_text(Position(0, 3).name)
    with captured("pskd") as messages:
        mirror.catch_up(checkpoints, here)
    return checkpoints.latest(), messages


@contextmanager
def captured(name):
    """What a logger is told, as a list."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    yield messages
    logging.getLogger(name).removeHandler(handler)


def test_a_node_that_goes_back_alone_is_told_that_it_does_not(pool, tmp_path):
    answers = pool(2).run(overruled, [0, 1], tmp_path)
    assert [latest for latest, _ in answers] == [Position(0, 6).name] * 2
    ((message,), *_) = (messages for _, messages in answers)
    assert f"{Position(0, 6).name}: the run goes on from there and not from" in message
    assert f"{tmp_path}/site-0/checkpoints/latest names here" in message


class TestDamagedCheckpoint:
    @pytest.mark.parametrize("how", ["state.pt", "manifest.json", "lost"])
    @pytest.mark.parametrize("site", [0, 2])
    def test_a_site_gets_what_another_one_has_whole(self, pool, tmp_path, site, how):
        answers = pool(4).run(repaired, [0, 0, 2, 2], tmp_path, {site: how})
        assert answers == [(Position(0, 3).name, 10_000)] * 4

    def test_what_is_damaged_everywhere_stays_so(self, pool, tmp_path):
        answers = pool(2).run(repaired, [0, 1], tmp_path, {0: "state.pt", 1: "manifest.json"})
        assert answers == ["damaged"] * 2
