"""The warning for a store that every user of the machine may change."""

from __future__ import annotations

from collections.abc import Sequence

from potstill.common.permissions import warn_if_world_writable
from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.paths import LocalFolder

# Files of a store are written under one mask; on a network file system each look is a request.
_MOST_UNITS = 64


def warn_of_writers(folder: StoreFolder, unit_files: Sequence[str] = (), *, index: str = "index.arrow") -> None:
    """Look at the folders, the files at the top and some of the unit files, evenly spaced; warn once in a process.

    An object store has no such permissions: who may write there, its own policies say.
    """
    if not isinstance(folder, LocalFolder):
        return
    some = unit_files[:: max(1, len(unit_files) // _MOST_UNITS)]
    names = ("", "units", "run.json", "manifest.json", index, *(f"units/{file}" for file in some))
    warn_if_world_writable(folder.root, (folder.root / name for name in names), what="store")
