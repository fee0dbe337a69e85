"""Where a store lives: a local folder (durable with fsync) or an object store, by the look of the path."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from potstill.storage.errors import CorruptError, NotAStoreError, ReadFailedError, WriteFailedError
from potstill.storage.files.absence import explain_absence
from potstill.storage.files.checked_json import is_torn
from potstill.storage.files.collecting import without_collection
from potstill.storage.files.durable import discard, publish_by_claim, sync_file, sync_folder, write_file
from potstill.storage.files.folder import SUBFOLDERS, Listed, StoreFolder, StorePath
from potstill.storage.files.hub_folder import HUB_SCHEME, HubFolder
from potstill.storage.files.object_paths import ObjectFolder
from potstill.storage.files.regular import file_size, file_status, is_regular, read_file, read_part
from potstill.storage.files.waiting import Wait, waiting_for

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
T = TypeVar("T")
_NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def open_folder(path: StorePath) -> StoreFolder:
    """Local folder, data set of the hub or object store, by the look of the path."""
    text = str(path)
    if text.startswith(HUB_SCHEME):
        return HubFolder(text)
    if "://" in text:
        return ObjectFolder(text)
    return LocalFolder(Path(text))


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn an OSError of a write into a WriteFailedError that says that nothing was committed."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "error")
        free = f", {_free_room(what)}" if error.errno in _NO_ROOM else ""
        raise WriteFailedError(
            f"writing {what} failed: {name} ({error.strerror or error}{free}); nothing was committed, "
            "free space or repair the file system and run again"
        ) from error


def _free_room(what: str) -> str:
    folder = Path(what)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free:,} bytes are free at {folder}"


class LocalFolder:
    """A POSIX or NFS folder. Files appear whole: temporary file, fsync, rename or link, fsync of the folder.

    Only regular files are read, and each look at the file system ends (waiting.py).
    """

    parallel_reads = 1
    max_create_bytes: int | None = None

    def __init__(self, root: Path) -> None:
        # Fixed at once, so that a later chdir does not move the store.
        self.root = Path(os.path.abspath(root))
        self.url = str(self.root)

    def prepare(self) -> None:
        self.check_writable()
        with writing(self.url):
            self.root.mkdir(parents=True, exist_ok=True)
            for name in SUBFOLDERS:
                (self.root / name).mkdir(exist_ok=True)
            probe = self._tmp_path()
            try:
                write_file(probe, b"probe")
            finally:
                discard(probe)
            sync_folder(self.root)

    def check_writable(self) -> None:
        self._waiting("", lambda wait: self._check_writable())

    def _check_writable(self) -> None:
        nearest = self.root
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        if not os.path.isdir(nearest):
            raise WriteFailedError(f"{self.url}: {nearest} is a file, expected a folder; name another path")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise WriteFailedError(f"{self.url}: {nearest} may not be written by this user; name another path")

    def explain_absence(self) -> str:
        return self._waiting("", lambda wait: explain_absence(self.root))

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        path, where = self.root / name, f"{self.url}/{name}"
        return self._waiting(name, lambda wait: read_file(path, wait, where=where, max_bytes=max_bytes))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        path, where = self.root / name, f"{self.url}/{name}"
        found = self._waiting(name, lambda wait: read_part(path, wait, where=where, offset=offset, length=length))
        if found is None:
            raise CorruptError(f"{where}: file is missing; restore it from a copy")
        return found

    def size(self, name: str) -> int | None:
        path, where = self.root / name, f"{self.url}/{name}"
        return self._waiting(name, lambda wait: file_size(path, where=where))

    def names(self, prefix: str, *, cuts: Sequence[str] = ()) -> list[str]:
        return self._waiting(prefix, lambda wait: self._names(prefix))

    @without_collection()
    def listing(self, prefix: str, *, cuts: Sequence[str] = (), suffix: str = "") -> dict[str, Listed]:
        names = [name for name in self.names(prefix, cuts=cuts) if name.endswith(suffix)]
        return self._waiting(prefix, lambda wait: self._looked_at(prefix, names, wait))

    def _looked_at(self, prefix: str, names: Sequence[str], wait: Wait) -> dict[str, Listed]:
        folder, found = str(self.root / prefix), {}
        for name in names:
            path = f"{folder}/{name}"
            status = file_status(path, where=path)
            wait.moved()
            if status is not None:  # None: removed since it was listed
                found[name] = Listed(status.st_size, status.st_mtime)
        return found

    @without_collection()
    def _names(self, prefix: str) -> list[str]:
        try:
            with os.scandir(self.root / prefix) as entries:
                found = list(entries)
            names = [entry.name for entry in found if is_regular(entry)]
            if prefix == "tmp":  # what a killed writer may have left there, see publish_by_claim
                folders = [entry for entry in found if entry.is_dir(follow_symlinks=False)]
                names += [f"{folder.name}/{inner}" for folder in folders for inner in _inside(folder.path)]
            return sorted(names)
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise NotAStoreError(f"{self.url}/{prefix} is not a folder") from None
        except OSError as error:
            raise ReadFailedError(f"{self.url}/{prefix}: cannot be listed ({error.strerror})") from error

    def put(self, name: str, data: bytes | memoryview) -> None:
        with writing(f"{self.url}/{name}"):
            tmp = self._tmp_path()
            try:
                write_file(tmp, data)
                os.rename(tmp, self.root / name)
            except OSError:
                discard(tmp)
                raise
            sync_folder((self.root / name).parent)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        final = self.root / name
        with writing(f"{self.url}/{name}"):
            tmp = self._tmp_path()
            try:
                write_file(tmp, data)
                made = self._link(tmp, final)
            finally:
                discard(tmp)
            if made is None:
                made = publish_by_claim(final, data, spare=self.root / "tmp")
            sync_folder(final.parent)
        return made

    def scratch(self) -> Path:
        return self._tmp_path()  # on the file system of the store, so that it can be linked

    def create_file(self, name: str, path: Path) -> bool:
        final = self.root / name
        with writing(f"{self.url}/{name}"):
            sync_file(path)
            made = self._link(path, final)
            if made is None:
                made = publish_by_claim(final, path.read_bytes(), spare=self.root / "tmp")
            sync_folder(final.parent)
        return made

    def put_file(self, name: str, path: Path) -> None:
        with writing(f"{self.url}/{name}"):
            sync_file(path)
            os.rename(path, self.root / name)
            sync_folder((self.root / name).parent)

    def replace_torn(self, name: str, data: bytes | memoryview) -> bool:
        with writing(f"{self.url}/{name}"):
            return publish_by_claim(self.root / name, data, spare=self.root / "tmp", is_torn=is_torn)

    def delete(self, name: str) -> None:
        path = self.root / name
        with writing(f"{self.url}/{name}"), contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if name.startswith("tmp/") and path.parent != self.root / "tmp":
            with contextlib.suppress(OSError):  # not empty, or not there
                path.parent.rmdir()

    def move(self, name: str, new_name: str) -> bool:
        source, target = self.root / name, self.root / new_name
        with writing(f"{self.url}/{new_name}"):
            target.parent.mkdir(exist_ok=True)
            sync_folder(self.root)
            try:
                os.rename(source, target)
            except FileNotFoundError:
                return False
            sync_folder(target.parent)
            sync_folder(source.parent)
        return True

    def remove_if_empty(self) -> None:
        spare = [self.root / "tmp" / name for name in _inside(str(self.root / "tmp"))]
        for folder in (*spare, *(self.root / name for name in SUBFOLDERS), self.root):
            with contextlib.suppress(OSError):  # not empty, not there, or no folder
                folder.rmdir()

    def _waiting(self, name: str, work: Callable[[Wait], T]) -> T:
        return waiting_for(f"{self.url}/{name}".rstrip("/"), work)

    def _tmp_path(self) -> Path:
        return self.root / "tmp" / f"{os.getpid():x}-{secrets.token_hex(8)}"

    def _link(self, tmp: Path, final: Path) -> bool | None:
        """True if the link was made, False if the name is taken, None where the file system has no hard links."""
        try:
            os.link(tmp, final)
        except FileExistsError:
            # An NFS server may repeat a link whose first answer was lost; the link count tells.
            return os.stat(tmp).st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            return None
        return True


def _inside(folder: str) -> list[str]:
    """Names in a folder, none of one that is gone."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
