"""From told log-probabilities to entries, tails and ranks, against float64 truth; what cannot be right is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from potstill.common.errors import UserError
from potstill.teacher_dump.engines.base import TopKWanted, TopLogprobs
from potstill.teacher_dump.engines.top_logprobs import Told, as_topk, check_top_logprobs, top_logprobs

VOCAB, HEAD = 60, 64
WANTED = TopKWanted(k=4, vocab_size=VOCAB, temperatures=())


def told_of(logits: torch.Tensor, labels: torch.Tensor, num_best: int) -> Told:
    """What a server tells of logits [M, HEAD]: float32 softmaxes over all of them, ranks that count equals."""
    every = logits.float().log_softmax(1)
    best, label = every.topk(num_best), every.gather(1, labels[:, None])
    return Told(best.indices, best.values, labels, label[:, 0], (every >= label).sum(1) - 1)


def made_up(num_best: int = 12, *, scale: float = 3.0) -> tuple[torch.Tensor, Told]:
    """Logits float64 [6, HEAD] whose rows beyond the vocabulary are last or first, and labels of any rank."""
    logits = scale * torch.randn(6, HEAD, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, VOCAB:] -= 40
    logits[2, VOCAB] = logits[2].max() - 0.1 * scale
    labels = logits[:, :VOCAB].argsort(1, descending=True)[torch.arange(6), torch.tensor([0, 2, 3, 4, 9, 50])]
    return logits, told_of(logits, labels, num_best)


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
def test_figures_are_those_of_a_softmax_in_float64(scale: float) -> None:
    logits, told = made_up(scale=scale)
    found = check_top_logprobs(top_logprobs(told, WANTED, engine="x"), told.labels, WANTED, engine="x")
    truth = logits[:, :VOCAB].log_softmax(1)
    order = truth.argsort(1, descending=True)
    assert torch.equal(found.ids.long(), order[:, :4])
    assert (found.logprobs - truth.gather(1, order[:, :4])).abs().max() < 2e-5
    assert (found.label_logprob - truth.gather(1, told.labels[:, None])[:, 0]).abs().max() < 2e-5
    assert found.label_rank.tolist() == [0, 2, 3, 4, 9, 50]
    excluded = logits.softmax(1)[:, VOCAB:].sum(1)
    assert (found.excluded_mass - excluded).abs().max() < 1e-6 and excluded[2] > 0.01
    tails = truth.scatter(1, order[:, :4], -torch.inf).exp().sum(1)
    assert (found.log_tail.double().exp() - tails).abs().max() < 2e-6


def test_a_tail_below_what_float32_resolves_is_that_of_the_ids_beyond_k() -> None:
    """The four best hold all but 1e-9: 1 minus their sum is rounding, the next ids were told."""
    logits = torch.full((50, HEAD), -60.0, dtype=torch.float64)
    logits[:, :4] = 2 * torch.rand(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 4:8] = torch.tensor([-19.0, -20.0, -21.0, -22.0])
    labels = torch.ones(50, dtype=torch.int64)
    found = top_logprobs(told_of(logits, labels, 10), WANTED, engine="x").log_tail
    tail = logits.softmax(1)[:, 4:].sum(1)
    assert tail.max() < 1e-8 and found.max() < -13
    assert (found >= tail.log() - 1e-4).all() and (found < tail.log() + 1e-4).any()  # some sums are rounded above 1
    everything = replace(WANTED, k=HEAD, vocab_size=HEAD)
    assert (top_logprobs(told_of(logits, labels, HEAD), everything, engine="x").log_tail == -torch.inf).all()


def test_equals_go_by_id_also_where_k_cuts_them() -> None:
    logits = torch.zeros(1, HEAD, dtype=torch.float64)
    logits[0, [30, 20, 10, 50, 40]] = 3.0  # five equals, four are kept
    told = told_of(logits, torch.tensor([50]), 12)
    upside_down = replace(told, ids=told.ids.flip(1), logprobs=told.logprobs.flip(1))
    for one in (told, upside_down):
        found = check_top_logprobs(top_logprobs(one, WANTED, engine="x"), one.labels, WANTED, engine="x")
        assert found.ids.tolist() == [[10, 20, 30, 40]] and found.label_rank.tolist() == [4]


def test_log_probabilities_are_logits_for_what_selects_entries() -> None:
    from potstill.kernels.topk import select_top_p_k

    _, told = made_up()
    found = top_logprobs(told, WANTED, engine="x")
    topk = as_topk(found)
    assert topk.entropy.isnan().all() and not topk.lse.any()
    kept = select_top_p_k(topk, 0.5, 4)
    for n in range(6):
        here = slice(int(kept.offsets[n]), int(kept.offsets[n + 1]))
        mass = found.logprobs[n].double().exp().cumsum(0)
        assert here.stop - here.start == min(4, 1 + int((mass < 0.5).sum()))
        assert float(kept.log_tail[n].exp()) == pytest.approx(1 - float(mass[here.stop - here.start - 1]), abs=2e-6)


def test_positions_without_finite_logits_are_left_alone() -> None:
    logits, told = made_up()
    logits[3] = torch.nan
    broken = told_of(logits, told.labels, 12)
    found = check_top_logprobs(top_logprobs(broken, WANTED, engine="x"), told.labels, WANTED, engine="x")
    assert found.label_logprob.isnan().tolist() == [False, False, False, True, False, False]
    assert torch.equal(found.logprobs[4], top_logprobs(told, WANTED, engine="x").logprobs[4])


def test_too_many_ids_beyond_the_tokenizer_are_refused() -> None:
    logits, told = made_up()
    logits[1, VOCAB:] = logits[1].max() - 2
    with pytest.raises(UserError, match=r"position 1 of a batch has fewer than 4 ids below 60 among its best 7"):
        top_logprobs(told_of(logits, told.labels, 7), WANTED, engine="x")
    logits[1, VOCAB:] = logits[1].max() + 9
    with pytest.raises(
        UserError, match=r"position 1 of a batch has nearly all of its mass on ids beyond the tokenizer's 60"
    ):
        top_logprobs(told_of(logits, told.labels, 12), WANTED, engine="x")


@pytest.mark.parametrize("by", [-1, 1, 5])
def test_a_rank_that_is_not_the_place_is_refused(by: int) -> None:
    _, told = made_up()
    with pytest.raises(UserError, match="engine x: position 4 of a batch gives its label a rank that is not its place"):
        top_logprobs(replace(told, at_or_above=told.at_or_above + by * (torch.arange(6) == 4)), WANTED, engine="x")
    outside = replace(told, at_or_above=told.at_or_above - 40 * (torch.arange(6) == 5))
    with pytest.raises(UserError, match="position 5 of a batch gives its label a rank that is not its place"):
        top_logprobs(outside, WANTED, engine="x")


def swap_first_two(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values[:, 1:2], values[:, :1], values[:, 2:]], 1)


SPOILED: dict[str, tuple[Callable[[TopLogprobs], TopLogprobs], str]] = {
    "a column less": (lambda t: replace(t, ids=t.ids[:, 1:]), r"ids .* torch.int32 \[6, 3\], expected .* \[6, 4\]"),
    "a position less": (lambda t: replace(t, log_tail=t.log_tail[1:]), r"log_tail .* \[5\], expected .* \[6\]"),
    "another dtype": (lambda t: replace(t, logprobs=t.logprobs.double()), "logprobs .* torch.float64"),
    "an id of the padding": (lambda t: replace(t, ids=t.ids.clone().fill_(VOCAB)), "not one of 0 .. 59"),
    "an id twice": (lambda t: replace(t, ids=t.ids[:, :1].expand(-1, 4)), "names an id twice"),
    "ascending": (
        lambda t: replace(t, ids=swap_first_two(t.ids), logprobs=swap_first_two(t.logprobs)),
        "not in descending order",
    ),
    "equals upside down": (
        lambda t: replace(
            t,
            ids=torch.arange(3, -1, -1).expand(6, 4).int(),
            logprobs=torch.full((6, 4), -1.5),
            label_rank=t.label_rank,
        ),
        "equal log-probabilities whose ids do not rise",
    ),
    "above 0": (lambda t: replace(t, logprobs=t.logprobs + 20), "above 0 or NaN"),
    "NaN": (lambda t: replace(t, logprobs=t.logprobs * torch.nan), "above 0 or NaN"),
    "no tail": (lambda t: replace(t, log_tail=t.log_tail - 20), "do not add up to 1"),
    "another normaliser": (lambda t: replace(t, logprobs=t.logprobs - 0.02), "do not add up to 1"),
    "a shift by one": (
        lambda t: replace(t, label_logprob=t.label_logprob.roll(1), label_rank=t.label_rank.roll(1)),
        "is each position that of its label",
    ),
    "another rank": (lambda t: replace(t, label_rank=t.label_rank.roll(3)), "another rank than the place of its entry"),
    "a label that should be an entry": (
        lambda t: replace(t, label_logprob=torch.where(torch.arange(6) > 3, -1e-3, t.label_logprob)),
        "leaves out a label that is above its last entry",
    ),
    "a rank below k": (
        lambda t: replace(t, label_rank=torch.where(torch.arange(6) > 3, 3, t.label_rank).int()),
        "or of a rank below k",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_cannot_be_right_is_refused(name: str) -> None:
    spoil, message = SPOILED[name]
    _, told = made_up()
    found = top_logprobs(told, WANTED, engine="x")
    assert check_top_logprobs(found, told.labels, WANTED, engine="x") is found
    with pytest.raises(UserError, match=rf"engine x: .*{message}"):
        check_top_logprobs(spoil(found), told.labels, WANTED, engine="x")


def test_other_temperatures_are_refused_here_too() -> None:
    _, told = made_up()
    found = top_logprobs(told, WANTED, engine="x")
    with pytest.raises(UserError, match=r"hold no tails at the temperatures \[2.0\]"):
        check_top_logprobs(found, told.labels, replace(WANTED, temperatures=(2.0,)), engine="x")
