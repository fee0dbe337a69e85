"""A fault planted in a copy of the kernels' source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """One fault. name: what is wrong; path: a pattern of files in the kernels room.

    seen_by: the battery's check that runs first.

    may_raise: the interpreter itself may refuse what the fault computes (an overflow, an address).
    """

    name: str
    path: str
    old: str
    new: str
    seen_by: str = "plain"
    may_raise: bool = False

    def plant(self, kernels: Path) -> None:
        """The fault, in a copy of the kernels. AssertionError, with what to do, unless its text stands there once."""
        files = {path: path.read_text(encoding="utf-8") for path in sorted(kernels.glob(self.path))}
        counts = {path: source.count(self.old) for path, source in files.items()}
        assert sum(counts.values()) == 1, (
            f"mutant {self.name!r}: its text stands {sum(counts.values())} times in kernels/{self.path}, expected once;"
            f" bring tests/kernels/mutants.py or mutants_teacher.py up to date with the kernel: {self.old!r}"
        )
        path = next(path for path, count in counts.items() if count)
        path.write_text(files[path].replace(self.old, self.new), encoding="utf-8")
