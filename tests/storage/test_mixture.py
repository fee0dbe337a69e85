"""Mixtures: exact counts, closeness to the shares at every position, one pass after the other, a pinned golden list."""

from __future__ import annotations

import numpy as np
import pytest

from potstill.storage import (
    MIXTURE_VERSION,
    Draw,
    MixedOrder,
    Mixture,
    RowOrder,
    StoreError,
    source_seed,
    whole_weights,
)

GOLDEN = [0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
GOLDEN_ROWS = [83, 132, 16, 153, 53, 121, 89, 141, 29, 119, 31, 108]
SHARES = [
    [0.5, 0.3, 0.2],
    [1 / 3, 2 / 3],
    [0.001, 0.999],
    [0.0, 1.0, 0.0],
    [1.0] * 7,
    [0.9, 0.05, 0.03, 0.0, 0.02],
    [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
    np.random.default_rng(1).dirichlet(np.full(11, 0.3)).tolist(),
    np.random.default_rng(2).dirichlet(np.full(40, 2.0)).tolist(),
]


def counts_after(mixture: Mixture, num_positions: int) -> np.ndarray:
    """How many of the first n positions are of each source, by looking at each: [num_positions + 1, sources]."""
    sources, _ = mixture.at(np.arange(num_positions))
    found = np.zeros((num_positions + 1, len(mixture.weights)), np.int64)
    found[np.arange(1, num_positions + 1), sources] = 1
    return found.cumsum(0)


@pytest.mark.parametrize("shares", SHARES)
def test_every_prefix_is_within_the_bound_of_its_shares_and_counted_exactly(shares):
    mixture = Mixture(whole_weights(shares))
    n = 4000
    counts = counts_after(mixture, n)
    sources, before = mixture.at(np.arange(n))
    np.testing.assert_array_equal(before, counts[np.arange(n), sources])
    for place in (0, 1, 2, 10, 777, n):
        np.testing.assert_array_equal(mixture.counts(place), counts[place])
    wanted = np.outer(np.arange(n + 1), np.array(shares) / sum(shares))
    num_sources = int((np.array(shares) > 0).sum())
    bound = (1 + sum(1 / i for i in range(1, num_sources))) / 2
    assert np.abs(counts - wanted).max() <= bound + 1e-5


def test_positions_stand_alone_and_blocks_are_exact():
    mixture = Mixture(whole_weights([0.5, 0.3, 0.2]))
    assert mixture.weights == (5, 3, 2)
    whole = mixture.at(np.arange(500))
    scattered = np.random.default_rng(0).permutation(500)
    for part, of_all in zip(mixture.at(scattered), whole, strict=True):
        np.testing.assert_array_equal(part, of_all[scattered])
    assert mixture.counts(10).tolist() == [5, 3, 2]
    assert mixture.counts(10**12).tolist() == [5 * 10**11, 3 * 10**11, 2 * 10**11]


def test_at_the_end_of_64_bits_and_far_out():
    """The largest weights at the last positions of a block, and positions behind 1e13 rows, against plain integers."""
    for weights in ((1 << 31, (1 << 31) - 1), ((1 << 32) - 2, 1), (3, (1 << 32) - 5, 1)):
        mixture, total = Mixture(weights), sum(weights)
        for start in (0, total - 3, total, 10**13):
            positions = np.arange(start, start + 3)
            sources, before = mixture.at(positions)
            for position, source, count in zip(positions.tolist(), sources.tolist(), before.tolist(), strict=True):
                after = mixture.counts(position + 1) - mixture.counts(position)
                assert after.sum() == 1 and after[source] == 1
                assert count == mixture.counts(position)[source]


def test_weights_are_the_shares_as_they_are_written():
    assert whole_weights([0.5, 0.25, 0.25]) == (2, 1, 1)
    assert whole_weights([50, 30, 20]) == whole_weights([0.5, 0.3, 0.2]) == (5, 3, 2)
    assert whole_weights([12_207_032, 0, 1]) == (12_207_032, 0, 1)
    rounded = whole_weights([1 / 3, 1 / 7, 1 - 1 / 3 - 1 / 7])
    np.testing.assert_allclose(np.array(rounded) / sum(rounded), [1 / 3, 1 / 7, 11 / 21], atol=2**-30)
    assert min(whole_weights([1e-13, 0.3333333333333])) == 1, "a small share still gives rows"
    for bad in ([], [0.0, 0.0], [-0.1, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(StoreError, match="shares"):
            whole_weights(bad)
    for weights in ((), (0, 0), (-1, 2), (1 << 32,)):
        with pytest.raises(StoreError, match="weights"):
            Mixture(weights)


def order_of(mode: str = "global") -> MixedOrder:
    """Sources of 100, 37 and 20 rows with shares 0.5, 0.3 and 0.2; the last one is drawn from a pool of 8 rows."""
    sizes, pool = (100, 37, 20), np.arange(2, 18, 2)
    draws = [
        Draw(RowOrder(size, seed=source_seed(1, name), mode=mode), first_row=first, start=start)
        for name, size, first, start in (("a", sizes[0], 0, 0), ("b", sizes[1], 100, 30))
    ]
    draws.append(Draw(RowOrder(len(pool), seed=source_seed(1, "c"), mode=mode), first_row=137, pool=pool))
    return MixedOrder(Mixture((5, 3, 2)), draws)


@pytest.mark.parametrize("mode", ["global", "block", "sequential"])
def test_each_source_gives_every_row_once_before_any_comes_again(mode):
    rows = order_of(mode).rows(np.arange(2000))
    first = rows[rows < 100][:1000].reshape(-1, 100)
    assert len(first) == 10 and all(sorted(part.tolist()) == list(range(100)) for part in first)
    second = rows[(rows >= 100) & (rows < 137)][7:][: 37 * 10].reshape(-1, 37)  # it starts at place 30 of its order
    assert all(sorted(part.tolist()) == list(range(100, 137)) for part in second)
    third = rows[rows >= 137][:400].reshape(-1, 8)
    assert all(sorted(part.tolist()) == list(range(139, 155, 2)) for part in third)
    if mode != "sequential":
        assert first[0].tolist() != first[1].tolist()


def test_sources_of_one_size_have_orders_of_their_own():
    draws = [Draw(RowOrder(50, seed=source_seed(3, name)), first_row=50 * n) for n, name in enumerate("ab")]
    rows = MixedOrder(Mixture((1, 1)), draws).rows(np.arange(100))
    assert (rows[rows < 50] != rows[rows >= 50] - 50).mean() > 0.8
    assert source_seed(3, "a") != source_seed(4, "a")


def test_mixture_version_1_is_pinned():
    assert MIXTURE_VERSION == 1
    assert Mixture((5, 3, 2)).at(np.arange(20))[0].tolist() == GOLDEN
    assert source_seed(1234, "novels") == 3177791424142857411
    assert order_of().rows(np.arange(12)).tolist() == GOLDEN_ROWS
