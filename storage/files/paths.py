"""Where a store lives: a local folder (durable with fsync) or an object store, by the look of the path."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from potstill.storage.errors import CorruptError, NotAStoreError, ReadFailedError, WriteFailedError
from potstill.storage.files.absence import explain_absence
from potstill.storage.files.folder import SUBFOLDERS, StoreFolder, StorePath
from potstill.storage.files.object_paths import ObjectFolder

logger = logging.getLogger(__name__)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


def open_folder(path: StorePath) -> StoreFolder:
    """Local folder or object store, by the look of the path."""
    text = str(path)
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
    """A POSIX or NFS folder. Files appear whole: temporary file, fsync, rename or link, fsync of the folder."""

    parallel_reads = 1

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
                self._write_file(probe, b"probe")
            finally:
                _discard(probe)
            self._sync_folder(self.root)

    def check_writable(self) -> None:
        nearest = self.root
        while not os.path.lexists(nearest):
            nearest = nearest.parent
        if not os.path.isdir(nearest):
            raise WriteFailedError(f"{self.url}: {nearest} is a file, expected a folder; name another path")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise WriteFailedError(f"{self.url}: {nearest} may not be written by this user; name another path")

    def explain_absence(self) -> str:
        return explain_absence(self.root)

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        try:
            with open(self.root / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > max_bytes:
                    raise CorruptError(f"{self.url}/{name}: {size} bytes, at most {max_bytes} expected")
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ReadFailedError(f"{self.url}/{name}: cannot be read ({error.strerror})") from error

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        try:
            fd = os.open(self.root / name, os.O_RDONLY)
        except FileNotFoundError:
            raise CorruptError(f"{self.url}/{name}: file is missing; restore it from a copy") from None
        except OSError as error:
            raise ReadFailedError(f"{self.url}/{name}: cannot be opened ({error.strerror})") from error
        try:
            size = os.fstat(fd).st_size
            if offset + length > size:
                raise CorruptError(
                    f"{self.url}/{name}: {size} bytes, expected at least {offset + length} (truncated file)"
                )
            pieces, done = [], 0
            while done < length:
                piece = os.pread(fd, length - done, offset + done)
                if not piece:
                    raise CorruptError(f"{self.url}/{name}: ended at {offset + done}, expected {offset + length}")
                pieces.append(piece)
                done += len(piece)
        except OSError as error:
            raise ReadFailedError(f"{self.url}/{name}: read at {offset} failed ({error.strerror})") from error
        finally:
            os.close(fd)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def size(self, name: str) -> int | None:
        try:
            return os.stat(self.root / name).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ReadFailedError(f"{self.url}/{name}: cannot be looked at ({error.strerror})") from error

    def names(self, prefix: str) -> list[str]:
        return sorted(entry.name for entry in self._files(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        sizes = (
            (entry.name, self.size(f"{prefix}/{entry.name}" if prefix else entry.name)) for entry in self._files(prefix)
        )
        return {name: size for name, size in sizes if size is not None}  # None: removed since it was listed

    def _files(self, prefix: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / prefix) as entries:
                return [entry for entry in entries if entry.is_file(follow_symlinks=False)]
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
                self._write_file(tmp, data)
                os.rename(tmp, self.root / name)
            except OSError:
                _discard(tmp)
                raise
            self._sync_folder((self.root / name).parent)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        final = self.root / name
        with writing(f"{self.url}/{name}"):
            tmp = self._tmp_path()
            try:
                self._write_file(tmp, data)
                made = self._link(tmp, final, data)
            finally:
                _discard(tmp)
            self._sync_folder(final.parent)
        return made

    def delete(self, name: str) -> None:
        with writing(f"{self.url}/{name}"), contextlib.suppress(FileNotFoundError):
            os.unlink(self.root / name)

    def move(self, name: str, new_name: str) -> bool:
        source, target = self.root / name, self.root / new_name
        with writing(f"{self.url}/{new_name}"):
            target.parent.mkdir(exist_ok=True)
            self._sync_folder(self.root)
            try:
                os.rename(source, target)
            except FileNotFoundError:
                return False
            self._sync_folder(target.parent)
            self._sync_folder(source.parent)
        return True

    def remove_if_empty(self) -> None:
        for folder in (*(self.root / name for name in SUBFOLDERS), self.root):
            with contextlib.suppress(OSError):  # not empty, or not there
                folder.rmdir()

    def map(self, name: str, size: int) -> memoryview | None:
        if size == 0:
            return memoryview(b"")
        try:
            with open(self.root / name, "rb") as file:
                return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise ReadFailedError(f"{self.url}/{name}: cannot be mapped ({error})") from error

    def _tmp_path(self) -> Path:
        return self.root / "tmp" / f"{os.getpid():x}-{secrets.token_hex(8)}"

    def _write_file(self, path: Path, data: bytes | memoryview, flags: int = 0) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o666)
        try:
            view = memoryview(data)
            while len(view):
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _link(self, tmp: Path, final: Path, data: bytes | memoryview) -> bool:
        try:
            os.link(tmp, final)
        except FileExistsError:
            # An NFS server may repeat a link whose first answer was lost; the link count tells.
            return os.stat(tmp).st_nlink == 2
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            return self._create_without_links(final, data)
        return True

    def _create_without_links(self, final: Path, data: bytes | memoryview) -> bool:
        try:
            self._write_file(final, data)
        except FileExistsError:
            return False
        except OSError:
            _discard(final)
            raise
        return True

    def _sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _discard(path: Path) -> None:
    """Remove a file of our own; leftovers in tmp/ are harmless and swept by gc."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("could not remove %s (%s); gc will sweep it", path, error.strerror)
