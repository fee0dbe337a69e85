"""A file system that takes no more: how it shows, and one error that says where and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from potstill.common.errors import UserError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Libraries in Rust and C++ have errors of their own for those of the system, with its number or words in the text.
_WORDS = re.compile(
    "|".join([rf"\(os error {number}\)" for number in NO_ROOM] + [re.escape(os.strerror(number)) for number in NO_ROOM])
)


class NoRoomError(UserError):
    """A file could not be written because its file system, a quota or a limit on file sizes takes no more."""


def is_no_room(error: BaseException) -> bool:
    """Whether this error, or one that it was raised from, is one of no space, a quota, or a limit on file sizes."""
    one: BaseException | None = error
    while one is not None:
        if (isinstance(one, OSError) and one.errno in NO_ROOM) or _WORDS.search(str(one)):
            return True
        one = one.__cause__
    return False


def free_room(place: Path | str) -> str:
    """How many bytes are free where `place` lies or is to lie: `1,234 bytes are free at FOLDER`."""
    folder = Path(os.path.abspath(place))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free:,} bytes are free at {folder}"


def no_room_text(error: BaseException, place: Path | str | None = None) -> str:
    """One line for a person: what failed, where, how much is free there, what to do."""
    named = place if place is not None else getattr(error, "filename", None)
    cause = " ".join(str(error).split())
    if named is None:
        found, where = cause, "where this command writes (its output, or where standard output goes)"
    else:
        found, where = f"writing {named} failed: {cause} ({free_room(str(named))})", "there"
    return f"{found}; make room {where}, or raise the quota or the limit on file sizes, and run the same command again"


@contextlib.contextmanager
def room_for(place: Path, *, unfinished: Path | None = None) -> Iterator[None]:
    """Name `place` where a library says that there is no room for it. Raises NoRoomError.

    unfinished: what is written until it is whole, a file or folder; it is deleted after any error, because what it
    holds may be the bytes that are missing.
    """
    try:
        yield
    except BaseException as error:
        text = no_room_text(error, place) if is_no_room(error) and not isinstance(error, UserError) else None
        if unfinished is not None and unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        elif unfinished is not None:
            unfinished.unlink(missing_ok=True)
        if text is None:
            raise
        raise NoRoomError(text) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file that a person reads: all of it, or the former one stays. Raises NoRoomError and OSError.

    What is no regular file, as /dev/stdout, is written to and not replaced.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.part")
    with room_for(path, unfinished=part):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
