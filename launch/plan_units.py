"""The size of a unit that fits a dump, and what units cost in files and requests to an object store."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from potstill.common.progress import format_seconds
from potstill.launch.plan_limits import format_size

# A unit is what a killed worker loses, what it holds in memory, and one file: none of it may be much.
MOST_UNIT_SECONDS, MOST_FILE_BYTES, LEAST_FILE_BYTES = 600.0, 1e9, 64e6
# So that workers that are not equally fast end at about the same time.
LEAST_UNITS_PER_WORKER = 8
MOST_ROWS = 1 << 20  # of prepare
LIST_KEYS = 1000  # of one request for a list
_MULTIPART_FRAME = 2  # requests that begin and end an upload in parts
# List prices in USD of a thousand requests: S3 Standard in us-east-1, and GCS Standard in one region, which charges
# the same. The tables of both named these in 2025; other classes, regions and stores have others.
PRICE_OF_1000_PUTS, PRICE_OF_1000_GETS = 0.005, 0.0004
PRICE_SOURCE = "USD; default: S3 Standard us-east-1 and GCS Standard, list prices of 2025"


@dataclass(frozen=True)
class UnitPlan:
    """Rows of a unit and what follows from them; `why` names the bound that no larger unit would keep."""

    rows: int
    num_units: int
    file_bytes: float  # of the targets
    seconds: float  # of one worker
    why: str
    num_rows: int
    row_length: int

    @property
    def num_files(self) -> int:
        """Files of one store: data and record of each unit, and run.json, index and manifest."""
        return 2 * self.num_units + 3


@dataclass(frozen=True)
class Requests:
    """Requests to an object store, by what they are charged as."""

    puts: int = 0  # parts of uploads are charged like whole ones
    lists: int = 0
    gets: int = 0

    def price(self, *, per_1000_puts: float, per_1000_gets: float) -> float:
        """A list costs what a put costs."""
        return (self.puts + self.lists) / 1000 * per_1000_puts + self.gets / 1000 * per_1000_gets

    def format(self, *, per_1000_puts: float, per_1000_gets: float) -> str:
        """`1,200 puts, 14 lists, 9,000 gets: 0.01 USD`, without kinds of which there are none."""
        counts = [f"{number:,} {name}" for name, number in vars(self).items() if number]
        price = self.price(per_1000_puts=per_1000_puts, per_1000_gets=per_1000_gets)
        return f"{', '.join(counts)}: {price:,.2f} USD"


def recommend_unit(
    *, num_tokens: int, row_length: int, bytes_per_token: float, tokens_per_second: float, num_workers: int
) -> UnitPlan:
    """The largest power of two of rows that keeps all bounds; a unit of one row is kept by none.

    `bytes_per_token` of the targets; `tokens_per_second` of one worker.
    """
    num_rows = max(1, -(-num_tokens // row_length))
    bounds = {
        f"a file of {format_size(MOST_FILE_BYTES)} at most": MOST_FILE_BYTES / (row_length * bytes_per_token),
        f"{format_seconds(MOST_UNIT_SECONDS)} of work at most, which is what a kill loses": (
            MOST_UNIT_SECONDS * tokens_per_second / row_length
        ),
        f"{LEAST_UNITS_PER_WORKER} units a worker at least": num_rows / (LEAST_UNITS_PER_WORKER * num_workers),
        f"{MOST_ROWS:,} rows, the most that prepare takes": float(MOST_ROWS),
    }
    why, most = min(bounds.items(), key=lambda bound: bound[1])
    rows = 1 << max(0, math.floor(math.log2(max(1.0, most))))
    return unit_plan(
        rows,
        num_rows=num_rows,
        row_length=row_length,
        bytes_per_token=bytes_per_token,
        tokens_per_second=tokens_per_second,
        why=why,
    )


def unit_plan(
    rows: int, *, num_rows: int, row_length: int, bytes_per_token: float, tokens_per_second: float, why: str
) -> UnitPlan:
    """What follows from a unit of so many rows."""
    in_unit = min(rows, num_rows) * row_length
    return UnitPlan(
        rows=rows,
        num_units=-(-num_rows // rows),
        file_bytes=in_unit * bytes_per_token,
        seconds=in_unit / tokens_per_second,
        why=why,
        num_rows=num_rows,
        row_length=row_length,
    )


def puts_of_file(num_bytes: float) -> int:
    """Requests that put one file: one, or its parts and two more."""
    from potstill.storage.files.object_paths import PART_BYTES  # what the command's help need not load

    return 1 if num_bytes <= PART_BYTES else math.ceil(num_bytes / PART_BYTES) + _MULTIPART_FRAME


def dump_requests(unit: UnitPlan, *, num_workers: int) -> Requests:
    """Of a dump whose tokens and targets both lie on an object store, without retries.

    A worker lists the store when it starts and when it ends. Each unit is asked for by name, its rows are read by
    record batches, and its file and its record are put. The seal lists once, reads the records, and puts index and
    manifest.
    """
    from potstill.storage.files.unit_file import TOKENS_PER_BATCH

    pages = -(-unit.num_files // LIST_KEYS)
    rows_of_batch = max(1, TOKENS_PER_BATCH // unit.row_length)
    return Requests(
        puts=unit.num_units * (puts_of_file(unit.file_bytes) + 1) + 3,
        lists=pages * (2 * num_workers + 1),
        gets=unit.num_units * 2 + -(-unit.num_rows // rows_of_batch),
    )


def epoch_requests(unit: UnitPlan) -> Requests:
    """Of a student that reads each row once in global order: a range of the tokens and one of the targets."""
    return Requests(gets=2 * unit.num_rows)


def unit_rows(
    unit: UnitPlan, *, num_workers: int, per_1000_puts: float, per_1000_gets: float
) -> Iterator[tuple[str, str]]:
    """What and how much, as text, for the table of a plan."""
    prices = {"per_1000_puts": per_1000_puts, "per_1000_gets": per_1000_gets}
    many_small = unit.file_bytes < LEAST_FILE_BYTES and unit.num_files > LIST_KEYS
    small = f"; below {format_size(LEAST_FILE_BYTES)} a file costs more to ask for than to read" if many_small else ""
    yield "unit", f"{unit.rows:,} rows: prepare --rows-per-unit {unit.rows}"
    yield "unit, because", unit.why
    yield "unit, of the dump", f"{format_size(unit.file_bytes)}, {format_seconds(unit.seconds)} of one worker{small}"
    yield "units", f"{unit.num_units:,}, {unit.num_files:,} files in each store"
    yield "dump, on an object store", dump_requests(unit, num_workers=num_workers).format(**prices)
    yield "student, an epoch there", epoch_requests(unit).format(**prices)


def compare_units(place: str, held: int, unit: UnitPlan) -> str | None:
    """What to say of a tokens store that is there already, whose units are those of the targets too; None: nothing."""
    if held == unit.rows:
        return None
    num_units = -(-unit.num_rows // held)
    return (
        f"{place} has {held:,} rows a unit, so {num_units:,} units and {2 * num_units + 3:,} files; to have "
        f"{unit.rows:,}, prepare it again with --rows-per-unit {unit.rows}"
    )
