"""Two hosts on one machine: network namespaces joined by a cable, each with its own loopback."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SSH_PORT = 2222


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


@contextmanager
def ssh_servers(hosts: Hosts, at: Path, private: Path | None = None) -> Iterator[Path]:
    """An sshd on each host, and the folder of an `ssh` that all of them let in without a password.

    at: a directory for keys and configuration. private: as in `Hosts.prefix`.
    """
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
    at.mkdir()
    for key in ("host_key", "key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(at / key)], check=True
        )
    (at / "sshd_config").write_text(
        f"Port {SSH_PORT}\nHostKey {at}/host_key\nAuthorizedKeysFile {at}/key.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
    )
    (at / "bin").mkdir()
    client = at / "bin" / "ssh"
    client.write_text(
        "#!/bin/sh\n"
        f"exec /usr/bin/ssh -i {at}/key -o StrictHostKeyChecking=no "
        f'-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "$@"\n'
    )
    client.chmod(0o755)
    servers = []
    try:
        for host in (0, 1):
            command = ["/usr/sbin/sshd", "-D", "-f", str(at / "sshd_config"), "-E", str(at / "log")]
            servers.append(subprocess.Popen([*hosts.prefix(host, private), *command]))
        for address in ADDRESSES:
            probe = [*hosts.prefix(0), str(client), "-p", str(SSH_PORT), address, "true"]
            deadline = time.monotonic() + 30
            while subprocess.run(probe, check=False).returncode != 0:
                assert time.monotonic() < deadline, (at / "log").read_text()
                time.sleep(0.1)
        yield at / "bin"
    finally:
        for server in servers:
            server.terminate()
            server.wait()
