"""When to save the state of the run, and how all ranks do it together."""

import logging
import time

from pskd import mirror
from pskd.checkpoint import Checkpoints, Position
from pskd.config import Config
from pskd.engine import Engine
from pskd.history import History
from pskd.sites import Sites
from pskd.store.store import Store
from pskd.words import readable_bytes
from pskd.world import World

log = logging.getLogger("pskd")


class Saver:
    """Saves checkpoints. Saving changes nothing of the result, wherever and how often."""

    def __init__(
        self,
        config: Config,
        world: World,
        sites: Sites,
        engine: Engine,
        store: Store | None,
        checkpoints: Checkpoints,
        history: History,
    ) -> None:
        self._section = config.checkpoint
        self._substitutes = config.data.on_bad_image == "substitute"
        self._world = world
        self._sites = sites
        self._engine = engine
        self._store = store
        self._checkpoints = checkpoints
        self._history = history
        self._saved: Position | None = None
        self._since = time.monotonic()

    def begin(self, position: Position) -> None:
        """Training goes on from here: there is nothing to save yet."""
        self._saved = position
        self._since = time.monotonic()

    def due_by_time(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint; the other ranks learn it from the guard."""
        minutes = self._section.every_minutes
        if not minutes or self._world.rank != 0:
            return False
        return time.monotonic() - self._since >= 60 * minutes

    def due_by_step(self, step: int) -> bool:
        """Whether there is one after so many steps of an epoch."""
        return self._section.every_steps > 0 and step % self._section.every_steps == 0

    def save(self, position: Position) -> None:
        """A checkpoint: the store by every rank, the rest by rank 0 (its buffers count)."""
        if position == self._saved:
            return  # asked to stop right after a resume: it is there already
        started = time.monotonic()
        with self._world.together():
            self._engine.check_finite()
        if self._store is not None:
            self._store.commit()
        if self._substitutes:  # else no image is absent
            ids = {i for absent in self._world.gather(self._history.absent) for i in absent}
            self._history.absent = sorted(ids)
        if self._engine.sharded:
            with self._world.together():
                aside = self._checkpoints.open_aside(position, create=self._world.rank == 0)
            self._engine.save_shards(aside)  # collective: must not be inside `together`
            self._world.gather(None)
        if self._world.rank == 0:
            self._checkpoints.save(position)
        mirror.send(self._checkpoints, position, 0, self._sites)
        if self._sites.leads:
            retained = self._checkpoints.retain()
            if self._store is not None:
                self._store.retain(m["store"] for m in retained)
        self._saved = position
        self._say(position, started)

    def _say(self, position: Position, started: float) -> None:
        """Size and stall: the seconds that training has waited, and their share since the last."""
        now = time.monotonic()
        if self._world.rank == 0:
            log.info(
                "checkpoint %s: %s, training waited %.2f s (%.1f %%)",
                position.name,
                readable_bytes(self._checkpoints.size_bytes(position)),
                now - started,
                100 * (now - started) / (now - self._since),
            )
        self._since = now
