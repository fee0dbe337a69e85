"""Record batches that stand one behind the other in a unit file: over a network they are read by one request.

A worker that reads a whole unit of a tokens store would else ask for its two rows at a time, a hundred times.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

MAX_RUN_BYTES = 8 << 20

Key = tuple[int, int]  # unit, offset
Span = tuple[int, int]  # offset, bytes


def key_of(entry: Mapping[str, Any]) -> Key:
    """What tells a record batch from the others of its store."""
    return int(entry["unit"]), int(entry["offset"])


def runs_of_neighbours(
    entries: Sequence[Mapping[str, Any]], *, without: Collection[Key] = ()
) -> Iterator[tuple[int, list[Span]]]:
    """(unit, spans) of every two or more batches that follow one another, MAX_RUN_BYTES at most together.

    `entries` are those of the index, several of one batch among them; `without` names batches that are there already.
    """
    lengths = {key_of(entry): int(entry["length"]) for entry in entries}
    run: list[Span] = []
    in_unit = -1
    for unit, offset in sorted(lengths.keys() - set(without)):
        length = lengths[unit, offset]
        follows = unit == in_unit and offset == sum(run[-1])
        if run and follows and offset + length - run[0][0] <= MAX_RUN_BYTES:
            run.append((offset, length))
            continue
        if len(run) > 1:
            yield in_unit, run
        in_unit, run = unit, [(offset, length)]
    if len(run) > 1:
        yield in_unit, run
