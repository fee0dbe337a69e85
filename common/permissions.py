"""Who may write: a warning, once, for a place that every user of the machine may change."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

_SHOWN = 3
_told: set[str] = set()


def world_writable(paths: Iterable[Path]) -> list[Path]:
    """Those of the files and folders that every user may write, in order; links count as what they lead to.

    What is not there, or may not be looked at, is left out: opening it has an error of its own.
    """
    found = []
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue
        if mode & stat.S_IWOTH:
            found.append(path)
    return found


def warn_if_world_writable(place: Path, paths: Iterable[Path], *, what: str) -> None:
    """Warn once in a process and place if some of `paths`, which belong to it, may be written by every user.

    `what` it is, for the text: `store`, `run folder`. Checksums do not help here: who writes a file writes those, too.
    Of the ranks of a run the first one speaks.
    """
    key = os.path.abspath(place)
    if key in _told or os.environ.get("RANK", "0") != "0":
        return
    found = world_writable(paths)
    if not found:
        return
    _told.add(key)
    shown = (os.path.relpath(path, key) for path in found[:_SHOWN])
    names = ", ".join("the folder itself" if name == "." else name for name in shown)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    logger.warning(
        "%s %s may be changed by every user of this machine (%s%s): run `chmod -R o-w %s`; what this guards against is "
        "in docs/security.md",
        what,
        key,
        names,
        more,
        key,
    )
