"""What `potstill verify --teacher` says: a table, the rows that stand out, and a verdict in words; or JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from potstill.common.text_tables import table
from potstill.teacher_dump.against_teacher.distances import RowDistances
from potstill.teacher_dump.against_teacher.measures import MEASURES
from potstill.teacher_dump.against_teacher.verdict import Excess, Overall, Verdict

_SHOWN = 5  # rows, or excesses, in the text; JSON has all
_MAX_SHOWN = 60  # characters of a value of run.json
_BECAUSE = {
    "grid": "in mean within a 64th of a step of its grid",
    "control": "as near as the live teacher is to itself in other batches",
    "rounding": "within what rounding makes on other hardware",
}


@dataclass(frozen=True, kw_only=True)
class TeacherReport:
    """A store held against its teacher.

    differing: what run.json says of the teacher and what is true now, by key, where they differ. refused: rows of which
    the live teacher gives no finite logits, and why. silent: rows that are stored without targets. within_rounding:
    whether the store would agree with --other-machine.
    """

    store: str
    tokens: str
    teacher: str
    engine: str
    dtype: str
    num_rows: int
    sealed_rows: int | None
    differing: dict[str, tuple[Any, Any]]
    rows: tuple[RowDistances, ...]
    refused: tuple[tuple[int, str], ...]
    silent: tuple[int, ...]
    verdict: Verdict
    within_rounding: bool

    @property
    def positions(self) -> int:
        return sum(row.positions for row in self.rows)

    @property
    def lacking(self) -> list[RowDistances]:
        """Rows in which one side has targets where the other has none."""
        return [row for row in self.rows if row.lacking]

    @property
    def ok(self) -> bool:
        """Whether the store says what the live teacher says, as far as that can be seen."""
        return bool(self.positions) and not (self.verdict.excesses or self.refused or self.lacking)

    @property
    def words(self) -> str:
        """The verdict."""
        if not self.positions:
            return "nothing could be compared: none of these rows holds a target on both sides"
        if self.ok:
            return f"the store says what this teacher says: {self._as_near()}"
        reasons = [f"{len(self.refused)} rows of which the teacher gives no finite logits"] if self.refused else []
        reasons += [f"{len(self.lacking)} rows with targets on one side only"] if self.lacking else []
        out = self.verdict.rows
        if self.verdict.excesses and self.verdict.others_agree:
            few = f"row {out[0]} stands" if len(out) == 1 else f"{len(out)} of {len(self.rows)} rows stand"
            reasons.append(f"{few} out, and the others agree: damage, or a change that few tokens show")
        elif self.verdict.excesses:
            reasons.append("it is further from it than that is from itself")
        if self.verdict.excesses and self.within_rounding:
            reasons.append(
                f"this is within what rounding to {self.dtype} makes on other hardware: if the store was dumped on "
                "another machine, say --other-machine"
            )
        return f"the store does not say what this teacher says: {'; '.join(reasons)}"

    def _as_near(self) -> str:
        because = {one.bound.because for one in self.verdict.overall.values() if one.bound and one.stored > 0}
        return next((_BECAUSE[name] for name in ("rounding", "control", "grid") if name in because), "no value differs")

    def to_json(self) -> dict[str, Any]:
        """All figures; rows in their order."""
        return {
            "teacher": self.teacher,
            "tokens": self.tokens,
            "engine": self.engine,
            "dtype": self.dtype,
            "ok": self.ok,
            "verdict": self.words,
            "within_rounding": self.within_rounding,
            "same_weights": "weights_digest" not in self.differing,
            "differing": {key: {"stored": a, "live": b} for key, (a, b) in self.differing.items()},
            "rows_compared": len(self.rows),
            "positions": self.positions,
            "grid_kl": self._grid_kl(),
            "overall": {name: one.to_json() for name, one in self.verdict.overall.items()},
            "excesses": [asdict(one) for one in self.verdict.excesses],
            "refused": [{"row": row, "reason": reason} for row, reason in self.refused],
            "without_targets": list(self.silent),
            "rows": [_row_json(row) for row in self.rows],
        }

    def _grid_kl(self) -> float | None:
        sums = [row.grid_kl for row in self.rows if row.grid_kl is not None]
        return sum(sums) / max(1, self.positions) if sums else None

    def format(self) -> str:
        """Text for a terminal."""
        of = (
            f"{len(self.rows)} of {self.num_rows} rows"
            if self.sealed_rows == self.num_rows
            else (f"{len(self.rows)} of the first {self.num_rows} rows, which are committed")
        )
        lines = [
            f"held against {self.teacher}, engine {self.engine} in {self.dtype}: {of}, {self.positions} positions",
            self._weights(),
            *self._table(),
            *(f"  {text}" for text in self._outstanding()),
        ]
        if self.silent:
            lines.append(f"{len(self.silent)} rows are stored without targets and say nothing: {_few(self.silent)}")
        return "\n".join([*lines, f"verdict: {self.words}"])

    def _weights(self) -> str:
        others = [key for key in self.differing if key != "weights_digest"]
        told = "; ".join(
            f"{key}: {_short(self.differing[key][0])} in run.json, {_short(self.differing[key][1])} now"
            for key in others
        )
        if "weights_digest" in self.differing:
            a, b = (str(one)[:16] for one in self.differing["weights_digest"])
            head = f"these are not the files of weights that run.json names ({a}, here {b}); the figures decide"
        else:
            head = "these are the weights that run.json names"
        return f"{head}; {told}" if told else head

    def _table(self) -> list[str]:
        if not self.verdict.overall:
            return []
        made = [_line(name, one) for name, one in self.verdict.overall.items()]
        grid = self._grid_kl()
        if grid is not None:
            made.append(["KL of live on the grid to live, nats", f"{grid:.3g}", "", ""])
        return [table(["mean over positions", "store", "live again", "allowed"], made)]

    def _outstanding(self) -> list[str]:
        texts = [f"row {row}: the live teacher gives none: {reason}" for row, reason in self.refused]
        texts += [
            f"row {row.row}: {len(row.lacking)} tokens have a target on one side only, first token {row.lacking[0]}"
            for row in self.lacking
        ]
        texts += [one.text() for one in _first_of_each(self.verdict.excesses)]
        more = len(texts) - 2 * _SHOWN
        return [*texts[: 2 * _SHOWN], *([f"and {more} more; --json lists all"] if more > 0 else [])]


def _line(name: str, one: Overall) -> list[str]:
    bound = "" if one.bound is None else f"{one.bound.value:.3g} ({one.bound.because})"
    return [MEASURES[name].words, f"{one.stored:.3g}", f"{one.control:.3g}", bound]


def _first_of_each(excesses: tuple[Excess, ...]) -> list[Excess]:
    """Those over all rows, then of each row the one that is furthest above its bound, worst rows first."""
    whole = [one for one in excesses if one.row is None]
    worst: dict[int | None, Excess] = {}
    for one in sorted(excesses, key=lambda one: -one.found / one.bound):
        if one.row is not None:
            worst.setdefault(one.row, one)
    return [*whole, *worst.values()]


def _short(value: Any) -> str:
    text = "not said" if value is None else str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _few(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")


def _row_json(row: RowDistances) -> dict[str, Any]:
    num = max(1, row.positions)
    return {
        "row": row.row,
        "positions": row.positions,
        "one_sided": list(row.lacking),
        **{
            name: {"stored": one.stored / num, "control": one.control / num, "worst": one.worst, "at": one.at}
            for name, one in row.of.items()
        },
    }
