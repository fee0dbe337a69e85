"""NodeFolder: files that one process of a node makes and all of them use, among them those of later runs.

Each file is a pure function of what its name says (sealed content and settings), so whoever finds it may use it once it
has passed its checks. What is made is claimed by a lock of the kernel on a file beside it: the lock is gone with the
process that holds it, however that ends, so a claim is never stale and needs no clock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from potstill.storage.errors import CorruptError, HungReadError, StoppedReadError, WriteFailedError
from potstill.storage.files.folder import StorePath
from potstill.storage.files.waiting import LIMIT_VARIABLE, POLL_SECONDS, WARN_VARIABLE, seconds_of, stop_reason

logger = logging.getLogger(__name__)

T = TypeVar("T")
TOLD_AFTER_SECONDS = 2.0  # a wait that a person would notice
_LOCK, _TMP = ".lock", ".tmp"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def default_node_root() -> Path:
    """Folder of this user below the temporary folder of the node (TMPDIR); it need not be there yet.

    Raises WriteFailedError where somebody else has made it, or more than its user may look into it.
    """
    root = Path(tempfile.gettempdir()) / f"potstill-{os.geteuid()}"
    check_private(root)
    return root


def check_private(path: Path) -> None:
    """WriteFailedError where something that is no folder of this user alone stands at `path`, or in the way to it."""
    if path.parent.exists() and not path.parent.is_dir():
        raise WriteFailedError(f"{path.parent} is no folder; name another place for what the processes of a node share")
    if os.path.lexists(path):
        make_private(path)


def make_private(path: Path) -> None:
    """Make a folder that only this user may look into; WriteFailedError where it is, or becomes, anything else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        status = os.lstat(path)
    except OSError as error:
        raise WriteFailedError(
            f"{path}: cannot be made ({error.strerror}); name another folder for what the processes of a node share"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise WriteFailedError(f"{path} is no folder; remove it, or name another place")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise WriteFailedError(
            f"{path} belongs to user {status.st_uid} with the permissions {stat.S_IMODE(status.st_mode):o}, expected "
            f"user {os.geteuid()} and 700: what lies there is used without asking the store again; remove it, run "
            f"`chmod 700 {path}` if it is yours, or name another place"
        )


class NodeFolder:
    """The private folder of this user below `root`, held to about `max_bytes`; made when something goes into it."""

    def __init__(self, root: StorePath, *, max_bytes: int) -> None:
        """Raises WriteFailedError where something else stands at its place."""
        self.path = Path(os.path.abspath(root)) / f"node-{os.geteuid()}"
        self.max_bytes = max_bytes
        check_private(self.path)

    def free_bytes(self) -> int:
        """Room on its disk, also before it is made."""
        place = self.path
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def once(self, name: str, make: Callable[[Path], None], load: Callable[[Path], T | None]) -> T:
        """What `load` finds in the file `name`, which `make` writes unless it is there: one process, the others wait.

        `load` gives None where there is no file or a damaged one. Raises what `make` raises (the next process then
        tries itself), WriteFailedError where the disk does not take it, and HungReadError where another process has the
        claim and does not get on.
        """
        path = self.path / name
        found = load(path)
        if found is None:
            self._prepare()
            with self._claim(name) as is_claimed:
                found = load(path)  # another process has made it, while this one waited
                if found is None:
                    self._make(name, make, clear=is_claimed)
                    found = load(path)
        if found is None:
            raise CorruptError(
                f"{path}: it was written just now and does not read back as it was; name a folder on another disk"
            )
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def _prepare(self) -> None:
        root = self.path.parent
        if not root.is_dir():
            make_private(root)
        make_private(self.path)

    def _make(self, name: str, make: Callable[[Path], None], *, clear: bool) -> None:
        tmp = self.path / f"{name}.{os.getpid():x}-{secrets.token_hex(4)}{_TMP}"
        try:
            if clear:  # what a process that was killed has left
                for old in self._parts(name):
                    old.unlink(missing_ok=True)
            make(tmp)
            os.rename(tmp, self.path / name)
        except OSError as error:
            raise WriteFailedError(
                f"{self.path / name}: cannot be written ({error.strerror or error}); free space there, or name another "
                "folder"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                tmp.unlink(missing_ok=True)
        self._make_room(name)

    def _parts(self, name: str) -> list[Path]:
        return [path for path in self.path.glob(f"{name}.*{_TMP}") if path.is_file()]

    def _make_room(self, name: str) -> None:
        """Remove the files that were used least lately; who has one open keeps it until the end."""
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.path):
                with contextlib.suppress(OSError):
                    if not entry.name.endswith(_LOCK):
                        found.append((entry.stat().st_mtime, entry.stat().st_size, entry))
        left = sum(size for _, size, _ in found)
        for _, size, entry in sorted(found, key=lambda item: item[0]):
            if left <= self.max_bytes:
                return
            if entry.name != name and not entry.name.endswith(_TMP):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
                left -= size

    @contextlib.contextmanager
    def _claim(self, name: str) -> Iterator[bool]:
        """The claim on `name`; False where the file system has no locks, so that two may make it at once."""
        path = self.path / (name + _LOCK)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise WriteFailedError(f"{path}: cannot be made ({error.strerror}); name another folder") from error
        try:
            is_claimed = self._lock(lock, name)
            if is_claimed:
                os.ftruncate(lock, 0)
                os.pwrite(lock, b"%d" % os.getpid(), 0)
            yield is_claimed
        finally:
            # Said, because a child of this process may hold the same descriptor.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _lock(self, lock: int, name: str) -> bool:
        began = since = time.monotonic()
        seen: object = None
        is_told = is_warned = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise WriteFailedError(f"{self.path}: cannot be locked ({error.strerror})") from error
                logger.warning("%s: no locks there (%s); each process makes its own", self.path, error.strerror)
                return False
            holder, now = os.pread(lock, 32, 0).decode(errors="replace") or "unknown", time.monotonic()
            state = (holder, self._written())
            if state != seen:
                seen, since = state, now
            what = f"{self.path / name}: process {holder} of this node makes it"
            if now - began > TOLD_AFTER_SECONDS and not is_told:
                is_told = True
                logger.info("%s; waiting for it", what)
            if now - since > seconds_of(WARN_VARIABLE) and not is_warned:
                is_warned = True
                logger.warning("%s and has written nothing for %.3g s", what, now - since)
            if now - since > seconds_of(LIMIT_VARIABLE):
                raise HungReadError(
                    f"{what} and has written nothing for {now - since:.3g} s, at most {seconds_of(LIMIT_VARIABLE):.3g} "
                    f"are waited for ({LIMIT_VARIABLE}); end that process, or see that its disk and store answer, then "
                    "run the same command again"
                )
            if stop_reason() is not None:
                raise StoppedReadError(f"stopped by {stop_reason()} while waiting: {what}")
            time.sleep(POLL_SECONDS / 2)

    def _written(self) -> int:
        """Bytes of all that is being written: who makes one file may need another one first, as a check an index."""
        total = 0
        for part in self._parts("*"):
            with contextlib.suppress(OSError):
                total += part.stat().st_size
        return total
