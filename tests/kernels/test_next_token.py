"""Next tokens: draws in the right shares, named by their own names, inside the nucleus that was asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.kernels.next_token import draw_uniforms, drawn_tokens, greedy_tokens


def named(count: int, *, seed: int = 5) -> torch.Tensor:
    """Uniforms of `count` names: units, numbers and positions all vary."""
    n = torch.arange(count)
    return draw_uniforms(seed=seed, units=n // 64, numbers=n % 8, positions=n // 8 % 8)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_ids_come_in_the_shares_of_the_tempered_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, float("-inf"), 1.0])
    wanted = (logits.double() / temperature).softmax(-1)
    count = 20_000
    found = drawn_tokens(logits.expand(count, -1), named(count), temperature=temperature)
    shares = torch.bincount(found, minlength=5).double() / count
    error = 5 * (wanted * (1 - wanted) / count).sqrt() + 1e-12
    assert (shares - wanted).abs().le(error).all(), (shares, wanted)
    assert shares[3] == 0


def test_a_nucleus_holds_the_most_probable_ids_only() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]  # ids 1, 3, 0, 2 by probability
    count = 4_000
    for top_p, inside in ((0.5, {1}), (0.51, {1, 3}), (0.8, {1, 3}), (0.81, {1, 3, 0}), (0.96, {0, 1, 2, 3})):
        found = drawn_tokens(logits.expand(count, -1), named(count), temperature=1.0, top_p=top_p)
        assert set(found.tolist()) == inside, top_p
    two = drawn_tokens(logits.expand(count, -1), named(count), temperature=1.0, top_p=0.8)
    assert (two == 1).double().mean() == pytest.approx(0.5 / 0.8, abs=0.05)


def test_draws_are_named_and_not_counted() -> None:
    """Any batch, any order; and each part of the name matters."""
    units, numbers, positions = (torch.randint(0, 1 << 32, (50,)) for _ in range(3))
    whole = draw_uniforms(seed=9, units=units << 8, numbers=numbers, positions=positions)
    order = torch.randperm(50)
    again = draw_uniforms(seed=9, units=units[order] << 8, numbers=numbers[order], positions=positions[order])
    assert torch.equal(whole[order], again)
    one = torch.tensor([7])
    names = [
        draw_uniforms(seed=seed, units=one + unit, numbers=one + number, positions=one + position)
        for seed, unit, number, position in [
            (1, 0, 0, 0), (2, 0, 0, 0), (1 << 33, 0, 0, 0), (1, 1, 0, 0), (1, 1 << 40, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)
        ]
    ]  # fmt: skip
    assert len({float(value) for value in names}) == len(names)
    uniforms = named(40_000)
    assert uniforms.gt(0).all() and uniforms.lt(1).all()
    counts = torch.histc(uniforms, 20, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 50  # chi square, 19 degrees of freedom: p < 1e-4


@given(u=st.sampled_from([0.0, 1e-300, 2.0**-53, 0.5, 1 - 2.0**-53]), last=st.sampled_from([-30.0, -800.0, 0.0]))
@settings(max_examples=30, deadline=None)
def test_no_draw_falls_on_an_impossible_id(u: float, last: float) -> None:
    logits = torch.tensor([[float("-inf"), 3.0, float("-inf"), last, float("-inf")]])
    token = int(drawn_tokens(logits, torch.tensor([u], dtype=torch.float64), temperature=0.7)[0])
    assert token in (1, 3) and (token == 1 or last > -100)


def test_greedy_takes_the_first_of_equal_ids() -> None:
    assert greedy_tokens(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 1.0]])).tolist() == [1, 0]
