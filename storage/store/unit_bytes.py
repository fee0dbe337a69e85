"""What a seal sees of the unit files themselves: that they are there, their sizes, and their bytes by sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from potstill.storage.errors import CorruptError
from potstill.storage.files.checked_json import READ_ATTEMPTS
from potstill.storage.files.commit import LISTED_AT_ONCE
from potstill.storage.files.folder import Listed, StoreFolder
from potstill.storage.store.threads import in_threads

CHUNK_BYTES = 8 << 20  # read at a time: a unit may be larger than what several threads should hold
_AT_ONCE = 16
_SHOWN = 3


class UnitEntry(NamedTuple):
    """A sealed unit: file name in units/, bytes and sha256."""

    file: str
    num_bytes: int
    sha256: str


def size_problems(
    folder: StoreFolder, units: Sequence[UnitEntry], *, listing: Mapping[str, Listed] | None = None
) -> list[str]:
    """A line for each file that is missing or has another size than is said of it; `listing`: what is in units/."""
    if listing is None:
        listing = folder.listing("units", cuts=entry_cuts(units), suffix=".arrow")
    problems = []
    for unit, entry in enumerate(units):
        found = listing[entry.file].num_bytes if entry.file in listing else None
        if found != entry.num_bytes:
            found = folder.size(f"units/{entry.file}")  # by name: the listing of an object store may be older
        if found != entry.num_bytes:
            state = "missing" if found is None else f"{found} bytes"
            problems.append(f"unit {unit}: units/{entry.file} is {state}, its record says {entry.num_bytes} bytes")
    return problems


def entry_cuts(units: Sequence[UnitEntry]) -> list[str]:
    """Names between which the files of these units lie evenly, for `StoreFolder.listing`."""
    return [units[len(units) * part // LISTED_AT_ONCE].file for part in range(1, LISTED_AT_ONCE)] if units else []


def check_sizes(
    folder: StoreFolder, units: Sequence[UnitEntry], *, listing: Mapping[str, Listed] | None = None
) -> None:
    """Raise CorruptError that names the units whose file is missing or short, and the command that repairs."""
    problems = size_problems(folder, units, listing=listing)
    if problems:
        raise CorruptError(damaged_text(folder, problems, len(units)))


def check_bytes(folder: StoreFolder, units: Sequence[UnitEntry]) -> None:
    """Read all units, several at once; CorruptError names those whose bytes do not fit their sha256."""

    def check(item: tuple[int, UnitEntry]) -> str | None:
        unit, entry = item
        # Transport errors exist, so what does not fit is read again before it counts.
        for _ in range(READ_ATTEMPTS):
            if file_sha256(folder, f"units/{entry.file}", entry.num_bytes) == entry.sha256:
                return None
        return f"unit {unit}: content of units/{entry.file} does not fit its sha256"

    problems = [found for found in in_threads(folder, check, enumerate(units), most=_AT_ONCE) if found is not None]
    if problems:
        raise CorruptError(damaged_text(folder, problems, len(units)))


def file_sha256(folder: StoreFolder, name: str, num_bytes: int) -> str:
    """sha256 (hex) of the first `num_bytes` of a file, read in pieces. Raises CorruptError where it is shorter."""
    digest = hashlib.sha256()
    for offset in range(0, num_bytes, CHUNK_BYTES):
        digest.update(folder.read_range(name, offset, min(CHUNK_BYTES, num_bytes - offset)))
    return digest.hexdigest()


def damaged_text(folder: StoreFolder, problems: Sequence[str], num_units: int) -> str:
    """What an error says of a store with damaged units: which, how many, and the command that repairs it."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return (
        f"{folder.url}: {len(problems)} of {num_units} units are damaged: {'; '.join(problems[:_SHOWN])}{more}. Run "
        f"`potstill repair {folder.url}`, which takes them out and says how to make them again"
    )
