"""How a campaign tells its counts: one line of JSON each, again at the end of the run of tests, and their sum last."""

from __future__ import annotations

import json
from typing import Any

# What became of what was tried: noticed as it should be, without effect, wrong without a word, not ended in its time,
# ended by an error that nobody foresaw.
OUTCOMES = ("detected", "harmless", "silent", "hung", "crashed")
_told: list[dict[str, Any]] = []


def tell(campaign: str, counts: dict[str, int], **about: Any) -> dict[str, Any]:
    """Print the counts of a campaign by outcome, absent ones as 0, and keep them for the end. Returns the line."""
    known = {name: counts.get(name, 0) for name in ("tried", *OUTCOMES)}
    assert counts.keys() <= known.keys(), counts
    line = {"campaign": campaign, **about, **known}
    _told.append(line)
    print(f"\n{json.dumps(line)}")
    return line


def summary() -> list[str]:
    """The lines of all campaigns of this process, and one with their sum; empty without any."""
    if not _told:
        return []
    total = {name: sum(line[name] for line in _told) for name in ("tried", *OUTCOMES)}
    return [json.dumps(line) for line in [*_told, {"campaigns": len(_told), **total}]]
