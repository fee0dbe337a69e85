"""What `import targets` tells at its end."""

from __future__ import annotations

from dataclasses import dataclass

from potstill.common.progress import format_seconds
from potstill.teacher_dump.importing.foreign_rows import Figures


@dataclass(frozen=True, kw_only=True)
class ImportTargetsSummary:
    """What was made; `figures` are over all rows, those of an earlier run included."""

    source_format: str
    tokens: str
    targets: str
    rows: int
    normaliser: str
    figures: Figures
    bytes_per_token: float
    source_bytes_per_token: float
    bad_records: int
    resumed_rows: int
    seconds: float
    lost: tuple[str, ...]
    notes: tuple[str, ...]

    def format(self) -> str:
        """A few lines for a person."""
        found = self.figures
        num = max(1, found.positions)
        mass = "" if self.normaliser == "kept" else f"; kept mass {found.kept_mass / num:.4f} on average"
        lines = [
            f"targets: {self.rows} rows, {found.positions} positions, {found.entries / num:.1f} entries each -> "
            f"{self.targets}",
            f"tokens: {self.tokens}",
            f"{self.source_format}: {self.source_bytes_per_token:.1f} B/token in the files (tokens and all), "
            f"{self.bytes_per_token:.1f} B/token in the store",
            f"the label is among the entries at {found.labels_kept / num:.1%} of positions{mass}",
            *self._changes(num),
            f"{self.bad_records} broken records ({found.without_targets} rows without targets); {self.resumed_rows} "
            f"rows were there from an earlier run; {format_seconds(self.seconds)}",
            *(f"not in the files: {text}" for text in self.lost),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _changes(self, num: int) -> list[str]:
        found = self.figures
        lines = []
        if found.rescaled:
            lines.append(
                f"{found.rescaled} positions ({found.rescaled / num:.2%}) summed to more than 1 and were scaled to 1: "
                f"by {found.rescaled_nats / found.rescaled:.4f} nats on average, {found.rescaled_nats_max:.4f} at most"
            )
        if found.reordered:
            lines.append(
                f"{found.reordered} positions ({found.reordered / num:.2%}) had values that rise, by "
                f"{found.rise_nats / found.reordered:.4f} nats on average, {found.rise_nats_max:.4f} at most; they are "
                "stored in order"
            )
        if found.below_rest:
            lines.append(
                f"{found.below_rest} positions ({found.below_rest / num:.2%}) have entries below the mean of the ids "
                "left out, which no top-k has: the values are off there"
            )
        if found.beyond_vocabulary:
            lines.append(f"{found.beyond_vocabulary} entries of ids beyond the tokenizer's are left to the tail")
        if found.cut:
            lines.append(f"{found.cut} entries past k are left out")
        return lines
