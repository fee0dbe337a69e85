"""Read regular files, and no others: a pipe or a device in place of one would be waited for or read without end."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from potstill.storage.errors import CorruptError, ReadFailedError
from potstill.storage.files.waiting import Wait

# One read: what a slow disk gives within seconds, so that a large file that comes steadily is never taken for a hang.
PIECE_BYTES = 16 << 20
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path | str, *, where: str) -> int:
    """A descriptor for reading. Raises CorruptError unless it is of a regular file or a link to one, and OSError."""
    try:
        # Looked at when it is open, so that nothing can take its place in between; without O_NONBLOCK the open itself
        # would wait for somebody to write into a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_a_file(where, "a symbolic link that leads to itself") from None
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device that is not there
            require_regular(os.stat(path).st_mode, where=where)
        raise
    try:
        require_regular(os.fstat(fd).st_mode, where=where)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def require_regular(mode: int, *, where: str) -> None:
    """Raise CorruptError unless the mode (of `os.stat`) is that of a regular file."""
    if not stat.S_ISREG(mode):
        raise _not_a_file(where, next((name for holds, name in _KINDS if holds(mode)), "no regular file"))


def _not_a_file(where: str, found: str) -> CorruptError:
    return CorruptError(
        f"{where} is {found}, expected a regular file; take it away and restore the file from a copy, or run the "
        "command that writes it again"
    )


def read_file(path: Path | str, wait: Wait, *, where: str, max_bytes: int) -> bytes | None:
    """A whole file of at most `max_bytes`, None where there is none. Raises CorruptError and ReadFailedError."""
    return _reading(path, where, lambda fd: _whole(fd, wait, where=where, max_bytes=max_bytes))


def read_part(path: Path | str, wait: Wait, *, where: str, offset: int, length: int) -> bytes | None:
    """Exactly `length` bytes from `offset` on, None where there is no file. Raises CorruptError, ReadFailedError."""
    return _reading(path, where, lambda fd: _part(fd, wait, where=where, offset=offset, length=length))


def file_size(path: Path | str, *, where: str) -> int | None:
    """Bytes of a regular file, None where there is none. Raises CorruptError and ReadFailedError."""
    status = file_status(path, where=where)
    return None if status is None else status.st_size


def file_status(path: Path | str, *, where: str) -> os.stat_result | None:
    """What the system tells of a regular file, None where there is none. Raises CorruptError and ReadFailedError."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_a_file(where, "a symbolic link that leads to itself") from None
        raise ReadFailedError(f"{where}: cannot be looked at ({error.strerror})") from error
    require_regular(status.st_mode, where=where)
    return status


def is_regular(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a regular file or a link to one."""
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself, or to a place that cannot be looked at: no file to be read
        return False


def _reading(path: Path | str, where: str, work: Callable[[int], bytes]) -> bytes | None:
    try:
        fd = open_regular(path, where=where)
        try:
            return work(fd)
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ReadFailedError(f"{where}: cannot be read ({error.strerror})") from error


def _whole(fd: int, wait: Wait, *, where: str, max_bytes: int) -> bytes:
    size = os.fstat(fd).st_size
    if size > max_bytes:
        raise CorruptError(f"{where}: {size} bytes, at most {max_bytes} expected")
    return b"".join(_pieces(fd, wait, 0, size))  # one that is cut meanwhile comes short, and its checksum tells


def _part(fd: int, wait: Wait, *, where: str, offset: int, length: int) -> bytes:
    size = os.fstat(fd).st_size
    if offset + length > size:
        raise CorruptError(
            f"{where}: {size} bytes, expected at least {offset + length} (truncated file); restore it from a copy"
        )
    pieces = _pieces(fd, wait, offset, length)
    found = sum(map(len, pieces))
    if found < length:
        raise CorruptError(
            f"{where}: ended at {offset + found}, expected {offset + length} (cut meanwhile); restore it from a copy"
        )
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _pieces(fd: int, wait: Wait, offset: int, length: int) -> list[bytes]:
    pieces: list[bytes] = []
    done = 0
    while done < length:
        piece = os.pread(fd, min(length - done, PIECE_BYTES), offset + done)
        if not piece:
            break
        pieces.append(piece)
        done += len(piece)
        wait.moved()
    return pieces
