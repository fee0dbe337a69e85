"""Whether the targets of a row stand at the tokens they are for: what the row itself says, at every position of it.

A row may carry the digest of its tokens and yet hold distributions that lie one position beside them. Its label column
tells: it says how probable the teacher found the next token, and the entries say it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from potstill.storage.errors import MismatchError
from potstill.storage.rows.array_types import Int64, UInt8
from potstill.storage.rows.first_choices import first_choices
from potstill.storage.rows.row_types import TargetsRow, TokensRow
from potstill.storage.rows.sparse_targets import SparseTargets
from potstill.storage.rows.value_grid import VALUE_STEP

# Label and entry are rounded on the same grid from the same number, so they agree to one grid step.
TOLERANCE_NATS = 1 / VALUE_STEP + 1e-3
MAX_WRONG = 0.01  # of the labels that can be compared: other writers may round in another way
# A document that stands beside its tokens agrees almost nowhere; in a long row it may be less than one in a hundred.
_COMPARED_AT_LEAST, _WRONG_IN_A_DOCUMENT = 8, 0.5
_FLOOR = -255 / VALUE_STEP  # a label column says this of all that is less probable
# exp(-32) = 1e-14 is the most that a right row has as its chance to be refused for what was drawn.
_MAX_SURPRISE = 32.0
# How often a token that a position does not predict may be drawn there: hardly ever, or anyhow.
_ANY_SHARE, _WEIGHTS = np.array([0.004, 0.05, 0.2, 0.5, 0.9]), np.array([0.6, 0.1, 0.1, 0.1, 0.1])


@dataclass(frozen=True)
class LabelAgreement:
    """Figures of one row or of several added up: labels (positions with a target and a label), those that can be
    compared, and those of them that contradict the entries; kept: labels among the entries.

    Of rows of draws: drawn, how often the labels came; expected, how often by their probabilities; surprise, -log of a
    bound on the chance of these draws in a row that stands right; at_most, what it were if no label had been drawn.
    """

    num_labels: int = 0
    num_kept: int = 0
    num_compared: int = 0
    num_wrong: int = 0
    drawn: int = 0
    expected: float = 0.0
    surprise: float = 0.0
    at_most: float = 0.0

    def __add__(self, other: LabelAgreement) -> LabelAgreement:
        return LabelAgreement(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def can_tell(self) -> bool:
        """Whether there are labels enough, or draws enough, for a shift to show."""
        return self.num_compared >= _COMPARED_AT_LEAST or self.at_most >= 2 * _MAX_SURPRISE

    @property
    def problem(self) -> str | None:
        """What speaks against these rows, or None."""
        if self.num_wrong > MAX_WRONG * self.num_compared:
            return (
                f"{self.num_wrong} of the {self.num_compared} labels that can be compared have another probability in "
                f"the label column than among the entries, at most {MAX_WRONG:.0%} may"
            )
        if self.surprise > _MAX_SURPRISE:
            return (
                f"the labels were drawn {self.drawn} times, by the label column {self.expected:.0f} times are to be "
                f"expected (the chance of such draws is below exp(-{self.surprise:.0f}))"
            )
        return None


def check_row_alignment(tokens: TokensRow, row: TargetsRow, *, where: str) -> LabelAgreement:
    """See that no target stands where none may, and that label column and entries speak of the same positions.

    Both rows in the ids of one vocabulary. Where labels cannot tell (no label column, importance weights) the row is
    refused if its first choices fit a neighbour of the next token clearly better (`FirstChoices.stands_beside`).
    `where` names the store. Raises MismatchError with the row and the figures.
    """
    check_row_places(tokens, row, where=where)
    found, wrong, compared = _label_agreement(tokens, row.targets)
    problem = found.problem
    if problem is None and found.num_wrong:
        problem = _wrong_document(tokens, wrong, compared)
    if problem is None and not found.can_tell:
        chosen = first_choices([(tokens, row)])
        problem = chosen.text if chosen.stands_beside else None
    if problem is not None:
        raise MismatchError(f"{where}: row {row.row}: {problem}; {BESIDE}")
    return found


BESIDE = "the targets are shifted or belong to other tokens; make the store again from this tokens store"


def check_row_places(tokens: TokensRow, row: TargetsRow, *, where: str) -> None:
    """See that no target stands at a position without one (`TokensRow.has_target`). Raises MismatchError."""
    counts, places = np.diff(row.targets.offsets), tokens.has_target()
    if len(counts) != len(places):
        raise MismatchError(f"{where}: row {row.row} has {len(counts)} positions, the tokens store {len(places)}")
    wrong = np.flatnonzero((counts > 0) & ~places)
    if not wrong.size:
        return
    at = int(wrong[0])
    is_masked = at + 1 not in np.cumsum(tokens.doc_lens)
    reason = f"token {at + 1} is not trained on (its mask is off)" if is_masked else f"token {at} ends its document"
    raise MismatchError(
        f"{where}: row {row.row}, position {at} holds a target of {counts[at]} entries, expected none: {reason}. "
        f"{wrong.size} positions of the row are so; make the targets again from this tokens store"
    )


def _label_agreement(tokens: TokensRow, targets: SparseTargets) -> tuple[LabelAgreement, Int64, Int64]:
    """Figures, and the positions [W] that contradict and [C] that can be compared."""
    none = np.zeros(0, np.int64)
    counts = np.diff(targets.offsets)
    labels = tokens.labels()
    has_label = (labels >= 0) & (counts > 0)
    num_labels = int(has_label.sum())
    if targets.label_logprob is None or not num_labels:
        return LabelAgreement(num_labels), none, none
    # Entries that are the label, one of a position at most. Ids are int32, and half as many bytes are twice as fast.
    own = np.flatnonzero(targets.ids == np.repeat(labels.astype(np.int32), counts))
    places = np.searchsorted(targets.offsets, own, side="right") - 1
    if targets.logprobs is None:
        if targets.counts is None or targets.num_draws is None:
            return LabelAgreement(num_labels, len(own)), none, none
        return _of_draws(targets, has_label, places, targets.counts[own]), none, none
    # Less than the floor is one value in the label column, and is no lower among the entries for this.
    said, values = np.maximum(targets.label_logprob, _FLOOR), targets.logprobs
    apart = np.abs(np.maximum(values[own], _FLOOR) - said[places]) > TOLERANCE_NATS
    absent = none
    if targets.num_draws is None:
        # Entries are the most probable ids, so a label above the least of them is one; draws promise no such thing.
        above = has_label.copy()
        above[has_label] = (
            said[has_label] > np.maximum(values[targets.offsets[1:][has_label] - 1], _FLOOR) + TOLERANCE_NATS
        )
        above[places] = False
        absent = np.flatnonzero(above)
    wrong, compared = np.concatenate([places[apart], absent]), np.concatenate([places, absent])
    return LabelAgreement(num_labels, len(own), len(compared), len(wrong)), wrong, compared


def _of_draws(targets: SparseTargets, has_label: NDArray[np.bool_], places: Int64, counts: UInt8) -> LabelAgreement:
    """counts [K]: how often the labels at `places` [K] were drawn."""
    assert targets.num_draws is not None and targets.label_logprob is not None
    drawn = np.zeros(targets.num_tokens)
    drawn[places] = counts
    drawn, said = drawn[has_label], targets.label_logprob[has_label].astype(np.float64)
    return LabelAgreement(
        num_labels=len(said),
        num_kept=len(places),
        drawn=int(counts.sum()),
        expected=float(targets.num_draws * np.exp(said).sum()),
        surprise=_surprise(drawn, said, targets.num_draws),
        at_most=_surprise(np.zeros(len(said)), said, targets.num_draws),
    )


def _surprise(drawn: NDArray[np.float64], said: NDArray[np.float64], num_draws: int) -> float:
    """-log of a bound on the chance that labels of these log-probabilities [M] are drawn so often [M], or unlikelier.

    A ratio of likelihoods to any other hypothesis that does not look at the draws is e^s with a chance of e^-s at most.
    The other one here: the draws belong to another token, so nothing is said of them.
    """
    low = np.where(said <= _FLOOR, 0.0, np.exp(said - 0.5 / VALUE_STEP))  # the probability before it was rounded
    p = np.clip(drawn / num_draws, low, np.minimum(np.exp(said + 0.5 / VALUE_STEP), 1.0))  # what suits the row best
    with np.errstate(divide="ignore", invalid="ignore"):
        here = np.where(drawn > 0, drawn * np.log(p), 0.0)
        here += np.where(drawn < num_draws, (num_draws - drawn) * np.log1p(-p), 0.0)
    elsewhere = drawn[:, None] * np.log(_ANY_SHARE) + (num_draws - drawn[:, None]) * np.log1p(-_ANY_SHARE)
    return float((np.logaddexp.reduce(elsewhere + np.log(_WEIGHTS), axis=1) - here).sum())


def _wrong_document(tokens: TokensRow, wrong: Int64, compared: Int64) -> str | None:
    ends = np.cumsum(tokens.doc_lens)
    num_wrong, num_compared = (
        np.bincount(np.searchsorted(ends, places, side="right"), minlength=len(ends)) for places in (wrong, compared)
    )
    beside = np.flatnonzero((num_compared >= _COMPARED_AT_LEAST) & (num_wrong > _WRONG_IN_A_DOCUMENT * num_compared))
    if not beside.size:
        return None
    at = int(beside[0])
    return (
        f"{num_wrong[at]} of the {num_compared[at]} labels that can be compared in document {at} of the row have "
        "another probability in the label column than among the entries"
    )
