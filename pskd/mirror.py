"""Checkpoints on nodes that share no run directory: each keeps those of rank 0."""

import logging

from pskd.checkpoint import Checkpoints, Position
from pskd.errors import PskdError
from pskd.sites import Sites

log = logging.getLogger("pskd")


def send(checkpoints: Checkpoints, position: Position, source: int, sites: Sites) -> None:
    """Collective: give every site the checkpoint that rank `source` has; it becomes the latest.

    Raises:
        AgreedError: it cannot be read or written somewhere; what was there before is untouched.
    """
    if not sites.separate:
        return
    directory, files = checkpoints.directory / position.name, {}
    receives = sites.leads and sites.rank != source
    with sites.together():
        if receives:
            directory = checkpoints.open_aside(position, create=True)
        elif sites.leads:
            files = {path.name: path.stat().st_size for path in directory.iterdir()}
    sites.spread(directory, files)
    with sites.together():
        if receives:
            checkpoints.install(position)
            checkpoints.retain()


def catch_up(checkpoints: Checkpoints, sites: Sites) -> None:
    """Collective: every site gets the newest checkpoint, should its own be lost or older.

    Raises:
        AgreedError: as `send`.
    """
    if not sites.separate:
        return
    with sites.together():
        mine = (checkpoints.serial(), checkpoints.latest()) if sites.leads else (-1, None)
    found = sites.gather(mine)
    newest = max(serial for serial, _ in found)
    if newest < 0 or all(found[leader] == found[0] for leader in sites.leaders):
        return
    source = next(rank for rank, (serial, _) in enumerate(found) if serial == newest)
    serial, latest = found[0]
    if latest is not None and serial < newest:
        log.warning(
            "another node has a newer checkpoint, %s: the run goes on from there and not from %s, "
            "which %s/latest names here. To go back by hand, write it there on every node.",
            found[source][1],
            latest,
            checkpoints.directory,
        )
    send(checkpoints, Position.of(found[source][1]), source, sites)


def repair(checkpoints: Checkpoints, name: str, sites: Sites) -> None:
    """Collective: every site gets this checkpoint, should its own be lost or damaged.

    Does nothing if it is damaged everywhere: to say so is left to who reads it.

    Raises:
        AgreedError: as `send`.
    """
    if not sites.separate:
        return
    whole = False
    if sites.leads:
        try:
            checkpoints.verify(name)
            whole = True
        except PskdError as error:
            log.info("%s", error)
    found = sites.gather(whole)
    if any(found) and not all(found[leader] for leader in sites.leaders):
        send(checkpoints, Position.of(name), found.index(True), sites)
