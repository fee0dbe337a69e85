"""One writer per run folder: a file `writer.json` names the processes that write there, until they are gone.

Two runs in one folder would overwrite each other's checkpoints and both end well. A lock of the system is not enough:
many network file systems keep such locks on each machine for itself. So the file says who writes (machine, boot,
process and its start, of every rank), and who finds it looks for evidence that they live: in the process table where
that is the same, else in the time stamp of the file, which the writer renews every few seconds. Nobody compares clocks
of two machines. A file of the dead is taken over without a person; a writer that was taken for dead notices it before
its next checkpoint, and ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError

log = logging.getLogger(__name__)
LOCK_FILE = "writer.json"
RENEW_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a renewal, watched from another machine
TORN_SECONDS = 10.0  # between the creation of a file and its content, where there are no hard links


class RunHeldError(UserError):
    """Another run writes to the folder."""


@dataclass(frozen=True)
class ProcessMark:
    """One process: what tells whether it still lives, to those who share its process table."""

    rank: int
    host: str
    boot: str  # of the kernel, empty where it does not say
    processes: str  # namespace of process ids, empty where there is none
    pid: int
    start: str  # in the kernel's ticks since the boot: a later process may have the same id

    @classmethod
    def here(cls, rank: int) -> ProcessMark:
        """That of this process."""
        return cls(rank, *_this_table(), os.getpid(), _start_of(os.getpid()) or "")

    @property
    def is_of_this_table(self) -> bool:
        """Whether the process would be seen from here."""
        return (self.host, self.boot, self.processes) == _this_table()

    @property
    def is_alive(self) -> bool:
        """Whether it runs; only for one of this table."""
        return _start_of(self.pid) == self.start

    def __str__(self) -> str:
        return f"rank {self.rank}, process {self.pid} on {self.host}"


def _this_table() -> tuple[str, str, str]:
    """Host, boot and namespace of the process ids that are seen from here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = processes = ""
    return socket.gethostname(), boot, processes


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since the boot; None where there is none, or one that waits to be reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Holder:
    """What the file says: who writes. One that is torn names nobody."""

    token: str
    since: str
    marks: tuple[ProcessMark, ...]

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Holder:
        """Read the file. Half a file, or another's, is a holder without names."""
        try:
            tree = json.loads(content)
            return cls(str(tree["token"]), str(tree["since"]), tuple(ProcessMark(**mark) for mark in tree["marks"]))
        except (ValueError, TypeError, KeyError):
            return cls("", "", ())

    def living(self) -> ProcessMark | None:
        """A process of it that is seen to run from here."""
        return next((mark for mark in self.marks if mark.is_of_this_table and mark.is_alive), None)

    @property
    def is_dead(self) -> bool:
        """Whether all of its processes would be seen from here, and none is."""
        return bool(self.marks) and all(mark.is_of_this_table and not mark.is_alive for mark in self.marks)


def _read(path: Path) -> tuple[Holder, int] | None:
    """Who holds, and the time stamp of the file, opened anew so that a network file system asks its server."""
    try:
        with open(path, "rb") as file:
            return Holder.from_bytes(file.read(1 << 24)), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def refuse_running(folder: Path) -> None:
    """Raise RunHeldError where a run is seen to write to the folder from here; nothing is touched or waited for."""
    found = _read(folder / LOCK_FILE)
    if found is not None and (living := found[0].living()) is not None:
        raise _held(folder, found[0], living)


def _held(folder: Path, holder: Holder, living: ProcessMark | None = None) -> RunHeldError:
    who = living or (holder.marks[0] if holder.marks else "a process that left no name")
    return RunHeldError(
        f"another run writes to {folder}: {who}, since {holder.since or 'now'}. Two runs in one folder would overwrite "
        "each other's checkpoints: wait for its end, stop it (touch "
        f"{folder / 'stop'}), or name another run.output_dir"
    )


@dataclass
class RunLock:
    """The right to write to a run folder. Rank 0 takes it for all ranks and renews it; a context that gives it back."""

    folder: Path
    marks: tuple[ProcessMark, ...]
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    _ended: threading.Event = field(default_factory=threading.Event)
    _renewer: threading.Thread | None = None

    @property
    def path(self) -> Path:
        return self.folder / LOCK_FILE

    def take(self) -> RunLock:
        """Take the folder, also from a run that is seen to be dead. Raises RunHeldError, OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        holder = Holder(self.token, time.strftime("%Y-%m-%d %H:%M:%S %z"), self.marks)
        while not self._create(holder.to_bytes()):
            if (found := _read(self.path)) is None:
                continue  # given back meanwhile
            if (living := found[0].living()) is not None:
                raise _held(self.folder, found[0], living)
            if not found[0].is_dead and self._is_renewed(*found):
                raise _held(self.folder, found[0])
            self._take_over(found[0])
        self._renewer = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._renewer.start()
        return self

    def _create(self, content: bytes) -> bool:
        """Make the file, with its content, unless there is one."""
        part = self.path.with_name(f".{LOCK_FILE}.{self.token}")
        try:
            part.write_bytes(content)
            try:
                os.link(part, self.path)
            except FileExistsError:
                return False
            except OSError:  # no hard links here: created first, filled then
                try:
                    handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                except FileExistsError:
                    return False
                with open(handle, "wb") as file:
                    file.write(content)
            return True
        finally:
            part.unlink(missing_ok=True)

    def _is_renewed(self, holder: Holder, stamp: int) -> bool:
        """Watch a file whose writer cannot be seen from here. False when it was not renewed in the time for it."""
        patience = STALE_SECONDS if holder.marks else TORN_SECONDS
        who = holder.marks[0] if holder.marks else "a process that left no name"
        log.warning("%s is held by %s, which is not seen from here; watching for %.0f s", self.folder, who, patience)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(min(0.5, patience / 10))
            if _read(self.path) != (holder, stamp):
                return True
        return False

    def _take_over(self, holder: Holder) -> None:
        """Put a file of the dead out of the way. Two may do so at once: a file of the living is put back."""
        aside = self.path.with_name(f".{LOCK_FILE}.{self.token}.stale")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        taken = _read(aside)
        if taken is not None and taken[0] != holder:
            self._create(taken[0].to_bytes())  # unless a third one was faster: then this one ends, by its check()
        else:
            log.warning("%s was held by a run that is gone (%s); it is taken over", self.folder, _names(holder))
        aside.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            if self._is_ours():
                with contextlib.suppress(OSError):  # the next one may succeed; whether it is ours, check() tells
                    os.utime(self.path)

    def _is_ours(self) -> bool:
        """Whether the file still names this run; a file system that does not answer has told nothing else."""
        try:
            found = _read(self.path)
        except OSError:
            return True
        return found is not None and found[0].token == self.token

    def check(self) -> None:
        """Raise RunHeldError where another run has taken the folder, because this one seemed to be dead."""
        if not self._is_ours():
            found = _read(self.path)
            who = "it has been removed" if found is None else f"it names {_names(found[0])}"
            raise RunHeldError(
                f"{self.path} is no longer that of this run: {who}. This run was taken for dead (was it stopped, or "
                "cut off from the file system?) and ends here without writing; the other one continues"
            )

    def give_back(self) -> None:
        """Remove the file, if it is still ours."""
        self._ended.set()
        if self._renewer is not None:
            self._renewer.join(timeout=RENEW_SECONDS)
        if self._is_ours():
            with contextlib.suppress(OSError):
                self.path.unlink()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: Any) -> None:
        self.give_back()


def _names(holder: Holder) -> str:
    return ", ".join(map(str, holder.marks[:3])) + (", ..." if len(holder.marks) > 3 else "") or "nobody"
