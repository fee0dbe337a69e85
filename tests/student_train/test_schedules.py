"""Schedules at their corner points: they are pure functions, so exact values are asked for."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from potstill.student_train.config.curves import Cosine, Linear, LinearRatio, Periodic, Wsd
from potstill.student_train.config.lr_schedule import LrSchedule, span_steps
from potstill.student_train.curriculum.schedules import scalar_bounds, share_of_span


def test_a_span_is_steps_or_a_share() -> None:
    assert span_steps(7, 100) == 7
    assert span_steps(0.25, 100) == 25
    assert span_steps(1.0, 100) == 100
    assert span_steps(1, 100) == 1


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_linear_and_ends_at_one(kind: str) -> None:
    schedule = LrSchedule(kind=kind, warmup=4, decay=3)
    assert [schedule.factor(step, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.factor(4, 20) == 1.0


def test_wsd_corners() -> None:
    schedule = LrSchedule(kind="wsd", warmup=2, decay=4, min_ratio=0.0)
    assert [schedule.factor(step, 10) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert schedule.factor(10, 10) == 0.0


def test_the_stable_phase_of_wsd_does_not_know_the_total() -> None:
    schedule = LrSchedule(kind="wsd", warmup=5, decay=10)
    short = [schedule.factor(step, 50) for step in range(40)]
    long = [schedule.factor(step, 5000) for step in range(40)]
    assert short == long


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_decay_shapes_at_half(shape: str, half: float) -> None:
    schedule = LrSchedule(kind="wsd", decay=10, decay_shape=shape, min_ratio=0.2)
    assert schedule.factor(95, 100) == pytest.approx(0.2 + 0.8 * half)


def test_cosine_and_linear_reach_the_floor_at_the_end() -> None:
    for kind in ("cosine", "linear"):
        schedule = LrSchedule(kind=kind, min_ratio=0.1)
        assert schedule.factor(0, 100) == 1.0
        assert schedule.factor(50, 100) == pytest.approx(0.55)
        assert schedule.factor(100, 100) == pytest.approx(0.1)
        assert schedule.factor(150, 100) == pytest.approx(0.1)


def test_a_decay_longer_than_the_run_starts_after_the_warm_up() -> None:
    schedule = LrSchedule(kind="wsd", warmup=2, decay=50, min_ratio=0.0)
    assert [schedule.factor(step, 6) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def over_stages(schedule: LrSchedule, bounds: list[int]) -> list[float]:
    """Factors of every step of a run whose stages begin and end at `bounds`."""
    return [
        schedule.factor_at(step, total_steps=bounds[-1], first_step=first, end_step=end)
        for first, end in pairwise(bounds)
        for step in range(first, end)
    ]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_each_stage_has_the_schedule_of_a_run_of_its_length(kind: str) -> None:
    schedule = LrSchedule(kind=kind, span="stages", warmup=0.25, decay=2, min_ratio=0.1)
    alone = [[schedule.factor(step, length) for step in range(length)] for length in (4, 8, 20)]
    assert over_stages(schedule, [0, 4, 12, 32]) == [*alone[0], *alone[1], *alone[2]]
    assert over_stages(schedule, [0, 32]) == [schedule.factor(step, 32) for step in range(32)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_over_the_run_stages_make_no_difference(kind: str) -> None:
    schedule = LrSchedule(kind=kind, warmup=3, decay=0.2)
    assert schedule.span == "run"
    assert over_stages(schedule, [0, 4, 12, 32]) == [schedule.factor(step, 32) for step in range(32)]


def test_corners_of_stages() -> None:
    schedule = LrSchedule(kind="wsd", span="stages", warmup=2, decay=0.5, min_ratio=0.0)
    # Two steps of warm-up in each; a half of each decays: 2 of 4 and 4 of 8.
    assert over_stages(schedule, [0, 4, 12]) == [0.5, 1, 1, 0.5, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    linear = LrSchedule(kind="linear", span="stages", min_ratio=0.0)
    assert over_stages(linear, [0, 1, 3, 7]) == [1, 1, 0.5, 1, 0.75, 0.5, 0.25]
    # The last stage ends with the run: the floor would come at its end, as it does without stages.
    assert linear.factor_at(7, total_steps=7, first_step=3, end_step=7) == 0.0


def test_a_warm_up_as_long_as_a_stage_ends_at_its_last_step() -> None:
    schedule = LrSchedule(kind="cosine", span="stages", warmup=4)
    assert over_stages(schedule, [0, 4, 8]) == [0.25, 0.5, 0.75, 1.0] * 2


def test_curves_reach_both_ends() -> None:
    for curve in (Linear(start=0.2, end=0.9), Cosine(start=0.2, end=0.9), LinearRatio(start=0.2, end=0.9)):
        assert curve.at(0.0) == pytest.approx(0.2)
        assert curve.at(1.0) == pytest.approx(0.9)
    assert Cosine(start=0.0, end=1.0).at(0.5) == pytest.approx(0.5)
    # Half way the ratio is the mean of 1/4 and 9: 4.625, so the share is 4.625 / 5.625.
    assert LinearRatio(start=0.2, end=0.9).at(0.5) == pytest.approx(4.625 / 5.625)


def test_wsd_curve_corners() -> None:
    curve = Wsd(start=0.1, peak=0.9, end=0.3, warmup=0.25, decay=0.5)
    assert curve.at(0.0) == pytest.approx(0.1)
    assert curve.at(0.125) == pytest.approx(0.5)
    assert curve.at(0.25) == curve.at(0.5) == 0.9
    assert curve.at(0.75) == pytest.approx(0.6)
    assert curve.at(1.0) == pytest.approx(0.3)
    assert scalar_bounds(curve) == (0.1, 0.9)
    instant = Wsd(peak=1.0, warmup=0.0, decay=0.0)
    assert instant.at(0.0) == instant.at(1.0) == 1.0


@pytest.mark.parametrize("periods", [1, 2, 3, 50])
def test_periodic_curve_corners(periods: int) -> None:
    curve = Periodic(start=0.0, end=0.9, periods=periods)
    # alpha is exactly 0 at both ends: no targets are read there.
    assert curve.at(0.0) == curve.at(1.0) == 0.0
    for number in range(periods):
        corners = [curve.at((number + place) / periods) for place in (0.0, 0.25, 0.5, 0.75)]
        assert corners == pytest.approx([0.0, 0.45, 0.9, 0.45], abs=1e-12)
    assert scalar_bounds(curve) == (0.0, 0.9)
    assert all(0.0 <= curve.at(step / 997) <= 0.9 for step in range(998))


def test_a_periodic_curve_may_begin_at_its_upper_end() -> None:
    curve = Periodic(start=1.0, end=0.5, periods=2)
    assert [curve.at(x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 1.0, 1.0])
    assert max(curve.at(step / 997) for step in range(998)) <= 1.0


def test_share_of_a_span() -> None:
    assert [share_of_span(step, 10, 15) for step in range(10, 15)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert share_of_span(10, 10, 11) == 0.0
    assert share_of_span(99, 10, 15) == 1.0
