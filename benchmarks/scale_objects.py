"""The objects of the synthetic store server: a folder of files that is never written, what is put over it, and units
that are made as they are asked for.

A synthetic store has thousands of unit files of the same rows under other numbers. They are not kept: each is the bytes
of one real unit (the template) with its row numbers written into them (benchmarks/scale_store.py makes the records that
fit).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.scale_template import SYNTHETIC, TEMPLATES, Template

SPILL_BYTES = 32 << 20  # what is put in larger pieces lies in a file


@dataclass
class Objects:
    """Objects by key, in order. `deleted` and `put` lie over the folder, so that it stays as it is."""

    root: Path
    keys: list[str] = field(default_factory=list)
    about: dict[str, tuple[int, float]] = field(default_factory=dict)  # key -> bytes, time of the last change
    _put: dict[str, bytes | str] = field(default_factory=dict)  # bytes, or the path of a file that holds them
    _templates: dict[str, Template] = field(default_factory=dict)  # by name of the store

    @classmethod
    def of_folder(cls, root: Path) -> Objects:
        """What lies in `root` now; templates are those of its folder `templates`."""
        found = cls(root)
        for folder in sorted((root / TEMPLATES).iterdir()) if (root / TEMPLATES).is_dir() else ():
            found._templates[folder.name] = Template.load(folder)
        for at, names, files in os.walk(root):
            names[:] = [name for name in names if (at, name) != (str(root), TEMPLATES)]
            for name in files:
                status = os.stat(os.path.join(at, name))
                key = os.path.relpath(os.path.join(at, name), root)
                found.about[key] = (status.st_size, status.st_mtime)
        found.keys = sorted(found.about)
        return found

    def etag(self, key: str) -> str:
        size, changed = self.about[key]
        return f'"{size:x}-{int(changed * 1e6):x}"'

    def read(self, key: str, start: int, end: int) -> bytes | bytearray:
        """Bytes [start, end) of an object that is there."""
        held = self._put.get(key)
        if isinstance(held, bytes):
            return held[start:end]
        store, _, name = key.partition("/")
        if held is None and store in self._templates and name.endswith(SYNTHETIC):
            return self._templates[store].piece(int(name[len("units/u") : -len(SYNTHETIC)]), start, end)
        with open(self.root / key if held is None else held, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)

    def put(self, key: str, *parts: bytes, exclusive: bool = False) -> bool:
        """Keep an object, given in parts, over the folder; False where it must be new and is not."""
        if exclusive and key in self.about:
            return False
        if key not in self.about:
            insort(self.keys, key)
        size = sum(map(len, parts))
        self.about[key] = (size, time.time())
        if size > SPILL_BYTES:
            with tempfile.NamedTemporaryFile(prefix="potstill_scale_", delete=False) as file:
                file.writelines(parts)
            self._put[key] = file.name
        else:
            self._put[key] = b"".join(parts)
        return True

    def delete(self, key: str) -> None:
        if self.about.pop(key, None) is not None:
            del self.keys[bisect_left(self.keys, key)]
        self._drop(self._put.pop(key, None))

    def close(self) -> None:
        """Take away the files of what was put."""
        for held in self._put.values():
            self._drop(held)

    @staticmethod
    def _drop(held: bytes | str | None) -> None:
        if isinstance(held, str):
            os.unlink(held)

    def page(self, prefix: str, delimiter: str, after: str, most: int) -> tuple[list[str], list[str], str | None]:
        """Keys and common prefixes behind `after`, `most` at most, and behind what the next page begins."""
        keys: list[str] = []
        common: list[str] = []
        place = max(bisect_left(self.keys, prefix), bisect_right(self.keys, after) if after else 0)
        if after.endswith(delimiter) and delimiter and after:
            place = max(place, bisect_left(self.keys, after[:-1] + chr(ord(after[-1]) + 1)))
        last = None
        while place < len(self.keys) and self.keys[place].startswith(prefix):
            if len(keys) + len(common) == most:
                return keys, common, last
            key = self.keys[place]
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                keys.append(key)
                last, place = key, place + 1
                continue
            last = key[: cut + 1]
            common.append(last)
            place = bisect_left(self.keys, key[:cut] + chr(ord(delimiter) + 1))
        return keys, common, None


def counts_text(counts: dict[str, int]) -> bytes:
    return json.dumps(counts, sort_keys=True).encode()
