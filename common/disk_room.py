"""A file system that takes no more: how it shows, and what a person is told to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Libraries in Rust and C++ have errors of their own for those of the system, with its number or words in the text.
_WORDS = re.compile(
    rf"\(os error ({'|'.join(str(number) for number in sorted(NO_ROOM))})\)|errno:? ({errno.ENOSPC}|{errno.EDQUOT})\b|"
    "|".join(re.escape(os.strerror(number)) for number in sorted(NO_ROOM))
)


def is_no_room(error: BaseException) -> bool:
    """Whether this error, or one that it was raised from, is one of no space, a quota, or a limit on file sizes."""
    return any(
        getattr(one, "errno", None) in NO_ROOM
        if isinstance(one, OSError) and one.errno
        else bool(_WORDS.search(str(one)))
        for one in _chain(error)
    )


def free_room(place: Path | str) -> str:
    """How many bytes are free where `place` lies or is to lie: `1,234 bytes are free at FOLDER`."""
    folder = Path(os.path.abspath(place))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free:,} bytes are free at {folder}"


def place_of(error: BaseException) -> str | None:
    """The file that the error is about, where it says so."""
    return next((str(one.filename) for one in _chain(error) if isinstance(one, OSError) and one.filename), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
