"""Weights for plain torch that a run leaves beside its checkpoints: of its last epoch, of its best
one, and every so many.

Each site has them. The best is that of the run's history, which may have gone back, or have begun
in another run: what is left there of another history is replaced or removed.
"""

import logging
from pathlib import Path
from typing import Any, Literal

from pskd.config import Config
from pskd.engine import Engine
from pskd.files import write_atomically
from pskd.history import History
from pskd.run_records import read_starts
from pskd.sites import Sites
from pskd.weights import export_path, export_weights, is_export_of

log = logging.getLogger("pskd")


class Exports:
    """The files in RUN/models."""

    def __init__(
        self, config: Config, run: Path, engine: Engine, sites: Sites, num_classes: int
    ) -> None:
        self._config, self._run, self._engine, self._sites = config, run, engine, sites
        self._facts = {"model": config.model.name, "num_classes": num_classes}

    def write(self, history: History) -> None:
        """The weights as they are after the last epoch in the history, where its rules ask for it.

        Raises:
            PskdError: a file cannot be written.
        """
        if not self._sites.leads:
            return
        line = history.lines[-1]
        epoch, every = line["epoch"], self._config.checkpoint.export_every
        which: list[int | Literal["best"]] = ["best"] if line == history.best else []
        if epoch + 1 == self._config.train.epochs or (every and (epoch + 1) % every == 0):
            which.append(epoch)
        for each in which:
            path = export_path(self._run, each)
            export_weights(path, self._engine.evaluated, {**self._facts, **line})

    def begin(self, history: History, between_epochs: bool) -> None:
        """Collective, as training goes on: what a kill cut off, and the best of this history.

        Raises:
            AgreedError: a file cannot be written.
        """
        best, path = history.best, export_path(self._run, "best")
        mine: dict[str, int] = {}
        with self._sites.together():
            if between_epochs and history.lines:
                self.write(history)
            if self._sites.leads and self._find(path, best):
                mine = {str(path.relative_to(self._run)): path.stat().st_size}
        self._sites.spread(self._run, mine)
        if best is not None and not path.exists():
            log.warning(
                "the weights of the best epoch so far, %d, are not in %s any more; those of a "
                "better one will be",
                best["epoch"] + 1,
                path.parent,
            )

    def _find(self, path: Path, best: dict[str, Any] | None) -> bool:
        """Whether `path` holds the weights of that line, at the latest after they were copied there
        from another file; else it is removed. best: a line of metrics.jsonl.
        """
        if best is None:
            path.unlink(missing_ok=True)
            return False
        if is_export_of(path, best):
            return True
        origins = [start["origin"] for start in read_starts(self._run) if start.get("origin")]
        runs = [self._run, *(Path(origin["checkpoint"]).parent.parent for origin in origins)]
        for run in runs:
            for source in (export_path(run, best["epoch"]), export_path(run, "best")):
                if is_export_of(source, best):
                    path.parent.mkdir(exist_ok=True)
                    write_atomically(path, source.read_bytes())
                    return True
        path.unlink(missing_ok=True)
        return False
