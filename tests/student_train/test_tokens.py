"""Token policies against slow, plain code: one row at a time, one position at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from potstill.student_train.config.token_policies import TOKEN_POLICIES, TokenSelector
from potstill.student_train.curriculum.step_objective import TokenChoice
from potstill.student_train.curriculum.token_selector import choose, kept_count, known_active, known_weight_sum

LENGTHS = (7, 1, 12, 5)
ROW = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
N = len(ROW)
NEEDED = {
    "label_rank": {"source": "slm"},
    "excess_loss": {"reference": "slm"},
    "excess_band": {"reference": "slm", "low": 0.1, "high": 1.0},
    "entropy_band": {"low": 0.5, "high": 1.5},
}


def columns_of(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("loss", "entropy", "reference_loss", "divergence", "key")
    columns = {name: 2 * torch.rand(N, generator=generator) for name in names}
    columns["rank"] = torch.randint(0, 30, (N,), generator=generator)
    return columns, torch.rand(N, generator=generator) < 0.8


def choice_of(policy: str, *, share: float = 0.4, floor: float = 0.0, **options: Any) -> TokenChoice:
    options = {"applies_to": "kd", **NEEDED.get(policy, {}), **options}
    return TokenChoice(TokenSelector(policy=policy, **options), share, floor)


def slow_score(policy: str, columns: dict[str, torch.Tensor], labelled: torch.Tensor, n: int) -> float:
    at = {name: float(column[n]) for name, column in columns.items()}
    mates = [m for m in range(N) if ROW[m] == ROW[n] and labelled[m]]
    if policy == "label_rank":
        return float(at["rank"] < 10)
    if policy == "entropy_band":
        return float(0.5 <= at["entropy"] <= 1.5)
    if policy == "excess_band":
        return float(0.1 <= at["loss"] - at["reference_loss"] <= 1.0)
    if policy == "paced":
        return math.exp(-at["loss"]) * (1 - math.exp(-at["loss"]))
    if policy == "soft_or":
        h = at["entropy"] / max(float(columns["entropy"][m]) for m in mates)
        d = at["divergence"] / max(float(columns["divergence"][m]) for m in mates)
        return h + d - h * d
    return {
        "top_loss": at["loss"],
        "top_entropy": at["entropy"],
        "skip_low_entropy": at["entropy"],
        "excess_loss": at["loss"] - at["reference_loss"],
        "random": at["key"],
    }[policy]


def slow_weights(choice: TokenChoice, columns: dict[str, torch.Tensor], labelled: torch.Tensor) -> list[float]:
    policy = choice.selector.policy
    weights = [0.0] * N
    for row in range(len(LENGTHS)):
        places = [n for n in range(N) if ROW[n] == row and labelled[n]]
        score = {n: slow_score(policy, columns, labelled, n) for n in places}
        kind = TOKEN_POLICIES[policy].kind
        if kind == "share":
            best = sorted(places, key=lambda n: (-score[n], n))[: math.ceil(choice.share * len(places) - 1e-9)]
            chosen = {n: float(n in best) for n in places}
        elif kind == "mask":
            chosen = score
        else:
            total = sum(score.values())
            chosen = {n: score[n] * len(places) / total for n in places}
        for n in places:
            weights[n] = choice.floor + (1 - choice.floor) * chosen[n]
    return weights


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("policy", sorted(TOKEN_POLICIES))
def test_weights_equal_plain_code(policy: str, floor: float, seed: int) -> None:
    columns, labelled = columns_of(seed)
    choice = choice_of(policy, floor=floor)
    found = choose(choice, columns, labelled=labelled, row=ROW, num_rows=len(LENGTHS))
    assert found.tolist() == pytest.approx(slow_weights(choice, columns, labelled), abs=1e-5)
    assert not found[~labelled].any()


@pytest.mark.parametrize("policy", sorted(name for name, p in TOKEN_POLICIES.items() if p.kind != "mask"))
def test_the_sum_is_known_before_the_scores(policy: str) -> None:
    columns, labelled = columns_of(5)
    counts = torch.bincount(ROW[labelled], minlength=len(LENGTHS)).tolist()
    for share, floor in ((0.3, 0.0), (0.5, 0.2), (1.0, 0.5)):
        choice = choice_of(policy, share=share, floor=floor)
        weights = choose(choice, columns, labelled=labelled, row=ROW, num_rows=len(LENGTHS))
        assert float(weights.double().sum()) == pytest.approx(known_weight_sum(choice, counts), rel=1e-6)


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_the_number_of_positions_is_known_before_the_scores_or_said_to_be_unknown(policy: str, floor: float) -> None:
    columns, labelled = columns_of(5)
    counts = torch.bincount(ROW[labelled], minlength=len(LENGTHS)).tolist()
    choice = choice_of(policy, floor=floor)
    weights = choose(choice, columns, labelled=labelled, row=ROW, num_rows=len(LENGTHS))
    found = known_active(choice, counts)
    if found is None:
        assert floor == 0 and TOKEN_POLICIES[policy].kind != "share"
    else:
        assert found == int((weights != 0).sum())


def test_the_choice_does_not_depend_on_the_rows_beside() -> None:
    columns, labelled = columns_of(7)
    for policy in TOKEN_POLICIES:
        choice = choice_of(policy)
        together = choose(choice, columns, labelled=labelled, row=ROW, num_rows=len(LENGTHS))
        for row in range(len(LENGTHS)):
            own = row == ROW
            alone = choose(
                choice,
                {name: column[own] for name, column in columns.items()},
                labelled=labelled[own],
                row=torch.zeros(int(own.sum()), dtype=torch.int64),
                num_rows=1,
            )
            assert torch.equal(alone, together[own]), policy


@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_a_policy_looks_at_no_other_column_or_key_than_its_entry_names(policy: str) -> None:
    columns, labelled = columns_of(3)
    entry, choice = TOKEN_POLICIES[policy], choice_of(policy)
    only = {name: columns[name] for name in entry.needs}
    options = {name: getattr(choice.selector, name) for name in entry.reads}
    assert torch.equal(entry.score(only, **options), choice.selector.score(columns))
    some = choose(choice, only, labelled=labelled, row=ROW, num_rows=len(LENGTHS))
    assert torch.equal(some, choose(choice, columns, labelled=labelled, row=ROW, num_rows=len(LENGTHS)))


def test_an_unknown_policy_is_answered_with_all_names_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Input should be 'label_rank', .* or 'random'; did you mean 'top_loss'\?"):
        TokenSelector(policy="top_los")
    with pytest.raises(ValueError, match=r"Input should be 'label_rank', .* or 'random' \["):
        TokenSelector(policy="zzz")


def test_a_band_of_the_excess_needs_a_reference_and_a_bound() -> None:
    with pytest.raises(ValueError, match=r"excess_band needs tokens\.reference"):
        TokenSelector(policy="excess_band", source="slm", low=0.0)
    with pytest.raises(ValueError, match=r"excess_band needs tokens\.low or tokens\.high"):
        TokenSelector(policy="excess_band", source="slm", reference="teacher")


def test_a_row_never_falls_silent() -> None:
    assert [kept_count(n, 0.1) for n in (0, 1, 9, 10, 11)] == [0, 1, 1, 1, 2]


def test_full_shares_and_floors_are_uniform() -> None:
    assert choice_of("top_entropy", share=1.0).is_uniform
    assert choice_of("paced", floor=1.0).is_uniform
    assert not choice_of("label_rank", share=1.0).is_uniform
