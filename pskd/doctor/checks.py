"""All checks in turn, on all ranks together; rank 0 says what was found."""

import os
import secrets
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from pskd import launch, world
from pskd.config import Config
from pskd.doctor import device, machine, network, software, storage, training
from pskd.doctor.page import OK, WRONG, Line, Place, render
from pskd.errors import PskdError
from pskd.failure import is_lost_peer
from pskd.sites import Sites, discover
from pskd.world import World

_TOGETHER = (
    "Start the same command on every node, and let this port and all others between the nodes "
    "through their firewalls. On a node without a launcher, `pskd doctor --master ADDRESS:PORT` "
    "says whether it reaches the master."
)


class Master(NamedTuple):
    """Where a launcher on another node will be, or is."""

    address: str
    port: int


def check(config: Config, master: Master | None, timeout_s: int) -> bool:
    """Print the page, and say on every rank whether this can train.

    master: to look for; only without a launcher.

    Raises:
        PskdError: the ranks do not come together, or lose one another.
    """
    launched = launch.is_launched()
    place = launch.from_environment()
    if launched and place.rank > 0:
        network.wait_for_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout_s)
    try:
        here = world.join(place, torch.device("cpu"), timeout_s, "--timeout")
    except PskdError as error:
        way, _ = network.interface(
            os.environ["MASTER_ADDR"], several=place.world_size > place.local_world_size
        )
        also = f" {way.text}: {way.remedy}" if way.state == WRONG else ""
        raise PskdError(f"{error}.{also} {_TOGETHER}") from error
    try:
        ready = look(config, master, timeout_s, launched, place, here)
        world.stop(here)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise PskdError(
            f"rank {here.rank} lost another rank while they looked ({str(error).splitlines()[0]}). "
            f"{_TOGETHER}"
        ) from error
    return ready


def look(
    config: Config,
    master: Master | None,
    timeout_s: int,
    launched: bool,
    place: launch.Launch,
    here: World,
) -> bool:
    """Collective. Look at everything; rank 0 prints the page."""
    first_of_node = here.rank - here.local_rank
    nodes = sorted(set(here.gather(first_of_node)))
    chosen_line, chosen = device.device(place)
    on = chosen or torch.device("cpu")
    kinds = here.gather((first_of_node, "" if chosen is None else chosen.type))
    gpu_ranks = sum(node == first_of_node and kind == "cuda" for node, kind in kinds)
    several = len(nodes) > 1 or master is not None
    route_line, own_address = network.interface(
        os.environ["MASTER_ADDR"] if master is None else master.address, several
    )
    lines: list[Line] = []
    if here.local_rank == 0:
        lines += [*software.versions(), software.compiler(config)]
    lines += [chosen_line, device.dali(config, on)]
    if here.local_rank == 0:
        name = socket.gethostname()
        lines += [
            machine.cores(here.local_size),
            machine.memory(here.local_size),
            machine.shared_memory(gpu_ranks),
            machine.open_files(here.size),
            network.host_name(name, several),
            route_line,
        ]
    lines += _meeting(master, timeout_s, launched, here)
    lines += network.clocks(here, nodes)
    if len({kind for _, kind in kinds}) == 1 and kinds[0][1] and here.size > 1:
        line = device.sum_over_ranks(here, on)  # all take part, one reports
        if here.rank == 0:
            lines.append(line)
    found, path, sites = _run_directory(config, replace(here, device=on))
    lines += found
    if training.is_configured(config):
        lines += training.lines(config, path, replace(here, device=on), sites)
    elif here.local_rank == 0:
        lines.append(storage.room(path))
    places = here.gather(Place(socket.gethostname(), own_address, first_of_node))
    text, ready = render(places, here.gather(lines))
    if here.rank == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    return ready


def _meeting(master: Master | None, timeout_s: int, launched: bool, here: World) -> list[Line]:
    """Where ranks meet."""
    if master is not None:
        return [network.master(*master, timeout_s)]
    if here.rank > 0:
        return []
    if not launched:
        return [Line("master", OK, "one process needs none")]
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return [Line("master", OK, f"{where}, in use by this job; {here.size} ranks met there")]


def _run_directory(config: Config, here: World) -> tuple[list[Line], Path, Sites]:
    """What is found of it, its path on this node, and who shares it; as `startup.py` does."""
    chosen, token = config.run.dir or config.run.root, secrets.token_hex(8)
    first = Path(here.broadcast(str(Path(chosen).absolute())))
    path = Path(config.run.dir).absolute() if config.run.dir else first
    lines: list[Line] = []
    mark: Path | None = None
    try:
        if here.local_rank == 0:
            line, mark = storage.leave_mark(path, token)
            lines = [line, storage.file_system(path)]
        left = here.gather(mark is not None or here.local_rank > 0)
        tokens = here.gather(token)
        sees_first = storage.sees(first, tokens[0])
        sees_own = storage.sees(path, tokens[here.rank - here.local_rank])
        here.gather(None)  # all have looked
    finally:
        if mark is not None:
            with suppress(OSError):
                mark.unlink()
    if not all(left):  # then nobody knows who shares it
        return lines, path, Sites(here, [0] * here.size)
    try:
        sites = discover(here, sees_first, sees_own)
    except PskdError as error:
        return [*lines, Line("store", WRONG, str(error))], path, Sites(here, [0] * here.size)
    if here.rank == 0:
        lines.append(Line("store", OK, _transport(here, sites)))
    return lines, path, sites


def _transport(here: World, sites: Sites) -> str:
    if sites.separate:
        return f"{len(sites.leaders)} run directories: segments and checkpoints travel between them"
    if here.size == 1:
        return "one process reads and writes it; under a launcher, who sees it is found out"
    return f"all {here.size} ranks see one run directory: nothing has to travel"
