"""Draws from a power of the teacher: the mean of the weights is the teacher, in value, in gradient, on the grid.

Expectations are taken by going through every outcome of the draws and of the rounding, with its probability.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.proposals import expected_squared_error, measure
from potstill.kernels.counter_random import uniforms, uniforms_of_ids
from potstill.kernels.loss import sparse_loss
from potstill.kernels.sampling import (
    LAST_CODE,
    VALUE_STEP,
    WEIGHT_TOP,
    as_targets,
    count_draws,
    grid_choice,
    importance_log_weights,
    log_ratios,
    order_by_code,
    round_to_grid,
)
from potstill.kernels.teacher_rows import LogitSource
from potstill.kernels.topk import select_sample
from potstill.kernels.types import KernelInputError, SparseTargetTensors
from potstill.storage.rows import value_grid
from tests.kernels.reference import as_weights, make_targets
from tests.kernels.test_loss_formulas import batch, check

POWERS = [0.5, 0.8, 1.2, 1.5]
PEAKED = [0.9, 0.07, 0.03 - 1e-9, 1e-9]  # the last id's weight lies below the grid at power 0.5


def proposal_of(log_p: torch.Tensor, power: float) -> torch.Tensor:
    return (power * log_p).log_softmax(0)


def outcomes(log_pi: torch.Tensor, num_draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [O, num_draws], probability float64 [O]) of every sequence of draws."""
    ids = torch.tensor(list(itertools.product(range(len(log_pi)), repeat=num_draws)))
    return ids, log_pi[ids].sum(1).exp()


def weigh(p: list[float], power: float, num_draws: int):
    """(probability [O], entries [O], token [E], ids [E], ln t [E]) of all outcomes of the draws."""
    log_p = torch.tensor(p, dtype=torch.float64).log()
    log_pi = proposal_of(log_p, power)
    drawn, chance = outcomes(log_pi, num_draws)
    entries, ids, counts = count_draws(drawn, None, vocab_size=len(p))
    token = torch.repeat_interleave(torch.arange(len(drawn)), entries)
    ratio = (log_p - log_pi)[ids.long()]
    return chance, entries, token, ids.long(), importance_log_weights(ratio, counts, num_draws=num_draws)


def value_of(codes: torch.Tensor) -> torch.Tensor:
    """The weight that a code stands for; past the last code it is nothing."""
    return torch.where(codes <= LAST_CODE, (WEIGHT_TOP - codes.double() / VALUE_STEP).exp(), 0.0)


@pytest.mark.parametrize("num_draws", [1, 2, 4])
@pytest.mark.parametrize("power", [1.0, *POWERS])
def test_the_mean_over_all_outcomes_is_the_teacher(power: float, num_draws: int) -> None:
    chance, _, token, ids, log_weights = weigh(PEAKED, power, num_draws)
    torch.testing.assert_close(chance.sum(), torch.ones((), dtype=torch.float64), rtol=1e-14, atol=0)
    code, upper = grid_choice(log_weights)
    below = (code == LAST_CODE) & (log_weights < WEIGHT_TOP - LAST_CODE / VALUE_STEP)
    assert power != 0.5 or bool(below.any())
    stored = upper * value_of(code) + (1 - upper) * value_of(code + 1)
    for weights in (log_weights.exp(), stored):
        mean = torch.zeros(len(PEAKED), dtype=torch.float64).index_add_(0, ids, chance[token] * weights)
        torch.testing.assert_close(mean, torch.tensor(PEAKED, dtype=torch.float64), rtol=1e-12, atol=0)
    assert bool(((upper >= 0) & (upper <= 1)).all())


@pytest.mark.parametrize("missing_mass", ["tail", "raw", "renorm"])
@pytest.mark.parametrize("power", [0.5, 1.5])
def test_the_mean_gradient_is_that_of_the_dense_cross_entropy(power: float, missing_mass: str) -> None:
    """Each outcome of draws and rounding is one token with its probability as weight."""
    p = [0.7, 0.2, 0.1]
    chance, entries, _, ids, log_weights = weigh(p, power, 3)
    code, upper = grid_choice(log_weights)
    rounded, offset = [], 0
    for outcome, size in enumerate(entries.tolist()):
        for steps in itertools.product((0, 1), repeat=size):
            step, part = torch.tensor(steps), slice(offset, offset + size)
            share = torch.where(step == 0, upper[part], 1 - upper[part]).prod()
            rounded.append((float(chance[outcome] * share), ids[part], code[part] + step))
        offset += size
    log_values = torch.cat([WEIGHT_TOP - codes / VALUE_STEP for _, _, codes in rounded])
    targets = as_targets(
        torch.tensor([len(ids) for _, ids, _ in rounded]),
        torch.cat([ids for _, ids, _ in rounded]).int(),
        log_values.float(),
        weighted=True,
        log_tail=torch.full((len(rounded),), -2.0),
        num_draws=3,
    )
    z = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    loss, sums = sparse_loss(
        logits=z.expand(len(rounded), -1),
        targets=targets,
        labels=torch.full((len(rounded),), -100),
        alpha=1.0,
        divergence="sampled",
        missing_mass=missing_mass,
        token_weights=torch.tensor([chance for chance, _, _ in rounded], dtype=torch.float64),
        normalizer=torch.ones((), dtype=torch.float64),
    )
    (got,) = torch.autograd.grad(loss, z)
    dense = -(torch.tensor(p, dtype=torch.float64) * z.log_softmax(0)).sum()
    (expected,) = torch.autograd.grad(dense, z)
    if missing_mass == "renorm":  # less variance, and a mean that is another one: the docs say so
        assert float((got - expected).abs().max()) > 1e-3
        return
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(loss, dense, rtol=1e-13, atol=0)
    assert float(sums.kept_mass) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("power", [1.0, *POWERS])
def test_the_variance_is_that_of_the_formula(power: float) -> None:
    chance, _, token, ids, log_weights = weigh(PEAKED, power, 3)
    p = torch.tensor(PEAKED, dtype=torch.float64)
    dense = torch.zeros(len(chance), len(p), dtype=torch.float64)
    dense[token, ids] = log_weights.exp()
    truth = (chance[:, None] * (dense - p).square()).sum()
    formula = expected_squared_error(p.log()[None], power=power, num_draws=3)[0]
    torch.testing.assert_close(formula, truth, rtol=1e-11, atol=0)
    # (sum p^power sum p^(2 - power) - sum p^2) / n: the same at 2 - power, and least at 1.
    mirrored = expected_squared_error(p.log()[None], power=2 - power, num_draws=3)[0]
    torch.testing.assert_close(formula, mirrored, rtol=1e-11, atol=0)
    assert power == 1.0 or formula > expected_squared_error(p.log()[None], power=1.0, num_draws=3)[0]


def test_rounding_takes_each_neighbour_as_often_as_it_must() -> None:
    """Uniforms on a fine lattice: the mean of what is stored is t to one lattice step of the gap."""
    log_weights = torch.tensor([-20.0, -9.0, -8.9375, -3.03, 0.0, 0.01, 6.99, 7.0], dtype=torch.float64)
    size = 1 << 12
    u = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    wide = log_weights.repeat_interleave(size)
    token = torch.zeros(len(wide), dtype=torch.int64)  # one token: its heaviest keeps the others from being lifted
    codes, kept = round_to_grid(wide, u.repeat(len(log_weights)), token, num_tokens=1)
    stored = torch.where(kept, value_of(codes), 0.0).view(len(log_weights), size)
    gap = log_weights.clamp_min(float(value_grid.LEAST_LOG_WEIGHT)).exp() * math.expm1(1 / VALUE_STEP) + 2e-4
    assert bool(((stored.mean(1) - log_weights.exp()).abs() <= gap / size).all())
    on_grid = log_weights * VALUE_STEP == (log_weights * VALUE_STEP).round()
    exact = on_grid & (log_weights >= value_grid.LEAST_LOG_WEIGHT)
    assert exact.tolist() == [False, False, True, False, True, False, False, True]
    assert bool((stored[exact] == stored[exact][:, :1]).all())


def test_a_token_never_loses_its_last_entry() -> None:
    log_weights = torch.tensor([-12.0, -11.0, -11.0, 0.0, -12.0], dtype=torch.float64)
    token = torch.tensor([0, 0, 0, 1, 1])
    codes, kept = round_to_grid(log_weights, torch.full((5,), 1 - 2**-33, dtype=torch.float64), token, num_tokens=2)
    assert kept.tolist() == [False, True, True, True, False] and codes[kept].tolist() == [255, 255, 112]


def peaked_logits(num_tokens: int = 9, vocab_size: int = 700) -> torch.Tensor:
    return torch.randn(num_tokens, vocab_size, generator=torch.Generator().manual_seed(0)) * 3


def sample(logits: torch.Tensor, order: torch.Tensor, chunk_bytes: int, power: float) -> SparseTargetTensors:
    rows, positions = torch.arange(logits.shape[0]) // 3, torch.arange(logits.shape[0]) % 3
    return select_sample(
        logits=logits[order],
        num_draws=50,
        seed=1 << 40,
        power=power,
        rows=rows[order],
        positions=positions[order],
        chunk_bytes=chunk_bytes,
    ).targets


@pytest.mark.parametrize("power", POWERS)
def test_order_and_chunks_of_the_batch_do_not_matter(power: float) -> None:
    logits, order = peaked_logits(), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    picked = sample(logits, torch.arange(9), 1 << 20, power).select(order)
    other = sample(logits, order, 4 * 704 * 2, power)
    for name in ("offsets", "ids", "log_weights", "log_tail"):
        assert torch.equal(getattr(picked, name), getattr(other, name)), name
    assert picked.counts is None and picked.logprobs is None


def test_entries_are_those_of_the_grid_heaviest_first() -> None:
    logits = peaked_logits()
    targets = sample(logits, torch.arange(9), 1 << 20, 0.8)
    assert bool((targets.log_weights * VALUE_STEP == (targets.log_weights * VALUE_STEP).round()).all())
    for n in range(9):
        part = slice(*targets.offsets[n : n + 2].tolist())
        keys = list(zip((-targets.log_weights[part]).tolist(), targets.ids[part].tolist(), strict=True))
        assert keys == sorted(keys) and len({i for _, i in keys}) == len(keys)
        kept = float(logits[n].double().softmax(0)[targets.ids[part].long()].sum())
        assert abs(float(targets.log_tail[n].exp()) - (1 - kept)) < 1e-5


@pytest.mark.parametrize("power", POWERS)
def test_ratios_on_the_chunk_are_those_of_float64(power: float) -> None:
    logits = peaked_logits()
    (chunk,) = LogitSource.check(logits=logits, temperatures=(1 / power,)).chunks()
    token, ids = torch.arange(9).repeat_interleave(700), torch.arange(700).repeat(9)
    log_p = logits.double().log_softmax(1)
    expected = (log_p - (power * logits.double()).log_softmax(1)).flatten()
    # The sums of a chunk are float32.
    torch.testing.assert_close(log_ratios(chunk, token, ids), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("power", POWERS)
def test_weights_of_many_draws_are_unbiased(power: float) -> None:
    """Mean over 4000 tokens of one distribution, within five standard errors of the estimator's own variance."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0615, 1e-3], dtype=torch.float64)
    pi = proposal_of(p.log(), power).exp()
    num_tokens, num_draws = 4000, 20
    place = torch.arange(num_tokens)
    targets = select_sample(
        logits=p.log().float().expand(num_tokens, -1),
        num_draws=num_draws,
        power=power,
        seed=3,
        rows=place,
        positions=place,
    ).targets
    total = torch.zeros(6, dtype=torch.float64).index_add_(0, targets.ids.long(), targets.log_weights.double().exp())
    drawn = p.square() * (1 - pi) / (pi * num_draws)
    rounded = (drawn + p.square()) * math.expm1(1 / VALUE_STEP) ** 2 / 4  # at most, between two neighbours
    error = ((drawn + rounded) / num_tokens).sqrt()
    assert bool(((total / num_tokens - p).abs() <= 5 * error).all())


@pytest.mark.parametrize("power", [1.0, 0.8])
def test_the_benchmark_measures_what_it_expects(power: float) -> None:
    figures = measure(peaked_logits(400, 300), power=power, num_draws=20)
    assert 0.8 < figures.measured / figures.expected < 1.25 and figures.bytes_per_token > figures.entries


def test_rounding_is_keyed_by_seed_row_position_and_id() -> None:
    rows, positions, ids = (torch.tensor(v) for v in ([0, 0, 2**40 + 3, 7], [0, 5, 5, 9], [3, 3, 16_777_215, 0]))
    base = uniforms_of_ids(seed=5, rows=rows, positions=positions, ids=ids)
    assert float(base.min()) > 0 and float(base.max()) < 1 and len(set(base.tolist())) == 4
    assert torch.equal(uniforms_of_ids(seed=5, rows=rows[2:3], positions=positions[2:3], ids=ids[2:3]), base[2:3])
    for change in ({"seed": 6}, {"rows": rows + 1}, {"positions": positions + 1}, {"ids": ids + 1}):
        keys = {"seed": 5, "rows": rows, "positions": positions, "ids": ids} | change
        assert not bool((uniforms_of_ids(**keys) == base).any())
    # Independent of the draws: their counters never meet.
    draws = uniforms(seed=5, rows=rows, positions=positions, num_draws=255)
    assert not set(draws.flatten().tolist()) & set(base.tolist())


def test_power_one_is_the_draw_without_a_power() -> None:
    logits, place = peaked_logits(), torch.arange(9)
    keys = {"logits": logits, "num_draws": 50, "seed": 2, "rows": place, "positions": place}
    plain, one = select_sample(**keys).targets, select_sample(**keys, power=1.0).targets
    assert torch.equal(plain.ids, one.ids) and torch.equal(plain.counts, one.counts) and one.log_weights is None


@pytest.mark.parametrize("power", [0.49, 1.51, 0.0, -1.0, math.nan, math.inf])
def test_powers_off_the_grid_are_refused(power: float) -> None:
    place = torch.arange(9)
    with pytest.raises(KernelInputError, match="power is"):
        select_sample(logits=peaked_logits(), num_draws=5, power=power, seed=0, rows=place, positions=place)


@pytest.mark.parametrize("missing_mass", ["tail", "renorm", "raw"])
def test_the_loss_of_weights_is_the_reference(missing_mass: str) -> None:
    targets, *rest = batch(40, [3, 5, 0, 9])
    arguments = {"divergence": "sampled", "missing_mass": missing_mass, "alpha": 0.6, "ce_weight": 0.4}
    check(arguments, (as_weights(targets), *rest))


def test_weights_go_with_nothing_else() -> None:
    targets = as_weights(make_targets(3, 20, [4]))
    call = {"logits": torch.zeros(3, 20), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(KernelInputError, match=r"needs targets\.logprobs, and these targets hold draws"):
        sparse_loss(**call, targets=targets, alpha=1.0)
    with pytest.raises(KernelInputError, match="draws hold at T = 1 only"):
        sparse_loss(**call, targets=targets, alpha=1.0, divergence="sampled", temperature=2.0)
    both = SparseTargetTensors(**{**vars(targets), "counts": torch.ones(12)})
    with pytest.raises(KernelInputError, match="stand alone"):
        sparse_loss(**call, targets=both, alpha=1.0, divergence="sampled")
    broken = SparseTargetTensors(**{**vars(targets), "log_weights": torch.full((12,), math.nan)})
    with pytest.raises(KernelInputError, match="not finite"):
        sparse_loss(**call, targets=broken, alpha=1.0, divergence="sampled", validate=True)


def test_weights_travel_with_their_tokens() -> None:
    targets = as_weights(make_targets(4, 30, [3, 5]))
    picked = targets.select(torch.tensor([2, 0])).to("cpu")
    want = torch.cat([targets.log_weights[8:11], targets.log_weights[0:3]])
    assert torch.equal(picked.log_weights, want)
    assert torch.equal(SparseTargetTensors.from_arrays(targets).log_weights, targets.log_weights)


def test_entries_are_ordered_by_token_weight_and_id() -> None:
    token, codes, ids = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([9, -3, 2, 2, 4]), torch.tensor([0, 9, 8, 5, 1])
    assert order_by_code(token, codes, ids).tolist() == [1, 4, 3, 2, 0]


def test_the_grid_is_that_of_the_store() -> None:
    assert (WEIGHT_TOP, VALUE_STEP) == (value_grid.WEIGHT_TOP, value_grid.VALUE_STEP)
    assert value_grid.LEAST_LOG_WEIGHT == WEIGHT_TOP - LAST_CODE / VALUE_STEP
