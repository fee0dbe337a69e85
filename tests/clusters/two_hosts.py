"""Two hosts on one machine: each with its own network, process ids and name, and a cable between them to pull.

Their addresses are loopback ones (127.77.0.1 and .2) on a pair of virtual interfaces, which `route_localnet` allows:
nothing of it can be reached from, or reach, anything but these two. They share this machine's files as two hosts share
a folder. Nothing has a name outside: the namespaces end with their first process, and the cable with them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from potstill.common.processes import die_with_parent

CABLE = "cable0"
START = """set -e
hostname {name}
mount --bind {hosts} /etc/hosts
ip link set lo up
ip address del 127.0.0.1/8 dev lo
ip address add 127.0.0.1/32 dev lo
for file in /proc/sys/net/ipv4/conf/*/route_localnet; do echo 1 > $file; done
echo ready
exec sleep infinity
"""
PLUG = f"""set -e
echo 1 > /proc/sys/net/ipv4/conf/{CABLE}/route_localnet
ip address add {{address}}/24 dev {CABLE}
ip link set {CABLE} up
"""
UNSHARE = ["unshare", "--net", "--pid", "--uts", "--mount", "--fork", "--kill-child", "--mount-proc"]


def why_not() -> str | None:
    """What this machine lacks for it, or None."""
    missing = [name for name in ("unshare", "nsenter", "ip", "hostname") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (util-linux, iproute2)"
    tried = subprocess.run(
        [
            *UNSHARE,
            "sh",
            "-c",
            "ip link add cable0 type veth peer name cable1 && echo 1 > /proc/sys/net/ipv4/conf/cable0/route_localnet",
        ],
        capture_output=True,
        text=True,
    )
    return f"no right to make network namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Host:
    """One of the two; `first` is the process whose namespaces it is."""

    name: str
    address: str
    first: int

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command as it is started from here to run there."""
        return ["nsenter", "--target", str(self.first), "--all", "--", *command]

    def run(self, *command: str) -> str:
        return subprocess.run(self.inside(command), capture_output=True, text=True, check=True, timeout=30).stdout

    def pull_the_cable(self) -> None:
        """From now on nothing comes or leaves; nobody is told."""
        self.run("ip", "link", "set", CABLE, "down")

    def plug_it_in_again(self) -> None:
        self.run("ip", "link", "set", CABLE, "up")

    def power_off(self) -> None:
        """End every process there at once."""
        with suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)

    def processes(self) -> str:
        return self.run("ps", "ax", "-o", "pid,args")


def _start(name: str, hosts: Path) -> tuple[subprocess.Popen[bytes], int]:
    outer = subprocess.Popen(
        [*UNSHARE, "bash", "-c", START.format(name=name, hosts=hosts)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    assert outer.stdout is not None
    assert outer.stdout.readline() == b"ready\n", f"host {name} has not come up"
    end = time.monotonic() + 10
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    while not (found := children.read_text().split()):
        assert time.monotonic() < end
    return outer, int(found[0])


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """host-a and host-b with the cable plugged in, up as long as the context is open; their names lie in `folder`."""
    names = folder / "etc-hosts"
    names.write_text("127.0.0.1 localhost\n127.77.0.1 host-a\n127.77.0.2 host-b\n")
    outers: list[subprocess.Popen[bytes]] = []
    hosts: list[Host] = []
    try:
        for number, letter in enumerate("ab", 1):
            outer, first = _start(f"host-{letter}", names)
            outers.append(outer)
            hosts.append(Host(f"host-{letter}", f"127.77.0.{number}", first))
        a, b = hosts
        make = ["ip", "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(b.first)]
        # By the other's process id as it is called here: only the network of the first host is entered.
        subprocess.run(["nsenter", "--target", str(a.first), "--net", "--", *make], check=True, timeout=30)
        for host in hosts:
            host.run("bash", "-c", PLUG.format(address=host.address))
        yield a, b
    finally:
        for host in hosts:
            host.power_off()
        for outer in outers:
            outer.kill()
            outer.wait(10)
            if outer.stdout is not None:
                outer.stdout.close()
