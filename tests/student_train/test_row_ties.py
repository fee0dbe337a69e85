"""A score that cannot tell rows apart is refused where row ids would choose; few ties are decided by them as ever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.student_train.config.row_scores import ROW_SCORES, RowScore
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.curriculum.row_pools import PlanSource
from tests.student_train import workers

NUM_ROWS = 200
RANDOM = np.random.Generator(np.random.Philox(5))
LOSS = RANDOM.permutation(NUM_ROWS).astype(np.float32) + 1
# What a scorer gives that ranks fewer than half of the labels: 0 for most rows, as POCL's ROUGE-L of a poor student.
MOSTLY_ZERO = np.where(np.arange(NUM_ROWS) % 3 == 0, LOSS, 0.0).astype(np.float32)
STATS = {"slm": {"mean_loss": LOSS, "salt_median_zero": MOSTLY_ZERO, "same": np.ones(NUM_ROWS, np.float32)}}


def plan_of(score: dict[str, Any], **selector: Any) -> CurriculumPlan:
    rows = {"score": score, "share": 0.5, "segments": 1, **selector}
    tree = {
        "run": {"output_dir": "x", "max_steps": 4, "seed": 1},
        "model": {"config": {"model_type": "llama"}},
        "data": {"tokens": "x", "scores": {"slm": "x"}, "global_batch_rows": 4},
        "curriculum": [{"rows": rows}],
    }
    source = PlanSource("tokens", NUM_ROWS, STATS)
    return CurriculumPlan(workers.config_of(tree), total_steps=4, sources=[source])


def of(*names: str, **options: Any) -> list[dict[str, Any]]:
    return [{"store": "slm", "stat": name, **options} for name in names]


# One score of each kind that has the same value in most rows; a new kind needs one here (or is drawn at random).
TIED: dict[str, dict[str, Any]] = {
    "stat": {"kind": "stat", "of": of("salt_median_zero")},
    "difference": {"kind": "difference", "of": of("salt_median_zero", "same")},
    "rank_fusion": {"kind": "rank_fusion", "of": of("salt_median_zero", "salt_median_zero"), "ties": "mean"},
}


@pytest.mark.parametrize("kind", sorted(ROW_SCORES))
def test_a_cut_among_equal_scores_is_refused_in_every_kind(kind: str) -> None:
    if kind == "random":
        assert plan_of({"kind": "random"}).segments[0].pool_size == 100  # no two are alike
        return
    with pytest.raises(UserError) as error:
        plan_of(TIED[kind])
    text = str(error.value)
    for words in ("curriculum.0.rows.score: 133 of 200 rows", "share 0.5", "row ids would choose", "salt_median_drop"):
        assert words in text, text
    # Cut where the score differs it tells rows apart: a third of them is not 0.
    keep = "lowest" if kind == "rank_fusion" else "highest"
    assert plan_of(TIED[kind], share=0.3, keep=keep).segments[0].pool_size == 60


def test_the_cut_at_the_near_end_of_a_window_is_looked_at_too() -> None:
    with pytest.raises(UserError, match=r"pool .share 0.2, skip 0.1. is cut among them"):
        plan_of({"kind": "stat", "of": of("salt_median_zero")}, keep="lowest", share=0.2, skip=0.1)


def test_a_few_ties_at_the_cut_are_decided_by_row_id() -> None:
    few = LOSS.copy()
    few[np.argsort(LOSS)[96:104]] = 97.0
    stats = {"slm": {**STATS["slm"], "few": few}}
    rows = {"score": {"kind": "stat", "of": of("few")}, "share": 0.5, "segments": 1}
    config = plan_of({"kind": "random"})._config
    stage = config.curriculum[0].model_copy(update={"rows": type(config.curriculum[0].rows).model_validate(rows)})
    config = config.model_copy(update={"curriculum": (stage,)})
    plan = CurriculumPlan(config, total_steps=4, sources=[PlanSource("tokens", NUM_ROWS, stats)])
    pool = plan.segments[0].order.draws[0].pool
    assert pool.tolist() == sorted(np.argsort(-few, kind="stable")[:100].tolist())


def test_equal_figures_in_a_fusion_have_their_mean_rank_or_are_refused() -> None:
    fused = {"kind": "rank_fusion", "of": [*of("salt_median_zero", rank_first="highest"), *of("mean_loss")]}
    with pytest.raises(UserError, match=r"curriculum.0.rows: statistic 'salt_median_zero'.* is 0 in 133 of 200 rows"):
        plan_of(fused)
    scores = ROW_SCORES["rank_fusion"].score(
        [MOSTLY_ZERO.astype(float), LOSS.astype(float)], RowScore.model_validate({**fused, "ties": "mean"}), NUM_ROWS, 0
    )
    for row in (0, 1, 44, 199):
        greater, equal = (MOSTLY_ZERO[row] < MOSTLY_ZERO).sum(), (MOSTLY_ZERO[row] == MOSTLY_ZERO).sum()
        ranks = greater + (equal + 1) / 2, (LOSS[row] > LOSS).sum() + 1
        assert scores[row] == pytest.approx(sum(1 / (60 + rank) for rank in ranks), rel=1e-12)
    assert plan_of({**fused, "ties": "mean"}).segments[0].pool_size == 100
    with pytest.raises(UserError, match="'same' of store 'slm' is 1 in all 200 rows, so it ranks none"):
        plan_of({"kind": "rank_fusion", "of": of("same", "mean_loss"), "ties": "mean"})
