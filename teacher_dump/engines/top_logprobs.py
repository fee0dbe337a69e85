"""Log-probabilities alone: from what a server of them tells to the figures of a store, and the checks of these.

Legend: M target positions of a batch, k entries per position, R best ids that were told of a position (R >= k).

Such a server tells of each position the R best ids with their log-probabilities, normalised over the whole output
layer, and those of the label with its rank. The tail is what the k best leave of 1. Its error is that of float32
log-probabilities near 1, about 1e-6 of mass; below that only the ids that were told beyond the k best speak for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.kernels.topk import TopK
from potstill.teacher_dump.engines.base import TopKWanted, TopLogprobs

_MASS_TOLERANCE = 1e-3  # kept and tail mass add up to 1; float32 sums over a vocabulary are good to 1e-5
_LABEL_TOLERANCE = 1e-3  # nats
_MOST_BEYOND = 0.99  # mass beyond the tokenizer: what is left would be known to a thousandth only


@dataclass(frozen=True)
class Told:
    """What a server tells of M positions, and the next tokens there.

    ids int64 [M, R] distinct, the best of the output layer in any order; logprobs float32 [M, R]; labels int64 [M];
    label_logprob float32 [M]; at_or_above int64 [M], how many ids but the label are at its log-probability or above it.
    """

    ids: Tensor
    logprobs: Tensor
    labels: Tensor
    label_logprob: Tensor
    at_or_above: Tensor


def top_logprobs(told: Told, wanted: TopKWanted, *, engine: str) -> TopLogprobs:
    """The k best ids below vocab_size with their tail, and the label's rank (of equals outside of R: the last).

    What was told on ids at and above vocab_size is taken out and the rest divided by what it leaves; the mass of such
    ids that were not told stays in the tail, and all log-probabilities are too low by it. A position with NaN is NaN
    throughout. UserError where a position has fewer than k ids below vocab_size, or next to no mass on them.
    """
    broken = told.label_logprob.isnan() | told.logprobs.isnan().any(1)  # [M]
    beyond = told.ids >= wanted.vocab_size  # [M, R]
    told_mass = told.logprobs.double().exp()
    excluded = torch.where(beyond, told_mass, 0.0).sum(1)  # [M]
    _check_told(told, wanted, beyond=beyond, excluded=excluded, sound=~broken, engine=engine)
    left = torch.log1p(-torch.where(broken, 0.0, excluded))  # [M], log mass of the ids below vocab_size
    values = torch.where(beyond, -torch.inf, told.logprobs.double() - left[:, None]).clamp_max(0.0)
    # By value down, then id up; ids beyond the vocabulary come last in the order of ids already.
    order = told.ids.argsort(dim=1)
    order = order.gather(1, values.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
    ids, values = told.ids.gather(1, order), values.gather(1, order)
    kept, more = values[:, : wanted.k].exp().sum(1), values[:, wanted.k :].exp().sum(1)
    tail = torch.maximum(1 - kept, more) if wanted.k < wanted.vocab_size else torch.zeros_like(kept)
    own = ids[:, : wanted.k] == told.labels[:, None]  # [M, k]
    above = (beyond & (told.logprobs >= told.label_logprob[:, None])).sum(1)
    label = (told.label_logprob.double() - left).clamp_max(0.0)

    def marked(figure: Tensor) -> Tensor:
        wide = broken if figure.ndim == 1 else broken[:, None]
        return torch.where(wide, torch.nan, figure).float()

    return TopLogprobs(
        ids=ids[:, : wanted.k].int(),
        logprobs=marked(values[:, : wanted.k]),
        log_tail=marked(tail.log()),
        label_logprob=marked(label),
        label_rank=torch.where(own.any(1), own.int().argmax(1), told.at_or_above - above).int(),
        excluded_mass=marked(excluded),
    )


def _check_told(
    told: Told, wanted: TopKWanted, *, beyond: Tensor, excluded: Tensor, sound: Tensor, engine: str
) -> None:
    """Raise UserError for positions that cannot be made into entries, and for ranks that are not those of the entries.

    An id among the R best has all ids above it among them, so its rank is known; only equals of the last may be cut.
    """
    short = (~beyond).sum(1) < wanted.k
    own = told.ids == told.labels[:, None]  # [M, R]
    seen = (told.logprobs >= told.label_logprob[:, None]).sum(1) - own.sum(1)  # [M]
    whole = told.logprobs.amin(1) < told.label_logprob  # the label stands above the last one told
    misplaced = torch.where(whole, told.at_or_above != seen, told.at_or_above < seen) | (whole & ~own.any(1))
    advice, least = "check that the tokenizer is the teacher's, or use engine hf", f"{wanted.k} ids below"
    for wrong, text in (
        (short, f"has fewer than {least} {wanted.vocab_size} among its best {told.ids.shape[1]}; {advice}"),
        (
            excluded > _MOST_BEYOND,
            f"has nearly all of its mass on ids beyond the tokenizer's {wanted.vocab_size}; {advice}",
        ),
        (misplaced, "gives its label a rank that is not its place among the best; this engine must not be used"),
    ):
        if bool((wrong & sound).any()):
            here = int((wrong & sound).nonzero()[0])
            raise UserError(
                f"engine {engine}: position {here} of a batch {text} (ids {told.ids[here, :4].tolist()}, "
                f"log-probabilities {told.logprobs[here, :4].tolist()}, label {int(told.labels[here])} at "
                f"{float(told.label_logprob[here])} with {int(told.at_or_above[here])} ids before it, mass beyond the "
                f"tokenizer {float(excluded[here]):.2g}; {int((wrong & sound).sum())} of {len(sound)} positions)"
            )


def as_topk(found: TopLogprobs) -> TopK:
    """The same for what selects entries: log-probabilities are logits whose lse is 0. Its entropy is NaN, not known."""
    zero = torch.zeros_like(found.label_logprob)
    return TopK(
        ids=found.ids,
        logprobs=found.logprobs,
        lse=zero,
        lse_at={},
        entropy=torch.full_like(zero, torch.nan),
        label_logprob=found.label_logprob,
        label_rank=found.label_rank,
        excluded_mass=found.excluded_mass,
        log_tail=found.log_tail,
        log_tail_at={},
    )


def check_top_logprobs(found: TopLogprobs, labels: Tensor, wanted: TopKWanted, *, engine: str) -> TopLogprobs:
    """The same if it can be right; `labels` int64 [M] are the next tokens. Raises UserError naming the position.

    Positions with NaN in label_logprob are left alone: their rows are refused one by one later.
    """
    _check_shapes(found, len(labels), wanted, engine)
    sound = ~found.label_logprob.isnan()  # [M]
    ids, logprobs, rank = found.ids[sound], found.logprobs[sound], found.label_rank[sound]  # [S, k], [S, k], [S]
    label, log_tail = found.label_logprob[sound, None], found.log_tail[sound]  # [S, 1], [S]
    places = sound.nonzero().flatten()  # [S]
    ordered_ids = ids.sort(dim=1).values
    mass = logprobs.double().exp().sum(1) + log_tail.double().exp()  # [S]
    own = ids == labels[sound, None]  # [S, k], at most one of a position
    of_label = torch.where(own, logprobs, 0.0).sum(1)  # [S]
    inside, last = own.any(1), logprobs[:, -1]
    apart = inside & ~((of_label - label[:, 0]).abs() <= _LABEL_TOLERANCE) & ~(of_label == label[:, 0])
    outside = ~inside & ~((label[:, 0] <= last) & (label[:, 0] <= log_tail + _LABEL_TOLERANCE) & (rank >= wanted.k))
    limit = wanted.vocab_size - 1
    tied = (logprobs[:, 1:] == logprobs[:, :-1]) & (ids[:, 1:] < ids[:, :-1])
    for wrong, text in (
        (((ids < 0) | (ids > limit)).any(1), f"holds an id that is not one of 0 .. {limit}"),
        ((ordered_ids[:, 1:] == ordered_ids[:, :-1]).any(1), "names an id twice"),
        (~(logprobs <= 0).all(1) | ~(label[:, 0] <= 0), "holds a log-probability above 0 or NaN"),
        (~(logprobs[:, 1:] <= logprobs[:, :-1]).all(1), "is not in descending order of log-probability"),
        (tied.any(1), "holds equal log-probabilities whose ids do not rise"),
        (~((mass - 1).abs() <= _MASS_TOLERANCE), "has kept and tail mass that do not add up to 1"),
        (apart, "gives the label another log-probability than its entry; is each position that of its label?"),
        (inside & (rank != own.int().argmax(1)), "gives the label another rank than the place of its entry"),
        (outside, "leaves out a label that is above its last entry, heavier than its tail, or of a rank below k"),
    ):
        if bool(wrong.any()):
            here = int(wrong.nonzero()[0])
            raise UserError(
                f"engine {engine}: position {int(places[here])} of a batch {text} (ids {ids[here, :4].tolist()}, "
                f"log-probabilities {logprobs[here, :4].tolist()}, log tail {float(log_tail[here])}, label "
                f"{int(labels[places[here]])} at {float(label[here])}, rank {int(rank[here])}; "
                f"{int(wrong.sum())} of {len(labels)} positions); this engine must not be used: use engine hf"
            )
    return found


def _check_shapes(found: TopLogprobs, num_positions: int, wanted: TopKWanted, engine: str) -> None:
    one, wide = (num_positions,), (num_positions, wanted.k)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "ids": (wide, torch.int32),
        "logprobs": (wide, torch.float32),
        "label_rank": (one, torch.int32),
        **dict.fromkeys(("log_tail", "label_logprob", "excluded_mass"), (one, torch.float32)),
    }
    if wanted.temperatures:
        raise UserError(
            f"engine {engine}: log-probabilities at T = 1 hold no tails at the temperatures "
            f"{sorted(wanted.temperatures)}; leave temperatures out, or use engine hf"
        )
    for name, (shape, dtype) in expected.items():
        part = getattr(found, name)
        if tuple(part.shape) != shape or part.dtype != dtype:
            raise UserError(
                f"engine {engine}: {name} of the best log-probabilities is {part.dtype} {list(part.shape)}, expected "
                f"{dtype} {list(shape)}; this engine must not be used: use engine hf"
            )
