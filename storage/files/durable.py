"""Durable writes of whole local files, and an exclusive publication where hard links do not exist."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

from potstill.storage.errors import WriteFailedError
from potstill.storage.files.regular import read_file
from potstill.storage.files.waiting import waiting_for

logger = logging.getLogger(__name__)

CLAIM = "claim-"  # folders in tmp/, see publish_by_claim
_CONTENT = "whole"
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY}
_ATTEMPTS = 100


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file that must not exist yet, down to the disk. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(data)
        while len(view):
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Bring what was written to a file down to the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder down to the disk. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def discard(path: Path) -> None:
    """Remove a file of our own; leftovers in tmp/ are harmless and swept by gc."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("could not remove %s (%s); gc will sweep it", path, error.strerror)


def publish_by_claim(
    final: Path, data: bytes | memoryview, *, spare: Path, is_torn: Callable[[bytes], bool] = lambda found: False
) -> bool:
    """Publish `data` as `final` unless a whole file is there; True if `final` then holds `data`.

    For file systems without hard links, and to replace what `is_torn` says is a file that was never finished. `spare`
    is a folder of the same file system. Raises OSError and StoreError.

    A folder can be renamed only to a name that is free or that of an empty folder: so exactly one writer brings the
    folder with its content to the name of the claim, whole, in one step. From there anybody publishes it by a rename,
    also for a claimant that was killed: all write the same bytes. A claim is swept only after its file is there, so
    one that comes later finds the file and has lost.
    """
    claim = spare / f"{CLAIM}{final.name}"
    bound = max(len(data), 1 << 30)
    for _ in range(_ATTEMPTS):
        found = _read(final, bound)
        if found is not None and not is_torn(found):
            _sweep(claim)
            return found == data
        content = _read(claim / _CONTENT, bound)
        if content is None:
            _claim(claim, data, spare)
            continue
        # Asked again behind the look at the claim: the claim of an earlier round has its file there by now.
        found = _read(final, bound)
        if found is None or is_torn(found):
            part = spare / _new_name()
            try:
                write_file(part, content)
                os.rename(part, final)
            finally:
                discard(part)
            sync_folder(final.parent)
    raise WriteFailedError(
        f"{final}: not published in {_ATTEMPTS} attempts, other writers take it away again; see what else writes here"
    )


def _claim(claim: Path, data: bytes | memoryview, spare: Path) -> None:
    """Bring `data` to the claim's name unless a content stands there."""
    box = spare / _new_name()
    os.mkdir(box)
    try:
        write_file(box / _CONTENT, data)
        os.rename(box, claim)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
    finally:
        if box.exists():
            _sweep(box)


def _sweep(folder: Path) -> None:
    """Remove a claim that has done its work, or a box that was not needed; another one may do so at the same time."""
    discard(folder / _CONTENT)
    with contextlib.suppress(OSError):  # gone, or another writer's by now: it sweeps its own
        folder.rmdir()


def _read(path: Path, max_bytes: int) -> bytes | None:
    return waiting_for(str(path), partial(read_file, path, where=str(path), max_bytes=max_bytes))


def _new_name() -> str:
    return f"{os.getpid():x}-{secrets.token_hex(8)}"
