"""Order: bijections, seeds, epochs, a pinned golden list, and shuffle quality."""

from __future__ import annotations

import numpy as np
import pytest

from potstill.storage import ORDER_VERSION, EpochPlan, RowOrder, StoreError, permute

GOLDEN_100 = [28, 17, 64, 77, 29, 45, 95, 11, 9, 87, 8, 79]
GOLDEN_BLOCK = [271, 7910, 907, 5301, 2005, 7456, 3482, 8169, 244, 6953, 3348, 6596]


@pytest.mark.parametrize("mode", ["global", "block", "sequential"])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 100, 4097, 50_003])
def test_every_order_is_a_bijection_in_every_epoch(n, mode):
    order = RowOrder(n, seed=3, mode=mode)
    epochs = [order.rows(epoch, np.arange(n)) for epoch in range(3)]
    for rows in epochs:
        np.testing.assert_array_equal(np.sort(rows), np.arange(n))
    if n >= 100 and mode != "sequential":
        assert (epochs[0] != epochs[1]).mean() > 0.9
        assert (RowOrder(n, seed=4, mode=mode).rows(0, np.arange(n)) != epochs[0]).mean() > 0.9
        assert (RowOrder(n, seed=3, mode=mode, stream=1).rows(0, np.arange(n)) != epochs[0]).mean() > 0.9


def test_order_version_1_is_pinned():
    assert ORDER_VERSION == 1
    assert permute(np.arange(12), 100, seed=1234, epoch=5).tolist() == GOLDEN_100
    assert RowOrder(10_000, seed=7, mode="block").rows(2, np.arange(4090, 4102)).tolist() == GOLDEN_BLOCK


@pytest.mark.parametrize("mode", ["global", "block"])
def test_rows_are_a_pure_function_of_the_position(mode):
    order = RowOrder(9001, seed=11, mode=mode)
    whole = order.rows(4, np.arange(9001))
    scattered = np.random.default_rng(0).permutation(9001)[:500].reshape(5, 100)
    np.testing.assert_array_equal(order.rows(4, scattered), whole[scattered])


def test_huge_stores_need_no_memory():
    n = 10**10
    rows = RowOrder(n, seed=1).rows(0, np.arange(n - 1000, n))
    assert len(np.unique(rows)) == 1000 and rows.min() >= 0 and rows.max() < n
    np.testing.assert_array_equal(RowOrder(n, seed=1, mode="block").rows(0, [n - 1]).shape, (1,))


def test_positions_of_marked_rows_are_uniform():
    """Chi-square over 16 bins of the positions of 64 rows in 200 seeds; mean 15, standard deviation 5.5."""
    n, statistics = 1024, []
    counts = np.zeros((64, 16))
    for seed in range(200):
        order = RowOrder(n, seed=seed).rows(0, np.arange(n))
        position = np.empty(n, np.int64)
        position[order] = np.arange(n)
        counts[np.arange(64), position[:64] * 16 // n] += 1
    statistics = ((counts - 12.5) ** 2 / 12.5).sum(1)
    assert abs(statistics.mean() - 15) < 2.5 and statistics.max() < 50


def test_block_mode_neighbours_rarely_share_a_run_and_windows_hold_256_runs():
    rows = RowOrder(200_000, seed=2, mode="block").rows(0, np.arange(200_000))
    runs = rows // 16
    assert (np.diff(runs) == 0).mean() < 0.01
    for window in range(0, 196_608, 4096):
        assert len(np.unique(runs[window : window + 4096])) == 256


def test_bad_arguments():
    with pytest.raises(StoreError, match="mode is 'random'"):
        RowOrder(5, seed=0, mode="random")
    with pytest.raises(StoreError, match="not in"):
        permute([5], 5, seed=0, epoch=0)
    with pytest.raises(StoreError, match="fewer than a global batch of 6"):
        EpochPlan(5, global_batch=6, seed=0)


@pytest.mark.parametrize("mode", ["global", "block", "sequential"])
def test_plan_covers_every_row_once_per_epoch(mode):
    plan = EpochPlan(103, global_batch=8, seed=5, mode=mode)
    stream = np.concatenate([plan.rows(batch) for batch in range(103 * 2 // 8 + 1)])
    np.testing.assert_array_equal(np.sort(stream[:103]), np.arange(103))
    np.testing.assert_array_equal(np.sort(stream[103:206]), np.arange(103))
    assert plan.position(13) == {"epoch": 1, "stage": 0, "rows_consumed": 104}
