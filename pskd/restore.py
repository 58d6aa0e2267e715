"""Bring a run to where it was left: its newest checkpoint that all ranks find whole."""

import logging
from dataclasses import dataclass
from typing import Any

from pskd import mirror
from pskd.checkpoint import Checkpoints, Position
from pskd.engine import Engine
from pskd.errors import AgreedDamage, AgreedError, PskdError
from pskd.history import History
from pskd.methods.interface import Method
from pskd.sites import Sites
from pskd.startup import Origin
from pskd.store.store import Store
from pskd.world import World

log = logging.getLogger("pskd")


@dataclass
class Identity:
    """What a checkpoint was trained on; part of it, and compared on load."""

    data_fingerprint: str

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse the checkpoint of another data set.

        Raises:
            PskdError: the samples differ.
        """
        if state["data_fingerprint"] != self.data_fingerprint:
            raise PskdError(
                f"the run was trained on other samples (fingerprint {state['data_fingerprint']}, "
                f"now {self.data_fingerprint}). Bring back the data (of a folder: the same files, "
                "none added, removed, renamed or left out), or start a new run."
            )


@dataclass
class Parts:
    """Whatever has state, by its name in a checkpoint."""

    identity: Identity
    engine: Engine
    history: History
    method: Method
    store: Store | None

    def register(self, checkpoints: Checkpoints) -> None:
        """From now on they are saved and loaded."""
        for name, part in vars(self).items():
            if part is not None:
                checkpoints.register(name, part)


def resume(
    parts: Parts, checkpoints: Checkpoints, origin: Origin | None, here: World, sites: Sites
) -> Position:
    """Collective: load the newest checkpoint that is whole, if there is any; where to go on.

    Raises:
        AgreedError: none of several is whole, or one does not fit this run.
    """
    with here.together():
        if sites.leads:
            checkpoints.prepare()
    with here.together():
        if here.rank == 0 and origin is not None:
            _adopt(origin, checkpoints, parts)
    mirror.catch_up(checkpoints, sites)
    damaged: dict[str, str] = {}
    for name in _newest_first(checkpoints, here, sites):
        try:
            position = _load(name, parts, checkpoints, here, sites)
        except AgreedDamage as damage:
            damaged[name] = damage.what
            log.warning("checkpoint %s cannot be used: %s", name, damage.what)
            continue
        with here.together():
            if sites.leads:
                checkpoints.go_on_from(name, list(damaged))
                if parts.store is not None:  # what a kill kept from being deleted
                    parts.store.retain(m["store"] for m in checkpoints.retain())
        if damaged:
            log.warning(
                "going back to checkpoint %s, the newest that is whole; what is damaged is set "
                "aside: %s",
                name,
                ", ".join(f"{checkpoints.directory}/damaged-{each}" for each in damaged),
            )
        return position
    if damaged:
        raise AgreedError(
            f"no checkpoint of this run is whole: {' '.join(damaged.values())} Restore one from a "
            "backup, or start a new run in another --run.dir."
        )
    return Position(0, 0)


def _newest_first(checkpoints: Checkpoints, here: World, sites: Sites) -> list[str]:
    """Names of all checkpoints of any site: what `latest` names, then by serial number."""
    with here.together():
        latest, exist = checkpoints.latest(), checkpoints.exist()
        found = checkpoints.serials() if sites.leads else {}
    # Rank 0's, should a file system show an older state elsewhere.
    latest, exist = here.broadcast((latest, exist))
    serials: dict[str, int] = {}
    for one in sites.gather(found):
        serials |= {name: max(serial, serials.get(name, serial)) for name, serial in one.items()}
    names = sorted(serials, key=lambda name: (serials[name], name), reverse=True)
    if latest is not None:
        return [latest, *(name for name in names if name != latest)]
    if exist:
        path = checkpoints.directory / "latest"
        if not names:
            raise AgreedError(
                f"{path} names a checkpoint that is not there, and there is no other. Restore it "
                "from a backup, or start a new run in another --run.dir."
            )
        log.warning("%s is missing or damaged: the newest checkpoint is %s", path, names[0])
    return names


def _load(name: str, parts: Parts, checkpoints: Checkpoints, here: World, sites: Sites) -> Position:
    """All ranks verify the files and every row that they name, and agree, before any part of the
    network is touched."""
    mirror.repair(checkpoints, name, sites)
    with here.together():
        position, state = checkpoints.read(name)
    if parts.store is not None:
        parts.store.receive(state["store"])
    with here.together():
        checkpoints.restore(state, "identity", "store")
    with here.together():
        checkpoints.restore(state, "engine", "history", "method")
    if parts.engine.sharded:
        parts.engine.load_shards(checkpoints.directory / name)
    return position


def _adopt(origin: Origin, checkpoints: Checkpoints, parts: Parts) -> None:
    """Make another run's checkpoint the first of this one, if it fits."""
    directory, store = origin.checkpoint, parts.store
    position, state = Checkpoints(directory.parent).read(directory.name)
    parts.identity.load_state_dict(state["identity"])
    parts.engine.check_fits(state["engine"], directory)
    if store is None:
        state.pop("store", None)
    elif "store" in state:
        state["store"] = store.adopt(origin.run.store, state["store"])
    else:
        log.warning("%s has no past predictions: the first targets are one-hot", directory)
        state["store"] = store.empty_state(position.epoch)
    if any(change.startswith(("method.name", "method.teacher")) for change in origin.changes):
        state["method"] = parts.method.state_dict()
    checkpoints.adopt(directory, state)
