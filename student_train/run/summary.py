"""How a training run ended, for a person and for a program. Ranks write it, the command reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from potstill.student_train.run.stop import STOP_FILE

COUNTS = ("positions", "rows", "answers", "answers_written")  # held-out figures that are whole numbers


def _source_text(own: dict[str, float | None]) -> str:
    counts = ", ".join(f"{own[name] or 0:,.0f} {name}" for name in ("rows", "tokens", "positions"))
    return counts + "".join(f", last {name} {own[name]:.4f}" for name in ("ce", "kd") if own[name] is not None)


@dataclass(frozen=True)
class TrainSummary:
    """How a run ended."""

    status: str  # "done", or why it stopped before the end
    output_dir: Path
    steps: int
    total_steps: int
    tokens: int
    num_parameters: int
    seconds: float
    last: dict[str, Any]
    heldout: dict[str, Any]
    sources: dict[str, dict[str, float | None]] = field(default_factory=dict)  # totals by source, if there are several

    @property
    def is_done(self) -> bool:
        return self.status == "done"

    def format(self) -> str:
        """A few lines for a person."""
        lines = [
            f"run {self.output_dir}: {self.status}, step {self.steps} of {self.total_steps}, {self.tokens:,} tokens, "
            f"{self.num_parameters:,} parameters, {self.seconds:.1f} s"
        ]
        if self.last:
            loss, ce = ("not finite" if self.last[key] is None else f"{self.last[key]:.4f}" for key in ("loss", "ce"))
            lines.append(f"  last loss {loss} (ce {ce})")
        lines += [f"  source {name}: {_source_text(own)}" for name, own in self.sources.items()]
        if self.heldout:
            figures = {name: value for name, value in self.heldout.items() if isinstance(value, float)}
            lines.append(
                "  held-out: "
                + ", ".join(
                    f"{name} {value:,.0f}" if name in COUNTS else f"{name} {value:.4f}"
                    for name, value in figures.items()
                )
            )
        if not self.is_done:
            stop = self.output_dir / STOP_FILE
            first = f"delete {stop} and " if stop.exists() else ""  # whichever rank has seen it
            lines.append(f"  {first}start the same command again to continue")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, e.g. for the last line of `potstill train --json`."""
        return {**asdict(self), "output_dir": str(self.output_dir)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainSummary:
        """What `to_json` wrote."""
        return cls(**{**value, "output_dir": Path(value["output_dir"])})
