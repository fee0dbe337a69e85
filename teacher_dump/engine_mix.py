"""Units of several engines in one store: allowed where this machine's engine gives what stands in the store already.

run.json names the engine that began the store, and with it the units whose commit records name no other. The same
engine counts as another one with its layers split over another number of ranks, and where what it pins of itself
(versions, kernels: `engine_pins`) is not that of run.json. A worker of another engine of the same weights, dtype,
attention and options first runs rows of committed units and compares: what it would store of them with what is stored.
Only then does it add units, whose records say so (`extra.engine`, `extra.engine_pins`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from potstill.common.errors import UserError
from potstill.storage import NotAStoreError, Row, RunSpec, StoreReader, StoreWriter, TokensRow, read_spec
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.engines.base import Ranks, TeacherEngine
from potstill.teacher_dump.engines.table import entry_of
from potstill.teacher_dump.identity import PINS
from potstill.teacher_dump.left_out import LeftOut
from potstill.teacher_dump.pipeline import HostResult
from potstill.teacher_dump.row_distance import row_distance

log = logging.getLogger(__name__)

PROBE_ROWS, PROBE_UNITS = 8, 4
_KEYS = ("engine", "tensor_parallel", PINS)  # of the teacher in run.json: who made the bytes, and not what they say
_MOST_RECORDS = 64  # that are read to find units of another engine
# Mean total variation. Of two engines in float32 it is below 1e-4; one step of the grid of log-probabilities, 1/16 nat,
# at every entry would be 0.03.
LEAST_BOUND = 0.002
_OF_ITSELF = 2.0  # times what the engine differs from itself in other batches: what no engine can be better than


@dataclass(frozen=True)
class EngineMix:
    """A store that `first` began, to which `own` adds units."""

    first: str
    own: str
    begun: Mapping[str, Any]  # what run.json says of the first
    own_pins: Mapping[str, Any] = field(default_factory=dict)  # what the second pins of itself

    def spec(self, wanted: RunSpec) -> RunSpec:
        """The run that is continued: `wanted`, by the engine that began the store."""
        same = {key: value for key, value in (wanted.teacher or {}).items() if key not in _KEYS}
        return replace(wanted, teacher={**same, **self.begun})

    def settings(self) -> str:
        """What a person sets to continue with the first."""
        engine, parts = self.begun["engine"], self.begun.get("tensor_parallel", 1)
        split = f" and teacher.tensor_parallel={parts}" if "tensor_parallel" in f"{self.first} {self.own}" else ""
        pins = self.begun.get(PINS, {})
        other = [f"{key}={pins.get(key)}" for key in self.own_pins if self.own_pins[key] != pins.get(key)]
        same = f" ({', '.join(other)})" if pins and self.own_pins else ""
        return f"teacher.engine={engine}{split}{same}"

    def notes(self) -> dict[str, Any]:
        """What records of units say of the second engine."""
        return {"engine": self.own} | ({PINS: dict(self.own_pins)} if self.own_pins else {})


def engine_mix(output: str, wanted: RunSpec) -> EngineMix | None:
    """The two engines, where a store stands at `output` that another engine began and both of them mix; else None.

    Whether anything else differs is for the writer to say. Raises CorruptError for a run.json that cannot be read.
    """
    try:
        found = read_spec(output)
    except NotAStoreError:
        return None
    first, own = (
        {key: value for key, value in (spec.teacher or {}).items() if key in _KEYS} for spec in (found, wanted)
    )
    if found.kind != wanted.kind or first == own or not (_mixes(first) and _mixes(own)):
        return None
    words = [_words(engine) for engine in (first, own)]
    pins = [dict(engine.get(PINS, {})) for engine in (first, own)]
    if words[0] == words[1]:
        # The same engine in another version: what differs tells the two apart.
        keys = [key for key in sorted({*pins[0], *pins[1]}) if pins[0].get(key) != pins[1].get(key)]
        for place in range(2):
            words[place] += "".join(f" {key}={pins[place].get(key)}" for key in keys)
    return EngineMix(words[0], words[1], first, pins[1])


def _mixes(engine: Mapping[str, Any]) -> bool:
    try:
        return entry_of(engine["engine"], engine.get("tensor_parallel", 1)).mixes
    except (KeyError, ValueError):  # one that this version does not know
        return False


def _words(engine: Mapping[str, Any]) -> str:
    named = sorted((key, value) for key, value in engine.items() if key != PINS)
    return " ".join(str(value) if key == "engine" else f"{key}={value}" for key, value in named)


@dataclass(frozen=True, kw_only=True)
class ParityProbe:
    """Runs rows of committed units through the loaded engine. Collective where the engine is one of a group."""

    mix: EngineMix
    tokens: StoreReader
    writer: StoreWriter
    engine: TeacherEngine
    ranks: Ranks
    compute: Callable[[TeacherBatch], HostResult]
    layout: Callable[[Sequence[TokensRow]], TeacherBatch]
    batch_rows: int
    left_out: LeftOut | None

    def check(self) -> dict[str, Any]:
        """What the records of this worker's units say of their engine. Raises UserError where the engines disagree."""
        stored = list(self._stored_rows())
        rows = [row for row in self.tokens.rows([row.row for row in stored]) if isinstance(row, TokensRow)]
        together = -(-len(rows) // self.batch_rows)
        # Alone, or in pairs where the worker runs them alone: another batch size than its own.
        other = 1 if self.batch_rows > 1 else 2
        idle = self.ranks.largest(together + -(-len(rows) // other)) - together - -(-len(rows) // other)
        own, again = self._run(rows, self.batch_rows), self._run(rows, other)
        for _ in range(idle):
            self.engine.idle_pass()
        found, of_itself = _mean_distance(stored, own), _mean_distance(own, again)
        bound = max(LEAST_BOUND, _OF_ITSELF * of_itself)
        agrees = bool(stored) and found <= bound
        if self.ranks.largest(int(not agrees)):
            raise UserError(self._refusal(stored, found=found, bound=bound, agrees=agrees))
        log.info(
            "engine %s agrees with the units that %s holds of engine %s: mean total variation %.2g over %d rows, "
            "allowed are %.2g",
            self.mix.own,
            self.writer.url,
            self.mix.first,
            found,
            len(stored),
            bound,
        )
        return self.mix.notes() | {"parity": {"total_variation": found, "bound": bound, "rows": len(stored)}}

    def _stored_rows(self) -> Iterator[Row]:
        """Rows of units that another engine made, spread over the store."""
        assert self.writer.num_units is not None
        missing = set(self.writer.todo())
        done = [unit for unit in range(self.writer.num_units) if unit not in missing]
        step = max(1, len(done) // _MOST_RECORDS)
        units = []
        for unit in done[::step][:_MOST_RECORDS]:
            record = self.writer.record(unit)
            if record is not None and record.extra.get("engine", self.mix.first) != self.mix.own:
                units.append(unit)
        for unit in units[:: max(1, len(units) // PROBE_UNITS)][:PROBE_UNITS]:
            rows = [row for row in self.writer.committed_rows(unit) if self._was_run(row.row)]
            yield from rows[: PROBE_ROWS // PROBE_UNITS] if len(units) >= PROBE_UNITS else rows[:PROBE_ROWS]

    def _was_run(self, row: int) -> bool:
        return self.left_out is None or bool(self.left_out.wanted[row])

    def _run(self, rows: list[TokensRow], batch_rows: int) -> list[Row]:
        found: list[Row] = []
        for start in range(0, len(rows), batch_rows):
            result = self.compute(self.layout(rows[start : start + batch_rows]))
            found += [row for row, _ in result.rows().rows]
        return self.writer.as_stored(found)

    def _refusal(self, stored: list[Row], *, found: float, bound: float, agrees: bool) -> str:
        begun = f"{self.writer.url} was begun with engine {self.mix.first}"
        advice = f"continue with {self.mix.settings()}, or name another output"
        if agrees:
            return f"{begun}, and {self.mix.own} does not agree with it on another rank, which says more; {advice}"
        if not stored:
            return f"{begun} and holds no unit of it that {self.mix.own} could be compared with; {advice}"
        return (
            f"{begun}, and {self.mix.own} does not agree with it on this machine: mean total variation {found:.2g} "
            f"over rows {[row.row for row in stored]}, allowed are {bound:.2g} (the larger of {LEAST_BOUND} and twice "
            f"what {self.mix.own} differs from itself in other batches); {advice}"
        )


def _mean_distance(a: Sequence[Row], b: Sequence[Row]) -> float:
    """Mean total variation over the positions of rows in the same order; 0 where there are none."""
    pairs = [row_distance(one, other) for one, other in zip(a, b, strict=True)]
    return sum(total for total, _ in pairs) / max(1, sum(count for _, count in pairs))
