"""What a person meant by a path that holds no store: a neighbour of nearly the same name, or a store inside it."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

_RUN_NAME = "run.json"
_SHOWN = 5


def explain_absence(root: Path) -> str:
    """One line on a local path without a readable run.json: what is there instead, and what to name."""
    # These functions of os.path ask without an error where this user may not look; those of Path raise one.
    if os.path.isfile(root):
        return f"{root} is a file, expected the folder of a store; name the folder that holds {_RUN_NAME}"
    if os.path.isdir(root):
        inside = _stores_in(root)
        if inside:
            return f"{root} is not a store, but these folders in it are: {_listed(inside)}; name one of them"
        return (
            f"{root} holds no {_RUN_NAME}, so it is not a store; "
            "a store is what prepare, dump or score has written (prepare: OUTPUT/train and OUTPUT/heldout)"
        )
    above = root.parent
    while not os.path.isdir(above) and above != above.parent:
        above = above.parent
    # The first part of the path that is wrong, among the names that stand beside it.
    wrong = root.relative_to(above).parts[0]
    names = sorted(entry.name for entry in _folders(above))
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"{root} does not exist; did you mean {above / near[0]}?"
    stores = _stores_in(above)
    if stores:
        return f"{root} does not exist; stores in {above}: {_listed(stores)}"
    if above != root.parent:
        return f"{root} does not exist; the nearest folder that does is {above}"
    return f"{root} does not exist; check the spelling"


def _stores_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in _folders(folder) if os.path.isfile(entry / _RUN_NAME))


def _folders(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if os.path.isdir(entry)]
    except OSError:  # a folder that may not be listed gives no hints; the error stands without them
        return []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
