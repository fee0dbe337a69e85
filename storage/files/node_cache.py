"""NodeCache: record batches of remote stores kept on a local disk, shared by the processes of a node.

Entries are written once under their final name by rename; two processes may fetch the same one, the second rename is
harmless. What is read from here passes the same checksum as what comes from the store. Eviction is by size, oldest use
first; losing an entry only costs another fetch. The size is that of all processes: each looks at the folder again when
it has added a sixteenth of what may lie there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import threading
from functools import partial
from pathlib import Path

from potstill.storage.errors import CorruptError, GaveUpError, ReadFailedError, WriteFailedError
from potstill.storage.files.regular import read_file
from potstill.storage.files.waiting import waiting_for

logger = logging.getLogger(__name__)

SUFFIX = ".batch"
MAX_ENTRY_BYTES = 1 << 32  # no record batch is longer
_LOOKS = 16  # at the folder, while one process fills it


class NodeCache:
    """A folder of cached byte ranges, at most `max_bytes`, and at most half of what its disk has for them."""

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self._folder, self._max_bytes = Path(os.path.abspath(folder)), max_bytes
        self._lock = threading.Lock()
        self._added = 0  # since this process looked at the folder
        self._is_failing = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._num_bytes = sum(size for _, size, _ in self._entries())
        except OSError as error:
            raise WriteFailedError(
                f"node cache {self._folder}: cannot be made or listed ({error.strerror}); name another cache folder"
            ) from error

    def get(self, key: str) -> bytes | None:
        """Cached bytes of `key`, or None. Raises HungReadError or StoppedReadError where the disk does not answer."""
        path = str(self._folder / (key + SUFFIX))
        try:
            data = waiting_for(path, partial(read_file, path, where=path, max_bytes=MAX_ENTRY_BYTES))
        except GaveUpError:
            raise
        except (CorruptError, ReadFailedError) as error:
            logger.warning("node cache: %s; read from the store instead", error)
            return None
        if data is not None:
            with contextlib.suppress(OSError):  # another process may have evicted it
                os.utime(path)
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep bytes that passed their checksum; a full or failing disk only disables caching of this entry."""
        tmp = self._folder / f"{os.getpid():x}-{secrets.token_hex(6)}.tmp"
        try:
            tmp.write_bytes(data)
            os.rename(tmp, self._folder / (key + SUFFIX))
        except OSError as error:
            # Once while it lasts: a full disk stays full for every row that is read.
            if not self._is_failing:
                logger.warning("node cache %s: could not keep an entry (%s)", self._folder, error.strerror)
            self._is_failing = True
            with contextlib.suppress(OSError):
                tmp.unlink(missing_ok=True)
            return
        self._is_failing = False
        with self._lock:
            self._num_bytes += len(data)
            self._added += len(data)
            if self._num_bytes > self._max_bytes or self._added > self._max_bytes // _LOOKS:
                self._evict()

    def drop(self, key: str) -> None:
        """Forget an entry that failed its checksum."""
        with contextlib.suppress(OSError):
            (self._folder / (key + SUFFIX)).unlink(missing_ok=True)

    def _entries(self) -> list[tuple[float, int, Path]]:
        found = []
        for entry in os.scandir(self._folder):
            with contextlib.suppress(OSError):
                if entry.name.endswith(SUFFIX):
                    status = entry.stat()
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return found

    def _evict(self) -> None:
        """Look at what lies there; if it is too much, down to three quarters, so that not every put sweeps."""
        try:
            entries = sorted(self._entries())
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            logger.warning("node cache %s: could not be listed to make room (%s)", self._folder, error.strerror)
            return
        self._num_bytes, self._added = sum(size for _, size, _ in entries), 0
        most = min(self._max_bytes, (self._num_bytes + free) // 2)
        if self._num_bytes <= most:
            return
        for _, size, path in entries:
            if self._num_bytes <= most * 3 // 4:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            self._num_bytes -= size
