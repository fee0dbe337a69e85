"""The table of measures: how far two versions of a row are apart, position by position. A new one is an entry here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from potstill.storage import RunSpec
from potstill.storage.rows.value_grid import ODDS_STEP, SCORE_STEP, VALUE_STEP
from potstill.teacher_dump.against_teacher.pairs import LEAST_MASS, Float64, Pair, first_choices


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One distance, or something to show.

    words  what it is, with its unit
    of     the distance at each position compared, [M]; None where a row lacks what it needs
    slope  distance that comes of log-probabilities which are one nat apart, at most; None: shown, not judged by
    step   nats, one step of the grid that the values are stored on
    event  distance at one position that comes of what is as good as equal falling the other way; None: of one step
    single whether one position alone may say that a store is another's: not where chance decides (draws, ranks)
    """

    name: str
    words: str
    of: Callable[[Pair], Float64 | None]
    slope: float | None = None
    step: Callable[[RunSpec], float] = lambda spec: 1 / VALUE_STEP
    event: Callable[[RunSpec], float] | None = None
    single: bool = True

    def of_step(self, spec: RunSpec, share: float = 1.0) -> float:
        """Distance that `share` of a step of the grid makes, everywhere at once."""
        assert self.slope is not None
        return self.slope * math.expm1(share * self.step(spec))

    def of_event(self, spec: RunSpec) -> float:
        """See `event`."""
        return self.of_step(spec) if self.event is None else self.event(spec)


def _kl(pair: Pair) -> Float64 | None:
    """KL(stored || live) in its form for masses that a grid has moved, so that they do not add up to 1: never < 0."""
    found = pair.buckets
    if found is None:
        return None
    p, q, rest_p, rest_q = (np.maximum(x, LEAST_MASS) for x in (found.p, found.q, found.rest_p, found.rest_q))
    return found.sum(p * np.log(p / q) - p + q) + rest_p * np.log(rest_p / rest_q) - rest_p + rest_q


def _entries(pair: Pair) -> Float64 | None:
    found = pair.buckets
    if found is None:
        return None
    return (found.sum(np.abs(found.p - found.q)) + np.abs(found.rest_p - found.rest_q)) / 2


def _draws(pair: Pair) -> Float64 | None:
    found = pair.draws
    return None if found is None else found.sum(np.abs(found.p - found.q)) / 2


def _other_choice(pair: Pair) -> Float64 | None:
    if pair.buckets is not None and pair.targets is not None:
        first = [first_choices(one, pair.places) for one in pair.targets]
        return (first[0] != first[1]).astype(np.float64)
    ranks = pair.columns("label_rank")
    return None if ranks is None else ((ranks[0] == 0) != (ranks[1] == 0)).astype(np.float64)


def _log_tail(pair: Pair) -> Float64 | None:
    tails = None if pair.buckets is None else pair.columns("log_tail")
    if tails is None:
        return None
    floor = math.log(LEAST_MASS)
    return np.abs(np.maximum(tails[0], floor) - np.maximum(tails[1], floor))


def _tails_at(pair: Pair) -> Float64 | None:
    """The largest over the temperatures."""
    if pair.targets is None or not pair.targets[0].log_tail_at or not pair.targets[1].log_tail_at:
        return None
    a, b = pair.targets
    each = [
        np.abs(np.exp(a.log_tail_at[t][pair.places].astype(np.float64)) - np.exp(b.log_tail_at[t][pair.places]))
        for t in a.log_tail_at
    ]
    return np.asarray(np.max(each, axis=0), np.float64)


def _label(pair: Pair) -> Float64 | None:
    found = pair.columns("label_logprob")
    return None if found is None else np.abs(np.exp(found[0]) - np.exp(found[1]))


def _label_logprob(pair: Pair) -> Float64 | None:
    found = pair.columns("label_logprob")
    # Where a grid ends both say "very improbable".
    return None if found is None else np.abs(np.maximum(found[0], -255 / 16) - np.maximum(found[1], -255 / 16))


def _entropy(pair: Pair) -> Float64 | None:
    found = pair.columns("entropy")
    return None if found is None else np.abs(found[0] - found[1])


def _rank(pair: Pair) -> Float64 | None:
    found = pair.columns("label_rank")
    return None if found is None else 1 - (1 + np.minimum(*found)) / (1 + np.maximum(*found))


def _side_step(spec: RunSpec) -> float:
    return 1 / (SCORE_STEP if spec.kind == "scores" else VALUE_STEP)


MEASURES: dict[str, Measure] = {
    one.name: one
    for one in (
        Measure(name="kl", words="KL of stored to live, nats", of=_kl),
        Measure(name="other_choice", words="share of positions with another first choice", of=_other_choice),
        Measure(name="log_tail", words="|difference of log tail mass|, nats", of=_log_tail),
        Measure(name="label_logprob", words="|difference of the label's log-probability|, nats", of=_label_logprob),
        Measure(name="entries", words="total variation of entries and tail", of=_entries, slope=0.5),
        Measure(
            name="draws",
            words="total variation of the draws",
            of=_draws,
            slope=0.5,
            event=lambda spec: 1 / (spec.num_draws or 1),
            single=False,
        ),
        Measure(
            name="tails_at",
            words="|difference of tail mass| at the temperatures",
            of=_tails_at,
            slope=0.25,
            step=lambda spec: 1 / ODDS_STEP,
        ),
        Measure(name="label", words="|difference of the label's probability|", of=_label, slope=1.0, step=_side_step),
        Measure(name="entropy", words="|difference of entropies|, nats", of=_entropy, slope=1.0, step=_side_step),
        Measure(
            name="label_rank",
            words="|relative difference of the label's rank|",
            of=_rank,
            slope=1.0,
            event=lambda spec: 0.5,
            single=False,
        ),
    )
}
