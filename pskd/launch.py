"""What the launcher says about this process, and its tie to the launcher's life. No torch.

torchrun and deepspeed set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Without a
launcher we set them ourselves: DeepSpeed would look for mpi4py otherwise.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pskd.errors import EXIT_FAILED, AgreedError, PskdError

_PR_SET_PDEATHSIG = 1
_LAST_WORD_S = 5.0


@dataclass(frozen=True)
class Launch:
    """The place of this process among all: ranks are 0-based."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def is_launched() -> bool:
    """Whether torchrun or deepspeed started this process, and not a person."""
    return "RANK" in os.environ


def rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The rank on its node that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def leave_the_last_word() -> None:
    """Before a failure that another rank tells of: let that rank end first.

    A launcher ends all ranks as soon as one has failed, so the one that speaks might not get to.
    Returns after some seconds, should no launcher end this process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training may have made it a mere request
    time.sleep(_LAST_WORD_S)


def refuse(error: PskdError) -> None:
    """Say why this process ends: once for all ranks if they agreed on it, else once a node.

    The others leave the last word. A node's ranks have one command line and one file system.
    """
    if (rank() if isinstance(error, AgreedError) else local_rank()) > 0:
        leave_the_last_word()
    else:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()


def end(code: int) -> NoReturn:
    """End this process: after a failure at once, as process groups whose peers are gone, and
    threads that still work, may abort an orderly end.
    """
    if code == EXIT_FAILED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def from_environment() -> Launch:
    """Read the launcher's variables, or set those of a single process."""
    if not is_launched():
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="0",  # any free one: nobody else has to find it
        )
    env = os.environ
    local_size = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or "1"
    return Launch(
        rank=rank(),
        local_rank=local_rank(),
        world_size=int(env["WORLD_SIZE"]),
        local_world_size=int(local_size),
    )


def die_with_launcher() -> None:
    """End this process when the launcher ends, however it ends.

    torch starts workers in sessions of their own, so they outlive a killed torchrun. The kernel's
    parent-death signal ends them; a parent that dies during the call shows in a changed ppid, and
    a torchrun that died before it in an heir: init, which is no torchrun.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or ("TORCHELASTIC_RUN_ID" in os.environ and _is_init(parent)):
        os.kill(os.getpid(), signal.SIGKILL)


def _is_init(pid: int) -> bool:
    """Whether it takes over orphans. In a container, torchrun itself may be process 1."""
    return pid == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes()


def choose_interface() -> None:
    """Let gloo use the interface that routes to the master, unless the user chose one.

    gloo binds what the host name resolves to, which is loopback on many hosts.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        interface, _ = route(os.environ["MASTER_ADDR"])
        if interface is not None:  # an unreachable master is named by the rendezvous itself
            os.environ["GLOO_SOCKET_IFNAME"] = interface


def route(master: str) -> tuple[str | None, str | None]:
    """The interface and the own address by which this host reaches an address; None: no way."""
    import psutil  # noqa: PLC0415  (a launcher may die while it is imported)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))  # UDP: sends nothing
        except OSError:
            return None, None
        own = str(probe.getsockname()[0])
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == own for a in addresses):
            return name, own
    return None, own
