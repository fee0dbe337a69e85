"""A copy of a remote store's index on the node: fetched once, in large ranges, and read by every process there.

A row in global order would otherwise cost a request and a whole block of the index beside its own bytes, and each rank
would read all of it for one statistic. The copy is held against the sha256 of the manifest when it comes, and every
block against its crc32 whenever it is read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from functools import partial
from pathlib import Path

from potstill.storage.errors import CorruptError, ReadFailedError, WriteFailedError
from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.node_folder import NodeFolder
from potstill.storage.files.regular import open_regular
from potstill.storage.files.waiting import Wait, waiting_for
from potstill.storage.store.threads import in_threads

logger = logging.getLogger(__name__)

RANGE_BYTES = 48 << 20  # of 24 million rows with five statistics 27 requests, each well within its time limit
NUM_RANGES = 4  # that are under way, and in memory, at once
_HASHED_BYTES = 8 << 20
_ATTEMPTS = 2


class IndexCopy:
    """An open copy; it may lose its name while it is in use, to make room for others."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path, self._fd = path, open_regular(path, where=self.where)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; CorruptError where the copy was cut, ReadFailedError where the disk fails."""
        try:
            data = waiting_for(self.where, lambda wait: os.pread(self._fd, length, offset))
        except OSError as error:
            raise ReadFailedError(f"{self.where}: cannot be read ({error.strerror})") from error
        if len(data) != length:
            raise CorruptError(f"{self.where}: ended at {offset + len(data)}, expected {offset + length}")
        return data

    def remove(self) -> None:
        """Take away its name, so that no other process uses it."""
        self._path.unlink(missing_ok=True)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)


def copy_of_index(node: NodeFolder, folder: StoreFolder, name: str, *, num_bytes: int, sha256: str) -> IndexCopy | None:
    """The node's copy of `name`, fetched if it is not there; None where there is no room for it, which is said.

    Raises CorruptError where what the store gives does not fit the sha256, and what reading it raises.
    """
    where = f"{folder.url}/{name}"
    free = node.free_bytes()
    if num_bytes > min(node.max_bytes, free):
        logger.warning(
            "%s: no copy of its %d bytes is kept in %s (%d bytes free, at most %d are used); every look-up of a row "
            "asks the store", where, num_bytes, node.path, free, node.max_bytes,
        )  # fmt: skip
        return None
    try:
        return node.once(
            f"index-{sha256[:32]}.arrow",
            partial(_fetch, folder=folder, name=name, num_bytes=num_bytes, sha256=sha256),
            partial(_load, num_bytes=num_bytes),
        )
    except WriteFailedError as error:
        logger.warning("%s; every look-up of a row asks the store %s", error, folder.url)
        return None


def _fetch(path: Path, *, folder: StoreFolder, name: str, num_bytes: int, sha256: str) -> None:
    logger.info("%s/%s: fetching %d bytes for this node", folder.url, name, num_bytes)
    for attempt in range(1, _ATTEMPTS + 1):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            get = partial(_get, fd, folder=folder, name=name, num_bytes=num_bytes)
            for _ in in_threads(folder, get, range(0, num_bytes, RANGE_BYTES), most=NUM_RANGES):
                pass
            if _sha256(fd) == sha256:
                return
        finally:
            os.close(fd)
        logger.warning("%s/%s: attempt %d of %d does not fit its sha256", folder.url, name, attempt, _ATTEMPTS)
    raise CorruptError(
        f"{folder.url}/{name}: content does not fit the sha256 of the manifest; run `potstill repair {folder.url}`, "
        "which takes it out, and seal again"
    )


def _get(fd: int, offset: int, *, folder: StoreFolder, name: str, num_bytes: int) -> None:
    data = memoryview(folder.read_range(name, offset, min(RANGE_BYTES, num_bytes - offset)))
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _sha256(fd: int) -> str:
    """Of what the disk gives back, not of what came."""
    digest, place = hashlib.sha256(), 0
    while data := os.pread(fd, _HASHED_BYTES, place):
        digest.update(data)
        place += len(data)
    return digest.hexdigest()


def _load(path: Path, *, num_bytes: int) -> IndexCopy | None:
    def look(wait: Wait) -> IndexCopy:
        return IndexCopy(path)

    try:
        found = waiting_for(str(path), look)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WriteFailedError(f"{path}: cannot be read ({error.strerror})") from error
    if found.num_bytes != num_bytes:
        logger.warning("%s: %d bytes, expected %d; it is fetched again", path, found.num_bytes, num_bytes)
        return None
    return found
