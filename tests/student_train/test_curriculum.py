"""The plan: pure, complete, reads only what it needs, and shares the order of a run that does not select."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.kernels.settings import LossSettings
from potstill.storage import EpochPlan
from potstill.student_train.config.row_scores import RowScore
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.curriculum.row_pools import PlanSource
from potstill.student_train.curriculum.row_selector import ranked_rows, row_scores
from tests.student_train import tiny, workers

NUM_ROWS = 40
SCORES = np.random.default_rng(0).permutation(NUM_ROWS).astype(np.float32)
STATS = {"slm": {"mean_loss": SCORES, "other": SCORES[::-1].copy()}}
ROWS = {"score": {"of": [{"store": "slm"}]}, "share": {"kind": "linear", "start": 0.25, "end": 1.0}, "segments": 4}


def plan_of(
    curriculum: list[dict[str, Any]],
    *,
    steps: int = 20,
    seed: int = 3,
    schedule: dict[str, Any] | None = None,
    **data: Any,
) -> CurriculumPlan:
    stores = {name: Path(name) for name in ("tokens", "heldout", "heldout_teacher", "teacher", "scores")}
    changes = {"curriculum": curriculum, "data": data, "run": {"seed": seed}, "schedule": schedule or {}}
    tree = tiny.config_tree(stores, Path("run"), **changes)
    return CurriculumPlan(workers.config_of(tree), total_steps=steps, sources=[PlanSource("tokens", NUM_ROWS, STATS)])


def test_without_a_selector_it_is_the_plain_order() -> None:
    plan, plain = plan_of([{}]), EpochPlan(NUM_ROWS, global_batch=4, seed=3)
    for batch in range(50):
        assert plan.rows(batch).tolist() == plain.rows(batch).tolist()
    assert sorted(np.concatenate([plan.rows(b) for b in range(10)]).tolist()) == list(range(NUM_ROWS))


def test_it_is_pure() -> None:
    stages = [{"until": 0.5, "rows": ROWS}, {}]
    one, two = plan_of(stages), plan_of(stages)
    forward = [one.rows(batch).tolist() for batch in range(30)]
    backward = [two.rows(batch).tolist() for batch in reversed(range(30))]
    assert forward == backward[::-1]
    assert one.identity() == two.identity()
    assert plan_of(stages, seed=4).rows(0).tolist() != forward[0]


def test_rows_come_from_the_wanted_share_which_grows() -> None:
    plan = plan_of([{"until": 12, "rows": ROWS}, {}])
    shares = [0.25, 0.5, 0.75, 1.0]
    assert [segment.first_batch for segment in plan.segments] == [0, 3, 6, 9, 12]
    for batch in range(12):
        wanted = set(np.argsort(-SCORES, kind="stable")[: round(shares[batch // 3] * NUM_ROWS)].tolist())
        assert set(plan.rows(batch).tolist()) <= wanted
    # A pool is gone through once before any row of it comes again: 3 batches of 4 rows from a pool of 10.
    seen = np.concatenate([plan.rows(batch) for batch in range(3)])
    assert len(set(seen[:10].tolist())) == 10


def test_keep_lowest_and_a_sliding_window() -> None:
    rows = {**ROWS, "keep": "lowest", "share": 0.25, "skip": {"kind": "linear", "start": 0.0, "end": 0.75}}
    plan = plan_of([{"rows": rows}])
    ranked = np.argsort(SCORES, kind="stable")
    assert set(plan.rows(0).tolist()) <= set(ranked[:10].tolist())
    assert set(plan.rows(19).tolist()) <= set(ranked[30:].tolist())


def test_after_the_selection_the_order_is_that_of_a_run_that_never_selected() -> None:
    plan, plain = plan_of([{"until": 0.5, "rows": ROWS}, {}]), plan_of([{}])
    for batch in range(10, 30):
        assert plan.rows(batch).tolist() == plain.rows(batch).tolist()


def test_only_the_stores_of_the_step_are_joined() -> None:
    tokens = {"policy": "label_rank", "source": "slm", "floor": {"kind": "linear", "start": 0.0, "end": 1.0}}
    fading = {"kind": "linear", "start": 1.0, "end": 0.0}
    plan = plan_of(
        [
            {"until": 5, "targets": "teacher", "tokens": tokens},
            {"until": 10, "targets": "teacher", "alpha": fading},
            {"rows": {**ROWS, "share": 0.5}},
        ]
    )
    both, teacher, none = frozenset({"teacher", "slm"}), frozenset({"teacher"}), frozenset()
    # The last step of the first stage has floor 1: every position counts, so no score is read.
    assert [plan.joined(batch) for batch in range(5)] == [both] * 4 + [teacher]
    # The last step of the second has alpha 0: nothing of the teacher is read.
    assert [plan.joined(batch) for batch in range(5, 10)] == [teacher] * 4 + [none]
    assert all(plan.joined(batch) == none for batch in range(10, 20))


def test_a_longer_run_keeps_its_identity_when_stages_end_at_steps() -> None:
    stages = [{"until": 5, "rows": ROWS}, {}]
    assert plan_of(stages, steps=20).identity() == plan_of(stages, steps=200).identity()
    shares = [{"until": 0.25, "rows": ROWS}, {}]
    assert plan_of(shares, steps=20).identity() != plan_of(shares, steps=200).identity()


STAGES = {"kind": "linear", "span": "stages", "warmup": 0, "min_ratio": 0.0}


def test_a_schedule_over_stages_follows_the_bounds_of_the_stages() -> None:
    plan = plan_of([{"until": 4}, {"until": 0.5, "rows": ROWS}, {}], steps=20, schedule=STAGES)
    factors = [plan.lr_factor(step) for step in range(20)]
    assert factors[:4] == [1.0, 0.75, 0.5, 0.25]
    # Parts of a stage (its pools) are not stages.
    assert factors[4:10] == pytest.approx([1 - step / 6 for step in range(6)])
    assert factors[10:] == pytest.approx([1 - step / 10 for step in range(10)])
    over_run = plan_of([{"until": 4}, {}], schedule={**STAGES, "span": "run"})
    assert [over_run.lr_factor(step) for step in range(20)] == pytest.approx([1 - step / 20 for step in range(20)])


def test_the_schedule_is_no_part_of_what_pins_the_order() -> None:
    """A resumed run may be longer, and may change its schedule: the rows are the same."""
    stages = [{"until": 5, "rows": ROWS}, {}]
    short, long = (plan_of(stages, steps=steps, schedule=STAGES) for steps in (20, 200))
    assert short.identity() == long.identity() == plan_of(stages).identity()
    assert [short.lr_factor(step) for step in range(5)] == [long.lr_factor(step) for step in range(5)]
    assert short.lr_factor(12) < long.lr_factor(12)  # the last stage is longer now


def test_a_warm_up_longer_than_a_stage_is_refused_where_each_has_its_own() -> None:
    stages, schedule = [{"until": 4}, {}], {**STAGES, "warmup": 5}
    with pytest.raises(UserError, match=r"schedule\.warmup is 5 steps, but stage curriculum\.0 holds 4") as error:
        plan_of(stages, schedule=schedule)
    assert "span run" in str(error.value)
    assert plan_of(stages, schedule={**schedule, "span": "run"}).lr_factor(4) == 1.0
    assert plan_of(stages, schedule={**schedule, "warmup": 4}).lr_factor(3) == 1.0


def test_row_scores_combine_statistics() -> None:
    two = [{"store": "slm"}, {"store": "slm", "stat": "other"}]
    difference = {**ROWS, "score": {"kind": "difference", "of": two}, "share": 0.25}
    expected = np.argsort(-(SCORES.astype(float) - SCORES[::-1]), kind="stable")[:10]
    assert set(plan_of([{"rows": difference}]).rows(0).tolist()) <= set(expected.tolist())
    fusion = {**ROWS, "score": {"kind": "rank_fusion", "of": two}, "share": 0.25}
    ranks = np.argsort(np.argsort(SCORES)) + 1
    fused = 1 / (60 + ranks) + 1 / (60 + ranks[::-1])
    assert set(plan_of([{"rows": fusion}]).rows(0).tolist()) <= set(np.argsort(-fused, kind="stable")[:10].tolist())


@pytest.mark.parametrize("keep", ["lowest", "highest"])
@pytest.mark.parametrize("kind", ["stat", "difference", "rank_fusion"])
def test_rows_without_targets_are_the_last_to_be_chosen(kind: str, keep: str) -> None:
    """Their statistics are 0, which would make them the easiest rows of all, or the best of a difference."""
    random = np.random.Generator(np.random.Philox(3))
    loss, other = random.uniform(1, 3, (2, 12)).astype(np.float32)
    targets = np.full(12, 9.0, np.float32)
    loss[[2, 7]] = targets[[2, 7]] = 0.0
    stats = {"teacher": {"mean_loss": loss, "num_targets": targets}, "slm": {"mean_loss": other}}
    names = ["slm", "teacher"] if kind != "stat" else ["teacher"]
    score = RowScore.model_validate({"kind": kind, "of": [{"store": name} for name in names]})
    found = ranked_rows(row_scores(score, stats, num_rows=12, seed=0, key="k")[0], keep)
    assert found[-2:].tolist() == [2, 7]
    there = np.setdiff1d(np.arange(12), [2, 7])
    fewer = {name: {stat: values[there] for stat, values in store.items()} for name, store in stats.items()}
    expected = there[ranked_rows(row_scores(score, fewer, num_rows=10, seed=0, key="k")[0], keep)]
    assert found[:-2].tolist() == expected.tolist()
    stats["teacher"]["num_targets"] = np.zeros(12, np.float32)
    with pytest.raises(UserError, match="no row has targets"):
        row_scores(score, stats, num_rows=12, seed=0, key="k")


@pytest.mark.parametrize(
    ("curriculum", "data", "words"),
    [
        ([{"until": 8}, {"until": 8}, {}], {}, ("curriculum.1.until", "step 8")),
        ([{"until": 25}, {}], {}, ("curriculum.0.until", "25", "20")),
        ([{"until": 0.001}, {}], {}, ("curriculum.0.until", "at least one step")),
        ([{"rows": {**ROWS, "share": 0.05}}], {}, ("curriculum.0.rows", "keeps 2 of 40", "global batch of 4")),
        ([{"rows": {**ROWS, "score": {"of": [{"store": "slm", "stat": "no"}]}}}], {}, ("'no'", "mean_loss")),
        ([{}], {"global_batch_rows": 64}, ("40 rows", "global batch of 64", "data.global_batch_rows")),
    ],
)
def test_impossible_plans_are_refused(curriculum: list[dict[str, Any]], data: dict[str, Any], words: Any) -> None:
    with pytest.raises(UserError) as error:
        plan_of(curriculum, **data)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_settings_of_a_step_are_its_stage_read_at_that_step() -> None:
    """A schedule through 0 keeps what belongs to the divergence; a stage without targets has label terms alone."""
    distil = {
        "until": 0.5,
        "targets": "teacher",
        "alpha": {"kind": "linear", "start": 0.0, "end": 0.9},
        "temperature": 2.0,
        "divergence": "jsd",
        "options": {"beta": 0.3},
        "z_loss": 0.01,
    }
    plan = plan_of([distil, {"ce_weight": 0.5, "divergence": "sampled", "temperature": 3.0}])
    first, last, labels = (plan.objective(step) for step in (0, 9, 10))
    assert (first.targets, last.targets, labels.targets) == (None, "teacher", None)
    jsd = LossSettings(temperature=2.0, divergence="jsd", divergence_options={"beta": 0.3}, z_loss=0.01)
    assert first.settings == replace(jsd, alpha=0.0) and first.settings.label_weight == 1.0
    assert last.settings == replace(jsd, alpha=0.9) and last.settings.label_weight == 1 - 0.9
    assert labels.settings == LossSettings(alpha=0.0, ce_weight=0.5)
