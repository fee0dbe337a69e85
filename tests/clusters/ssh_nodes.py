"""Two machines that are one: names for the loopback, and an sshd of our own behind them.

Everything runs in namespaces that nobody else sees: process ids (DeepSpeed ends its launchers by `pkill`, which must
find ours alone), the network (a loopback of our own, so no port is taken) and mounts (host names, ssh's settings).
They end with their first process, and with them all that was started inside.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from potstill.common.processes import die_with_parent

NEEDED = ("sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter", "mount", "ip")
PORT = 2222
UNSHARE = ["unshare", "--pid", "--mount", "--net", "--fork", "--kill-child", "--mount-proc"]
SSHD = """Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
SSH = """Host node-a node-b
    IdentityFile {folder}/user_key
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking accept-new
    LogLevel ERROR
"""
START = """set -e
ip link set lo up
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
exec {sshd} -D -e -f {folder}/sshd_config
"""


def why_not() -> str | None:
    """What this machine lacks for it, or None."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (openssh-server, pdsh, util-linux, iproute2)"
    tried = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    return f"no right to make namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Nodes:
    """The machines node-a and node-b; `first` is the process whose namespaces they are."""

    first: int

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command as it is started from here to run on them."""
        return ["nsenter", "--target", str(self.first), "--pid", "--mount", "--net", "--", *command]

    def ranks(self, module: str) -> dict[int, int]:
        """Process ids, as they are called inside, of the running ranks of `python -u -m module`."""
        pattern = rf"^\S+ -u -m {re.escape(module)}\b"
        found = subprocess.run(self.inside(["pgrep", "-f", "--", pattern]), capture_output=True, text=True)
        return {int(self.environment_of(pid)["RANK"]): pid for pid in map(int, found.stdout.split())}

    def environment_of(self, pid: int) -> dict[str, str]:
        """Variables of a process on a node."""
        text = subprocess.run(self.inside(["cat", f"/proc/{pid}/environ"]), capture_output=True, check=True).stdout
        return dict(pair.split("=", 1) for pair in text.decode().split("\0") if "=" in pair)

    def terminate_script(self, name: str) -> None:
        """TERM to the shell that runs a script: to that alone."""
        subprocess.run(self.inside(["pkill", "-TERM", "-o", "-f", "--", f"^bash {name} "]), check=True)

    def kill(self, pid: int) -> None:
        subprocess.run(self.inside(["kill", "-KILL", str(pid)]), check=True)


@contextmanager
def ssh_nodes(folder: Path) -> Iterator[Nodes]:
    """The two machines, up as long as the context is open; their keys and logs lie in `folder`."""
    folder.mkdir()
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") or "sshd"
    (folder / "sshd_config").write_text(SSHD.format(folder=folder, port=PORT))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "hosts").write_text("127.0.0.1 localhost node-a\n127.0.0.2 node-b\n")
    (folder / "start.sh").write_text(START.format(folder=folder, sshd=sshd))
    with (folder / "sshd.log").open("wb") as log:
        outer = subprocess.Popen(
            [*UNSHARE, "bash", str(folder / "start.sh")],
            # What a machine that one comes to by ssh has, and none of our variables.
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    first = 0
    try:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        end = time.monotonic() + 20
        while "Server listening" not in (folder / "sshd.log").read_text():
            assert time.monotonic() < end and outer.poll() is None, (folder / "sshd.log").read_text()
            time.sleep(0.05)
        first = int(children.read_text().split()[0])
        yield Nodes(first)
    finally:
        if first:
            os.kill(first, signal.SIGKILL)  # and with it all of its process ids
        outer.kill()
        outer.wait(10)
