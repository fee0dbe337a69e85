"""The corpus of the demo: the source of Python's own standard library, found on every machine that can run potstill."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from potstill.common.errors import UserError

# Not the library itself, or tables in the shape of a module: they are no text to learn from.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
)
SMALLEST_BYTES = 400
LARGEST_BYTES = 100_000


def library_modules(folder: Path) -> Iterator[Path]:
    """Modules below `folder`, in an order that looks shuffled and is the same on every machine."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(parent, name) for name in files if name.endswith(".py")]
    yield from sorted(found, key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())


def write_corpus(path: Path, *, max_bytes: int, folder: Path | None = None) -> int:
    """Write modules as JSON lines {"id", "text"} until `max_bytes` of text are reached; returns the bytes of text.

    The file appears under its name only when it is whole. Raises UserError if the library's source is not there.
    """
    library = folder if folder is not None else Path(sysconfig.get_path("stdlib"))
    written = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        for module in library_modules(library):
            if not SMALLEST_BYTES <= module.stat().st_size <= LARGEST_BYTES:
                continue
            try:
                with tokenize.open(module) as source:
                    text = source.read()
            except (SyntaxError, UnicodeDecodeError):
                continue  # a module that is broken on purpose, or in an encoding that this Python does not know
            out.write(
                json.dumps({"id": module.relative_to(library).as_posix(), "text": text}, ensure_ascii=False) + "\n"
            )
            written += len(text.encode())
            if written >= max_bytes:
                break
        out.flush()
        os.fsync(out.fileno())
    if written == 0:
        partial.unlink()
        raise UserError(
            f"no source of the standard library in {library} (some systems ship it compiled only); "
            "run the stages on a text of your own instead: potstill prepare --help"
        )
    partial.replace(path)
    return written
