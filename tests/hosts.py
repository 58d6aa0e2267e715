"""Two hosts on one machine: network namespaces joined by a cable, each with its own loopback."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    """The command of iproute2."""
    subprocess.run(["ip", *arguments], check=True)


class Hosts:
    """Names of the namespaces, by number."""

    def __init__(self, tag: str) -> None:
        self.names = [f"pskd-{tag}-{number}" for number in (0, 1)]
        self._cables = [f"v{tag}-{number}" for number in (0, 1)]

    def prefix(self, host: int, private: Path | None = None) -> list[str]:
        """What to put before a command: it runs on that host.

        private: a directory of which the host sees a disk of its own.
        """
        inside = ["ip", "netns", "exec", self.names[host]]
        if private is None:
            return inside
        disk = private.with_name(f"disk-of-host-{host}")
        disk.mkdir(exist_ok=True)
        private.mkdir(exist_ok=True)
        script = 'mount --bind "$0" "$1" && shift && exec "$@"'
        return [*inside, "unshare", "--mount", "sh", "-c", script, str(disk), str(private)]

    def cut(self) -> None:
        """Pull the cable."""
        ip("-n", self.names[1], "link", "set", self._cables[1], "down")

    def mend(self) -> None:
        """And plug it in again."""
        ip("-n", self.names[1], "link", "set", self._cables[1], "up")

    def connect(self) -> None:
        """Make them."""
        for name in self.names:
            ip("netns", "add", name)
        first, second = self._cables
        ip("link", "add", first, "type", "veth", "peer", "name", second)
        for name, cable, address in zip(self.names, self._cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Their end; the cable goes with them."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)


@contextmanager
def two_hosts(tag: str) -> Iterator[Hosts]:
    """For as long as the block runs. tag: short, of one test at a time."""
    hosts = Hosts(tag)
    try:
        hosts.connect()
        yield hosts
    finally:
        hosts.remove()
