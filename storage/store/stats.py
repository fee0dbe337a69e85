"""store_stats: what a store holds, as histograms and bytes by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from potstill.storage.files.folder import StorePath
from potstill.storage.rows.k_bound import KBound, bound_positions
from potstill.storage.rows.row_types import ScoresRow, TargetsRow, TokensRow
from potstill.storage.rows.scores_columns import SCORES_COLUMNS
from potstill.storage.rows.sparse_targets import SparseTargets
from potstill.storage.rows.target_checks import segment_sums
from potstill.storage.store.held_rows import held_rows
from potstill.storage.store.reader import StoreReader
from potstill.storage.store.spec import RunSpec

MAX_ROWS = 512
BAR_WIDTH = 40
KEPT_ONLY = "probabilities are relative to the kept entries alone (normaliser kept): the mass outside is unknown"
# Upper bounds of the bins; the last bin is open.
BINS: dict[str, tuple[float, ...]] = {
    "kept count": (0, 1, 2, 4, 8, 16, 32, 64, 100, 128, 255),
    "kept mass": (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.01),
    "sum of weights": (0.25, 0.5, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.5, 2, 4),
    "entropy (nats)": (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 16),
    "label rank": (0, 1, 3, 7, 15, 31, 63, 127, 254, 255),
}


@dataclass(frozen=True)
class Histogram:
    """Counts per bin; `upper` are the inclusive upper bounds."""

    upper: tuple[float, ...]
    counts: tuple[int, ...]
    mean: float

    @property
    def total(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, kw_only=True)
class RowFigures:
    """What the rows of a tokens store hold: filled_share of the whole store, the others over its sampled rows.

    trained_share: tokens trained on over all tokens (1 where no row has a mask); filled_share: tokens over the places
    of full rows; num_short: rows of fewer tokens than row_length; num_without_target: rows with nothing to predict.
    """

    row_length: int
    filled_share: float
    num_rows: int
    num_short: int
    num_without_target: int
    trained_share: float
    masked: bool  # whether the store has masks

    def lines(self) -> list[str]:
        """Text for a terminal."""
        trained = f"{self.trained_share:.1%} of the tokens are trained on" if self.masked else "all tokens trained on"
        return [
            f"rows of {self.row_length} tokens, filled to {self.filled_share:.1%}; {trained}",
            f"of {self.num_rows} rows {self.num_short} are shorter, {self.num_without_target} have nothing to predict",
        ]


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """Totals of the whole store; histograms and bytes by column over `sampled_rows` evenly spaced rows.

    `normaliser` of targets as in RunSpec; where it is `kept`, there is no histogram of the kept mass, which is unknown.
    """

    url: str
    kind: str
    num_rows: int
    num_tokens: int
    num_entries: int
    num_bytes: int
    sampled_rows: int
    sampled_tokens: int
    column_bytes: Mapping[str, int]
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    k_bound: KBound | None = None  # of a store whose selection is top_p_k
    rows: RowFigures | None = None  # of kind tokens
    normaliser: str = "vocabulary"
    held_rows: int | None = None  # of targets of some rows only; the histograms are of these

    def format(self) -> str:
        """Text for a terminal."""
        per_token = self.num_bytes / max(1, self.num_tokens)
        lines = [
            f"{self.url}: {self.kind}, {self.num_rows} rows, {self.num_tokens} tokens, {self.num_entries} entries, "
            f"{self.num_bytes} bytes ({per_token:.2f} B/token)",
            *([] if self.k_bound is None else [self.k_bound.describe(per_token)]),
            *([] if self.rows is None else self.rows.lines()),
            *([] if self.held_rows is None else [f"holds {self.held_rows} of its {self.num_rows} rows, no others"]),
            *([] if self.normaliser == "vocabulary" else [KEPT_ONLY]),
            f"columns, compressed bytes per token over {self.sampled_rows} rows:",
        ]
        for name, num_bytes in self.column_bytes.items():
            lines.append(f"  {name:<14}{num_bytes / max(1, self.sampled_tokens):>9.3f}")
        for title, histogram in self.histograms.items():
            lines += _histogram_lines(title, histogram)
        return "\n".join(lines)


def store_stats(path: StorePath, *, max_rows: int = MAX_ROWS) -> StoreStats:
    """Statistics of a sealed store, from at most `max_rows` evenly spaced rows."""
    reader = StoreReader(path)
    held = held_rows(reader)
    num_rows = reader.num_rows if held is None else len(held)
    picks = np.unique(np.linspace(0, max(0, num_rows - 1), min(max_rows, num_rows)).astype(np.int64))
    picks = picks if held is None else held[picks]
    values: dict[str, list[np.ndarray]] = {name: [] for name in BINS}
    targets: list[SparseTargets] = []
    token_rows: list[TokensRow] = []
    tokens = 0
    for row in picks:
        found = reader.row(int(row))
        if isinstance(found, TargetsRow):
            _collect_targets(found, values, has_tail=reader.spec.normaliser == "vocabulary")
            targets.append(found.targets)
            tokens += found.targets.num_tokens
        elif isinstance(found, ScoresRow):
            values["entropy (nats)"].append(found.entropy)
            values["label rank"].append(found.label_rank)
            for name, of_documents in found.more.items():
                values.setdefault(name, []).append(of_documents[~np.isnan(of_documents)])
            tokens += len(found.entropy)
        else:
            token_rows.append(found)
            tokens += len(found.tokens)
    joined = {name: np.concatenate(parts) for name, parts in values.items() if parts}
    bins = BINS | {name: column.bins for name, column in SCORES_COLUMNS.items()}
    column_bytes, batch_tokens = reader.column_bytes(picks)
    scale = tokens / max(1, batch_tokens)
    return StoreStats(
        url=reader.url,
        kind=reader.spec.kind,
        num_rows=reader.num_rows,
        num_tokens=reader.num_tokens,
        num_entries=reader.manifest.num_entries,
        num_bytes=reader.manifest.num_bytes,
        sampled_rows=len(picks),
        sampled_tokens=tokens,
        column_bytes={name: round(n * scale) for name, n in column_bytes.items()},
        histograms={name: _histogram(x, bins[name]) for name, x in joined.items() if x.size},
        k_bound=_k_bound(reader.spec, targets),
        rows=_row_figures(reader, token_rows),
        normaliser=reader.spec.normaliser,
        held_rows=None if held is None else len(held),
    )


def _row_figures(reader: StoreReader, rows: Sequence[TokensRow]) -> RowFigures | None:
    if reader.spec.kind != "tokens":
        return None
    length = reader.spec.row_length
    tokens = sum(len(row.tokens) for row in rows)
    trained = sum(len(row.tokens) if row.mask is None else int(row.mask.sum()) for row in rows)
    return RowFigures(
        row_length=length,
        filled_share=reader.num_tokens / max(1, reader.num_rows * length),
        num_rows=len(rows),
        num_short=sum(len(row.tokens) < length for row in rows),
        num_without_target=sum(not row.has_target().any() for row in rows),
        trained_share=trained / max(1, tokens),
        masked=reader.spec.stores("mask"),
    )


def _k_bound(spec: RunSpec, rows: Sequence[SparseTargets]) -> KBound | None:
    selection = spec.selection
    if selection is None or selection["mode"] != "top_p_k" or not rows or spec.normaliser == "kept":
        return None
    counts = np.concatenate([np.diff(targets.offsets) for targets in rows])
    tails = np.concatenate([targets.log_tail for targets in rows])
    some = counts > 0  # positions without a target have no entries
    k, p = int(selection["k"]), float(selection["p"])
    num_bound, kept = bound_positions(counts[some], tails[some], k=k, p=p)
    positions = max(1, int(some.sum()))
    return KBound(k, p, num_bound / positions, kept / positions)


def _collect_targets(row: TargetsRow, values: dict[str, list[np.ndarray]], *, has_tail: bool) -> None:
    targets = row.targets
    kept = np.diff(targets.offsets)
    values["kept count"].append(kept)
    some = kept > 0
    kind, mass = targets.entry_mass(np.float64)
    tail = np.exp(targets.log_tail.astype(np.float64))
    sums = segment_sums(mass, targets.offsets)
    if has_tail:
        values["kept mass"].append((sums / (sums + tail) if kind == "probability" else 1 - tail)[some])
    if kind == "weight":
        values["sum of weights"].append(sums[some])
    if targets.entropy is not None:
        values["entropy (nats)"].append(targets.entropy[some])
    if targets.label_rank is not None:
        values["label rank"].append(targets.label_rank[some])


def _histogram(values: np.ndarray, upper: Sequence[float]) -> Histogram:
    places = np.minimum(np.searchsorted(np.array(upper), values, side="left"), len(upper) - 1)
    counts = np.bincount(places, minlength=len(upper))
    return Histogram(tuple(upper), tuple(int(c) for c in counts), float(values.mean()))


def _histogram_lines(title: str, histogram: Histogram) -> list[str]:
    lines = [f"{title}: mean {histogram.mean:.4g}"]
    most = max(histogram.counts)
    for upper, count in zip(histogram.upper, histogram.counts, strict=True):
        share = count / max(1, histogram.total)
        lines.append(f"  <= {upper:<7g}{share:>7.1%} {'#' * round(BAR_WIDTH * count / max(1, most))}")
    return lines
