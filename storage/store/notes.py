"""Notes beside the units, which a listing tells of: attempts that failed, and rows that were refused.

No rule trusts them over the records. A note on a failure makes a worker look into the record of its unit; one on
refused rows saves reading all records to count them.
"""

from __future__ import annotations

import re
import secrets
import time

from potstill.storage.files.checked_json import dump_checked
from potstill.storage.files.folder import StoreFolder

_FAILURE = re.compile(r"u(\d{7,12})-[0-9a-f]{12}\.json")
_REFUSED = re.compile(r"u(\d{7,12})-(\d{1,9})-[0-9a-f]{12}\.json")


def note_failure(folder: StoreFolder, unit: int, reason: str) -> None:
    """Leave a note in failures/ why an attempt at a unit failed."""
    value = {"unit": unit, "reason": reason[:10_000], "time_seconds": round(time.time(), 3)}
    folder.put(f"failures/u{unit:07d}-{secrets.token_hex(6)}.json", dump_checked(value))


def noted_units(folder: StoreFolder) -> set[int]:
    """Units that a note in failures/ names: they exist, whether they have a record now or not."""
    return {int(match.group(1)) for name in folder.names("failures") if (match := _FAILURE.fullmatch(name))}


def note_refused(folder: StoreFolder, unit: int, num_rows: int) -> None:
    """Leave a note in refused/, before the record, that an attempt at a unit has refused so many rows."""
    value = {"unit": unit, "num_rows": num_rows, "time_seconds": round(time.time(), 3)}
    folder.put(f"refused/u{unit:07d}-{num_rows}-{secrets.token_hex(6)}.json", dump_checked(value))


def refused_by_notes(folder: StoreFolder) -> dict[int, int]:
    """Unit -> refused rows, the most that a note says; an attempt that was killed has left one without a record."""
    found: dict[int, int] = {}
    for name in folder.names("refused"):
        match = _REFUSED.fullmatch(name)
        if match:
            unit, num_rows = int(match.group(1)), int(match.group(2))
            found[unit] = max(found.get(unit, 0), num_rows)
    return found
