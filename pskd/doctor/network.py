"""How a node reaches the master and the others, and whether their clocks agree.

Clocks: rank 0 asks another node for its time; the answer lies between question and arrival. So the
other clock is ahead by the answer minus their mean, give or take half the time that it took.
"""

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist

from pskd import launch
from pskd.doctor.page import OK, WARNING, WRONG, Line
from pskd.errors import PskdError
from pskd.world import World

_MOST_SKEW_S = 1.0
_QUESTIONS = 5
_RETRY_S = 0.5
_REACH = (
    "Is the address the master's, is its host up, and does a firewall let this port and all others "
    "between the nodes through?"
)


class Stamp(NamedTuple):
    """Times in seconds since the epoch: by rank 0's clock, the other's, rank 0's."""

    asked: float
    answered: float
    arrived: float


def interface(master: str, several: bool) -> tuple[Line, str]:
    """What gloo binds, and the address of this host on the way to the master.

    several: other nodes take part.
    """
    name, own = launch.route(master)
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", name)
    if own is None or chosen is None:
        return Line("interface", WRONG, f"no route to the master {master}", _REACH), "no address"
    by = "the route to" if chosen == name else "GLOO_SOCKET_IFNAME, not the route to"
    text = f"{chosen} ({own}), by {by} the master {master}"
    if several and ipaddress.ip_address(own).is_loopback:
        remedy = "Other nodes cannot reach it: name the master by an address that they reach."
        return Line("interface", WRONG, text, remedy), own
    return Line("interface", OK, text), own


def host_name(name: str, several: bool) -> Line:
    """What this host's name resolves to. several: other nodes take part."""
    try:
        address = socket.gethostbyname(name)
        loopback = ipaddress.ip_address(address).is_loopback
        text = f"{name} is {address}{', loopback' if loopback else ''}"
    except OSError as error:
        loopback, text = True, f"{name} does not resolve ({error.strerror})"
    if loopback and several:
        remedy = (
            "This trainer does not mind, but torchrun's c10d rendezvous does: use "
            "scripts/torchrun.sh, or --local-addr and is_host, or mend /etc/hosts."
        )
        return Line("host name", WARNING, text, remedy)
    return Line("host name", OK, f"{text}; no matter on one node" if loopback else text)


def master(address: str, port: int, timeout_s: float) -> Line:
    """Without a launcher: is the port free if this is the master, else does the master answer?"""
    where = f"{address}:{port}"
    try:
        target = socket.gethostbyname(address)
    except OSError as error:
        text = f"{address} does not resolve ({error.strerror})"
        return Line("master", WRONG, text, "Name it by its IP address, or mend DNS or /etc/hosts.")
    own = {a.address for addresses in psutil.net_if_addrs().values() for a in addresses}
    if target in own:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            try:
                probe.bind((target, port))
            except OSError as error:
                text = f"{where} is this host, and the port is taken: {error.strerror}"
                remedy = "End what listens there (ss -ltnp), or choose another --master-port."
                return Line("master", WRONG, text, remedy)
        return Line("master", OK, f"{where} is this host, and the port is free")
    try:
        _connect(target, port, timeout_s)
    except ConnectionRefusedError:
        return Line("master", OK, f"{where}: the host answers; nothing listens on the port yet")
    except OSError as error:
        return Line("master", WRONG, f"{where} is not reached: {_reason(error)}", _REACH)
    return Line("master", OK, f"{where} answers")


def wait_for_store(address: str, port: int, timeout_s: float) -> None:
    """Under a launcher: until the store of the job answers there.

    Raises:
        PskdError: not in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return _connect(address, port, max(deadline - time.monotonic(), _RETRY_S))
        except OSError as error:
            if time.monotonic() + _RETRY_S > deadline:
                raise PskdError(
                    f"the master {address}:{port} is not reached from {socket.gethostname()} "
                    f"within --timeout {timeout_s:g}: {_reason(error)}. {_REACH}"
                ) from error
        time.sleep(_RETRY_S)


def clocks(here: World, nodes: Sequence[int]) -> list[Line]:
    """Collective. nodes: their first ranks; rank 0 gets a line for each other one."""
    lines = []
    for node in nodes[1:]:
        if here.rank == 0:
            lines.append(judged(node, _ask(here, node)))
        elif here.rank == node:
            _answer(here)
    return lines


def skew(stamps: Sequence[Stamp]) -> tuple[float, float]:
    """By how many seconds the other clock is ahead, and give or take how many."""
    fastest = min(stamps, key=lambda stamp: stamp.arrived - stamp.asked)
    middle = (fastest.asked + fastest.arrived) / 2
    return fastest.answered - middle, (fastest.arrived - fastest.asked) / 2


def judged(node: int, stamps: Sequence[Stamp]) -> Line:
    """Whether the clock of a node, named by its first rank, agrees with rank 0's."""
    ahead, give = skew(stamps)
    way = "ahead of" if ahead > 0 else "behind"
    text = f"rank {node}'s is {abs(ahead):.3f} s {way} rank 0's, give or take {give:.3f} s"
    if abs(ahead) - give > _MOST_SKEW_S:
        remedy = "Set the clocks by NTP: times of files, heartbeats and logs would mislead."
        return Line("clock", WARNING, text, remedy)
    return Line("clock", OK, text)


def _ask(here: World, rank: int) -> list[Stamp]:
    stamps, answer = [], torch.zeros(1, dtype=torch.float64)
    for _ in range(_QUESTIONS):
        asked = time.time()
        dist.send(answer, rank, group=here.control)
        dist.recv(answer, rank, group=here.control)
        stamps.append(Stamp(asked, float(answer), time.time()))
    return stamps


def _answer(here: World) -> None:
    box = torch.zeros(1, dtype=torch.float64)
    for _ in range(_QUESTIONS):
        dist.recv(box, 0, group=here.control)
        box[0] = time.time()
        dist.send(box, 0, group=here.control)


def _connect(address: str, port: int, timeout_s: float) -> None:
    socket.create_connection((address, port), timeout=timeout_s).close()


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError) and error.errno != errno.ETIMEDOUT:
        return "no answer"
    return error.strerror or str(error)
