"""Segments of another run, with which a run begins."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lone_store import new_store, probabilities


def synced(monkeypatch):
    """Paths that fsync is called for, in order; a list that grows."""
    paths, fsync = [], os.fsync

    def noting(file):
        paths.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noting)
    return paths


@pytest.mark.parametrize("links", [True, False])
def test_what_is_adopted_is_durable_and_keeps_the_room_of_its_writer(tmp_path, monkeypatch, links):
    """Its writer may still append there; a checkpoint that names it may come at once."""
    source = new_store(tmp_path / "source")
    source.begin_epoch(0)
    source.remember(np.arange(8), probabilities(0)[:8])
    source.commit()
    (segment,) = (tmp_path / "source").glob("gen-*/seg-*.psk")
    room = segment.stat().st_size
    paths = synced(monkeypatch)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(1, "no links")))
    store = new_store(tmp_path / "new" / "store", start=1)
    state = store.adopt(tmp_path / "source", source.state_dict())
    below = tmp_path / "new" / "store"
    for path in (below / "gen-000000", below, tmp_path / "new", tmp_path):
        assert str(path) in paths, path
    store.load_state_dict(state)
    store.begin_epoch(0)
    assert segment.stat().st_size == room
    source.remember(np.arange(8, 16), probabilities(0)[8:16])
    source.commit()
    source.begin_epoch(1)
    assert torch.equal(source.past(np.arange(16))[0], probabilities(0)[:16])
    store.close()
    source.close()
