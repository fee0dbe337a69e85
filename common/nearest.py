"""The key that a person most likely meant: by spelling, by initials, by what a key is described as.

Spelling alone takes `learning_rate` for `weight_decay`; the key is `lr`, "Peak learning rate".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

CLOSE_SPELLING = 0.66  # `lrr` for `lr` (0.8) and `optimiser` (0.89) are slips; `learning_rate`/`weight_decay` is 0.48


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _is_short_form(short: str, long: str) -> bool:
    """Whether one name is made of the first letters of the other's words: lr, wd, mp."""
    words = _words(long)
    return len(words) > 1 and short.lower() == "".join(word[0] for word in words)


def _likeness(name: str, key: str, description: str) -> float:
    """How likely `name` means `key`, from 0 to 1; what is below CLOSE_SPELLING is no hint."""
    spelling = difflib.SequenceMatcher(None, key.lower(), name.lower().replace("-", "_")).ratio()
    if _is_short_form(key, name) or _is_short_form(name, key):
        return max(spelling, 0.9)
    if len(key) > 2 and name.lower().startswith(key.lower()):  # epsilon for eps
        return max(spelling, 0.85)
    if len(_words(name)) > 1 and set(_words(name)) <= set(_words(description)):
        return max(spelling, 0.8)
    return spelling


def nearest_keys(name: str, known: Mapping[str, str], *, count: int = 1) -> list[str]:
    """The keys of `known` (key -> its description) that `name` may mean, most likely first; none if none is near."""
    likely = {key: _likeness(name, key, description) for key, description in known.items()}
    found = [key for key, value in likely.items() if value >= CLOSE_SPELLING]
    return sorted(found, key=lambda key: -likely[key])[:count]
