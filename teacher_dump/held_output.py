"""One writer at a time for an output folder, and nothing of a killed run that is in the way of the next."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from potstill.common.disk_room import free_room
from potstill.common.errors import UserError
from potstill.teacher_dump.kept_tokenizer import take_away_unsettled

log = logging.getLogger(__name__)

LOCK_FILE = "prepare.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_TRIES = 100  # each fails only where another run ends at that very moment


@contextlib.contextmanager
def held_output(output: Path | str, *, stores: tuple[str, ...]) -> Iterator[None]:
    """Hold the folder `output`, which is made, as the only prepare or import that writes there; `stores` lie in it.

    The lock is the system's, on a file that names its holder: it ends with the process, however that ends, and the
    file goes with it, as does a folder that is still empty. Raises UserError that names the holder. Outputs in object
    storage are not held: there the first run.json counts.
    """
    if not isinstance(output, Path):
        yield
        return
    output = Path(os.path.abspath(output))
    new_folders = [path for path in (output, *output.parents) if not path.exists()]
    file = output / LOCK_FILE
    try:
        number = _locked(file)
        try:
            take_away_unsettled(output / "tokenizer", any(_has_units(output / name) for name in stores))
            yield
        finally:
            file.unlink(missing_ok=True)  # while it is held: who opens it from now on makes another
            os.close(number)
    finally:
        for path in new_folders:
            with contextlib.suppress(OSError):  # there is something in it
                path.rmdir()


def _locked(file: Path) -> int:
    """An open lock file that this process holds. Raises UserError where another one does."""
    for _ in range(_TRIES):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # the other run has just taken its empty folder away
        try:
            _lock(number, file)
            if _is_the_file(number, file):
                _sign(number, file)
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    raise UserError(f"{file}: the file comes and goes; other runs write to {file.parent}: run one at a time")


def _lock(number: int, file: Path) -> None:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{file.parent}: another prepare or import writes there, {_holder(file)}. Wait for its end (the same "
            "command then finds the work done, another one is told what differs), or name another output"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks (%s); let one command at a time write there", file.parent, error)


def _is_the_file(number: int, file: Path) -> bool:
    """Whether the open file still has the name; its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(file))
    except FileNotFoundError:
        return False


def _sign(number: int, file: Path) -> None:
    who = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    try:
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps({**who, "program": Path(sys.argv[0]).name}).encode(), 0)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise UserError(
            f"writing {file} failed: {error.strerror} ({free_room(file)}); free space there, or name another output, "
            "and run the same command again"
        ) from error


def _holder(file: Path) -> str:
    try:
        who = json.loads(file.read_text())
        return f"process {who['pid']} on {who['host']}, started {who['started']}"
    except (OSError, ValueError, KeyError):
        return "which has just begun"


def _has_units(store: Path) -> bool:
    return any((store / "units").glob("u*.json"))
