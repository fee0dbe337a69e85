"""Every kind of damage that repair must answer, done to a store of the tests."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from potstill.storage import StoreReader, StoreWriter, seal_store
from tests.storage.stores import make_targets_row


def unit_file(store: Path, unit: int) -> Path:
    return next((store / "units").glob(f"u{unit:07d}-*.arrow"))


def record_file(store: Path, unit: int) -> Path:
    return store / "units" / f"u{unit:07d}.json"


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero_page(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data)) // 512 * 512
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def swap(store: Path, one: int, other: int) -> None:
    a, b = unit_file(store, one), unit_file(store, other)
    data = a.read_bytes(), b.read_bytes()
    a.write_bytes(data[1])
    b.write_bytes(data[0])


def folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def foreign_record(store: Path, unit: int, foreign: Path) -> None:
    shutil.copy(record_file(foreign, unit), record_file(store, unit))


# name -> what it does to a store and one of its units; `foreign` is a store of other options over the same rows
KINDS: dict[str, Callable[[Path, int, Path, random.Random], object]] = {
    "flip": lambda store, unit, foreign, rng: flip(unit_file(store, unit), rng),
    "zeroed page": lambda store, unit, foreign, rng: zero_page(unit_file(store, unit), rng),
    "all zeros": lambda store, unit, foreign, rng: unit_file(store, unit).write_bytes(
        bytes(unit_file(store, unit).stat().st_size)
    ),
    "truncation": lambda store, unit, foreign, rng: truncate(unit_file(store, unit), rng),
    "missing file": lambda store, unit, foreign, rng: unit_file(store, unit).unlink(),
    "swapped units": lambda store, unit, foreign, rng: swap(store, unit, (unit + 1) % 5),
    "foreign record": lambda store, unit, foreign, rng: foreign_record(store, unit, foreign),
    "foreign record beyond the end": lambda store, unit, foreign, rng: shutil.copy(
        record_file(foreign, unit), record_file(store, 12)
    ),
    "flipped record": lambda store, unit, foreign, rng: flip(record_file(store, unit), rng),
    "short record": lambda store, unit, foreign, rng: truncate(record_file(store, unit), rng),
    "missing record": lambda store, unit, foreign, rng: record_file(store, unit).unlink(),
    "folder for a unit": lambda store, unit, foreign, rng: folder_for(unit_file(store, unit)),
    "folder for a record": lambda store, unit, foreign, rng: folder_for(record_file(store, unit)),
    "circle of links for a unit": lambda store, unit, foreign, rng: link_loop(unit_file(store, unit)),
    "circle of links for a record": lambda store, unit, foreign, rng: link_loop(record_file(store, unit)),
    "flipped index": lambda store, unit, foreign, rng: flip(store / "index.arrow", rng),
    "folder for the index": lambda store, unit, foreign, rng: folder_for(store / "index.arrow"),
    "missing index": lambda store, unit, foreign, rng: (store / "index.arrow").unlink(),
    "flipped manifest": lambda store, unit, foreign, rng: flip(store / "manifest.json", rng),
    "short manifest": lambda store, unit, foreign, rng: truncate(store / "manifest.json", rng),
}


def make_again(store: Path, tokens: StoreReader, *, seed: int = 0) -> str:
    """What a dump does after a repair: the units without a record, then the seal; the digest."""
    spec = StoreReader(store, allow_partial=True).spec
    writer = StoreWriter.create(store, spec)
    for unit in writer.todo():
        rows = [make_targets_row(row, spec, seed=seed) for row in tokens.tokens_rows(writer.unit_rows(unit))]
        writer.commit_unit(unit, rows)
    return seal_store(store).store_digest
