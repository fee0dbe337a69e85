"""Entries of an input that are patterns."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from potstill.common.errors import UserError


def expanded(entries: Sequence[str]) -> list[str]:
    """The entries, patterns replaced by the paths that they match, in order. UserError where one matches nothing."""
    found: list[str] = []
    for entry in entries:
        path = str(Path(entry).expanduser())
        # A path that is there is meant as it stands, whatever signs are in its name.
        is_pattern = glob.has_magic(entry) and not Path(path).exists()
        paths = sorted(glob.glob(path, recursive=True)) if is_pattern else [entry]
        if not paths:
            raise UserError(f"input {entry!r}: no file matches it; check the spelling")
        found += paths
    return found
