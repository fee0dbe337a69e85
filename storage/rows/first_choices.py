"""Stores without label probabilities: does the teacher's first choice fit the next token, or its neighbour better?

A store whose distributions stand one position too early or too late names the token after the next, or the one just
read. That can be told only of a teacher that is right often enough, and by counting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from potstill.storage.rows.array_types import Int64
from potstill.storage.rows.row_types import TargetsRow, TokensRow
from potstill.storage.rows.sparse_targets import SparseTargets
from potstill.storage.rows.target_checks import segment_sums

MIN_TIMES = 2.0  # as many matches as the other shift, ...
MIN_SHARE = 0.05  # ... that many of all positions more, ...
MIN_DEVIATIONS = 8.0  # ... and so many standard deviations, since every row of a long run may be asked
# An untrained model with tied embeddings names the token that it reads almost everywhere; a trained one that is this
# good on real text would be a rare thing.
COPIES = 0.9
_WEIGHTS_AT_LEAST = 8  # draws of a position, for the weight of its first entry to be near a probability


@dataclass(frozen=True)
class FirstChoices:
    """Of `num` positions, how often the first entry is the token just read, the next one, and the one after it.

    confidence: how often a teacher of these probabilities should be right, NaN where its draws are too few to tell.
    """

    num: int
    read: int
    next: int
    after: int
    confidence: float

    @property
    def stands_right(self) -> bool:
        """Whether the next token fits clearly better than both of its neighbours."""
        return self._better(self.next, self.read) and self._better(self.next, self.after)

    @property
    def stands_beside(self) -> bool:
        """Whether a neighbour fits clearly better, and as often as the teacher itself expected to be right.

        The second condition, and `COPIES` for the token just read, leave out teachers that hardly were trained: these
        may copy what they read, or name one frequent token everywhere.
        """
        for count, most in ((self.read, COPIES), (self.after, 1.0)):
            share, right = count / max(1, self.num), self.next / max(1, self.num)
            expected = abs(self.confidence - share) < abs(self.confidence - right)
            if self._better(count, self.next) and expected and share <= most:
                return True
        return False

    def _better(self, count: int, other: int) -> bool:
        ahead = count - other
        return (
            count >= MIN_TIMES * other
            and ahead >= MIN_SHARE * self.num
            and ahead > 0
            and ahead**2 >= MIN_DEVIATIONS**2 * (count + other)
        )

    @property
    def text(self) -> str:
        """The figures, for a message."""
        read, right, after = (f"{count / max(1, self.num):.1%}" for count in (self.read, self.next, self.after))
        expected = "its draws are too few to say what" if np.isnan(self.confidence) else f"{self.confidence:.1%}"
        return (
            f"at {self.num} positions the teacher's first choice is the next token in {right}, the token before it in "
            f"{read}, the token behind it in {after} ({expected} is to be expected)"
        )


def first_choices(rows: Iterable[tuple[TokensRow, TargetsRow]]) -> FirstChoices:
    """Count over rows, at positions that have a target and two further tokens of their document."""
    counts, confidence = np.zeros(4, np.int64), 0.0
    for tokens, row in rows:
        targets = row.targets
        ends = np.repeat(np.cumsum(tokens.doc_lens), tokens.doc_lens)
        places = np.flatnonzero((np.diff(targets.offsets) > 0) & (np.arange(len(ends)) + 2 < ends))
        if not len(places):
            continue
        first = targets.offsets[places]
        chosen = targets.ids[first]
        counts += [len(places), *(int((chosen == tokens.tokens[places + ahead]).sum()) for ahead in (0, 1, 2))]
        confidence += _confidence(targets, places)
    num, read, right, after = (int(count) for count in counts)
    return FirstChoices(num, read, right, after, confidence / max(1, num))


def _confidence(targets: SparseTargets, places: Int64) -> float:
    """Sum over positions of the probability of the first entry, without the bias that choosing it among draws has."""
    first, draws = targets.offsets[places], targets.num_draws
    kind, values = targets.entry_column
    if kind == "probability":
        return float(np.exp(values[first].astype(np.float64)).sum())
    if kind == "weight":
        mass = np.minimum(np.exp(values[first].astype(np.float64)), 1.0)
        return float(mass.sum()) if (draws or 0) >= _WEIGHTS_AT_LEAST else float("nan")
    if draws is None or draws < 2:
        return float("nan")
    # How often two draws of a position are the same one.
    mass = values / float(draws)
    pairs = segment_sums(mass * (mass * draws - 1) / (draws - 1), targets.offsets)
    return float(pairs[places].sum())
