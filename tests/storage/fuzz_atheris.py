"""Coverage-guided fuzzing of the same parsers, where atheris is installed.

python -m tests.storage.fuzz_atheris -runs=100000
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["potstill.storage"]):
    from tests.storage.mutations import Targets


def main() -> None:
    targets = Targets()
    names = sorted(targets.parsers)

    def one(data: bytes) -> None:
        if data:
            targets.run(names[data[0] % len(names)], data[1:])

    with tempfile.TemporaryDirectory() as corpus:
        for number, name in enumerate(names):
            for i, seed in enumerate(targets.seeds[name]):
                Path(corpus, f"{number}-{i}").write_bytes(bytes([number]) + seed)
        atheris.Setup([*sys.argv, "-max_len=16384", corpus], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
