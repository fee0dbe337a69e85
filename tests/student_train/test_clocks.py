"""The clock of a stage: the right checkpoint's store at each step, from the plan alone, and decided on saturation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import ConfigError, UserError
from potstill.student_train.config.clocks import SWITCHES, Switch, TargetsClock
from potstill.student_train.curriculum.clock import StageClock, stage_clock
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.run.dry_run import dry_run
from potstill.student_train.run.dry_run_text import format_dry_run
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.preflight import check_start
from potstill.student_train.run.saturation import Watched
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import cut_back

SERIES = {"t0": 100, "t1": 300, "t2": 900}


def clock_of(stores: dict[str, int | None] = SERIES, **keys: Any) -> StageClock:
    config = TargetsClock.model_validate({"stores": stores, **keys})
    return stage_clock(config, tuple(stores), {}, key="curriculum.0.targets_clock")


def tree_of(stores: dict[str, Path], folder: Path, clock: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of 8 steps that learns from two teachers, of which the first says that it is of step 100."""
    targets = {"t0": str(stores["early_teacher"]), "t1": str(stores["teacher"])}
    stage = {"targets_clock": clock, "off_kd": "nothing"}
    return tiny.config_tree(stores, folder, data={"targets": targets}, curriculum=[stage], **changes)


def reference(step: int, *, refresh: int, speed: float) -> float:
    """The rule of the paper's code, word by word."""
    if speed < 1:
        return (1 + int(speed * (step // refresh))) * refresh
    return (speed * int(1 + step // refresh)) * refresh


@pytest.mark.parametrize(("refresh", "speed"), [(100, 1), (100, 2), (50, 0.5), (7, 3), (300, 1)])
def test_the_wanted_step_is_that_of_the_paper_and_a_missing_one_is_served_by_the_next(
    refresh: int, speed: float
) -> None:
    clock = clock_of(refresh=refresh, speed=speed)
    for step in range(0, 1500, 13):
        wanted = reference(step, refresh=refresh, speed=speed)
        assert clock.config.wanted_step(step) == wanted
        at_least = [name for name, of in SERIES.items() if of >= wanted]
        assert clock.store(step) == (at_least[0] if at_least else "t2")


def test_the_offset_leaves_the_first_teacher_steps_out() -> None:
    plain, later = clock_of(refresh=100), clock_of(refresh=100, offset=200)
    assert [later.store(step) for step in range(0, 900, 50)] == [plain.store(step + 200) for step in range(0, 900, 50)]


def test_parts_say_when_each_store_begins_and_stores_stand_in_the_order_of_their_steps() -> None:
    clock = clock_of({"late": 900, "first": 100, "second": 300}, refresh=100)
    assert list(clock.parts(10_000)) == [(0, "first", 100), (100, "second", 300), (300, "late", 900)]
    assert list(clock.parts(300)) == [(0, "first", 100), (100, "second", 300)]
    for step in range(1000):
        begun = [name for first, name, _ in clock.parts(10_000) if first <= step]
        assert clock.store(step) == begun[-1]


@pytest.mark.parametrize(
    ("clock", "words"),
    [
        ({"refresh": 4}, ("stores and prefix",)),
        ({"stores": {"t0": 1}, "prefix": "t", "refresh": 4}, ("stores and prefix",)),
        ({"stores": {"t0": 1, "t1": 2}}, ("refresh is missing", "switch_on step")),
        ({"stores": {"t0": 1}, "refresh": 4, "window": 3}, ("window", "switch_on saturation", "found step")),
        ({"stores": {"t0": 1}, "switch_on": "saturation", "refresh": 4}, ("refresh", "switch_on step")),
        ({"stores": {"t0": 5, "t1": 5}, "refresh": 4}, ("two stores", "teacher step 5")),
        ({"stores": {"t0": 5, "no": 6}, "refresh": 4}, ("curriculum.0.targets_clock names 'no'", "data.targets has")),
        ({"prefix": "ckpt", "refresh": 4}, ("curriculum.0.targets_clock.prefix is 'ckpt'", "ckpt1000")),
        ({"stores": {"t0": 5}, "switch_on": "saturation"}, ("eval.every_steps",)),
        ({"stores": {"t0": 5}, "switch_on": "saturation", "figure": "heldout_loss"}, ("'accuracy', ", "figure")),
        ({"stores": {"t0": 5}, "switch_on": "lunar"}, ("'step' or 'saturation'",)),
    ],
)
def test_a_clock_that_cannot_be_is_refused(stores, tmp_path: Path, clock: dict[str, Any], words: Any) -> None:
    with pytest.raises(ConfigError) as error:
        workers.config_of(tree_of(stores, tmp_path / "run", clock))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_targets_beside_a_clock_are_refused(stores, tmp_path: Path) -> None:
    tree = tree_of(stores, tmp_path / "run", {"prefix": "t", "refresh": 1})
    tree["curriculum"][0]["targets"] = "t0"
    with pytest.raises(ConfigError, match="remove targets"):
        workers.config_of(tree)


def test_steps_come_from_the_store_where_it_says_them(stores, tmp_path: Path) -> None:
    """The tiny early teacher says that it is of step 100; the other says nothing."""
    tree = tree_of(stores, tmp_path / "run", {"stores": {"t1": 300, "t0": None}, "refresh": 100})
    config = workers.config_of(tree)
    clock = build_plan(config, open_stores(config)).clocks[0]
    assert (clock.stores, clock.teacher_steps) == (("t0", "t1"), (100, 300))
    tree["curriculum"][0]["targets_clock"]["stores"] = {"t1": None, "t0": None}
    config = workers.config_of(tree)
    with pytest.raises(UserError, match=r"curriculum\.0\.targets_clock\.stores\.t1 is null.*no step"):
        build_plan(config, open_stores(config))


def test_names_of_a_prefix_carry_their_steps(stores, tmp_path: Path) -> None:
    config = workers.config_of(tree_of(stores, tmp_path / "run", {"prefix": "t", "refresh": 1}))
    clock = build_plan(config, open_stores(config)).clocks[0]
    assert (clock.stores, clock.teacher_steps) == (("t0", "t1"), (0, 1))


OPTIONS: dict[str, Any] = {
    "eval": {"every_steps": 2},
    "logging": {"every_steps": 1},
    "schedule": {"kind": "constant"},
    "checkpoint": {"every_steps": 2, "keep_last": 9},
    "objective": {"alpha": 1.0},
}
BY_STEP = {"stores": {"t0": 4, "t1": 9}, "refresh": 4}
ON_SATURATION = {"stores": {"t0": 3, "t1": 9}, "switch_on": "saturation", "max_steps": 4}


def losses_of(run: Path) -> list[float]:
    return [loss for record in read_metrics(run) if record["kind"] == "train" for loss in record["step_losses"]]


@pytest.fixture(scope="module")
def as_stages(stores, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of 8 steps, of two stages of 4 with a store each: what a clock that moves on at step 4 must come to."""
    run = tmp_path_factory.mktemp("stages") / "run"
    tree = tree_of(stores, run, BY_STEP, **OPTIONS)
    tree["curriculum"] = [{"until": 4, "targets": "t0"}, {"targets": "t1"}]
    run_ranks(workers.train_run, tree, world=1)
    return losses_of(run)


def test_a_run_learns_from_the_store_of_its_step_as_stages_would_let_it(stores, as_stages, tmp_path: Path) -> None:
    """One stage with a clock trains bit for bit as two stages with the stores, also when it is stopped and resumed."""
    run_ranks(workers.train_run, tree_of(stores, tmp_path / "run", BY_STEP, **OPTIONS), world=1)
    assert losses_of(tmp_path / "run") == as_stages and len(as_stages) == 8
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan[0]["targets_clock"] == [[0, "t0", 4], [4, "t1", 9]] and plan[0]["targets"] is None
    resumed = cut_back(tmp_path / "run", tmp_path / "resumed", 2)
    run_ranks(workers.train_run, tree_of(stores, resumed, BY_STEP, **OPTIONS), world=2)
    assert losses_of(resumed) == pytest.approx(as_stages, rel=1e-5)


def test_a_dry_run_says_which_store_when_and_reads_only_those(stores, tmp_path: Path) -> None:
    clock = {"stores": {"t0": 3, "t1": 9}, "refresh": 3}
    run = dry_run(check_start(workers.config_of(tree_of(stores, tmp_path / "run", clock)), num_ranks=1))
    assert run.stages[0].clock == ((0, "t0", 3), (3, "t1", 9)) and run.stages[0].reads == ("t0", "t1")
    text = format_dry_run(run)
    assert "from step 0: t0, step 3 of the teacher" in text and "from step 3: t1, step 9 of the teacher" in text
    waits = {"stores": {"t0": 3, "t1": 9}, "switch_on": "saturation"}
    tree = tree_of(stores, tmp_path / "run", waits, eval={"every_steps": 2})
    text = format_dry_run(dry_run(check_start(workers.config_of(tree), num_ranks=1)))
    assert "then the next store on saturation, decided during the run" in text


def test_another_way_to_move_on_is_one_entry(stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Switch(lambda clock, teacher_steps, switched, step: step // 5, lambda clock, switched, num_steps: [5])
    monkeypatch.setitem(SWITCHES, "fifth", entry)
    clock = {"stores": {"t0": 3, "t1": 9}, "switch_on": "fifth"}
    config = workers.config_of(tree_of(stores, tmp_path / "run", clock))
    plan = build_plan(config, open_stores(config))
    assert [plan.targets(step) for step in range(8)] == ["t0"] * 5 + ["t1"] * 3
    assert plan.clock_parts(plan.spans[0]) == ((0, "t0", 3), (5, "t1", 9))


def paper_rule(figures: list[float]) -> list[int]:
    """Numbers of the evaluations at which the paper's code takes the next teacher."""
    last, found = 0.0, []
    for number, current in enumerate(figures):
        if number < 5:
            continue
        mean = sum(figures[number - 5 : number]) / 5
        last = last or mean
        if current - mean < 0.01 and current - last > 0.01:
            last = current
            found.append(number)
    return found


def test_saturation_is_that_of_the_papers_code() -> None:
    figures = [
        0.5,
        0.5,
        0.51,
        0.5,
        0.5,
        0.5,
        0.55,
        0.6,
        0.66,
        0.66,
        0.66,
        0.66,
        0.66,
        0.66,
        0.66,
        0.7,
        0.75,
        0.75,
        0.75,
    ]
    figures += [0.75, 0.75, 0.75, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    clock = TargetsClock(stores={"t0": 1}, switch_on="saturation")
    watched = Watched()
    found = [number for number, figure in enumerate(figures) if watched.takes_next(clock, 10 * number, figure)]
    assert found == paper_rule(figures) and len(found) == 3
    assert watched.switched == [10 * number for number in found]


def test_a_store_is_left_after_most_steps_at_the_latest() -> None:
    clock = TargetsClock(stores={"t0": 1}, switch_on="saturation", max_steps=40)
    watched = Watched()
    assert [step for step in range(10, 130, 10) if watched.takes_next(clock, step, 0.5)] == [40, 80, 120]


def test_a_run_moves_on_by_its_evaluations_and_a_resumed_one_alike(stores, as_stages, tmp_path: Path) -> None:
    """Stopped where it moves on, which is decided after the run was made longer, and behind that."""
    run = tmp_path / "run"
    for steps in (4, 8):
        tree = tree_of(stores, run, ON_SATURATION, **OPTIONS, run={"max_steps": steps})
        run_ranks(workers.train_run, tree, world=1)
    behind = cut_back(run, tmp_path / "behind", 6)
    run_ranks(workers.train_run, tree_of(stores, behind, ON_SATURATION, **OPTIONS), world=1)
    for folder in (run, behind):
        assert losses_of(folder) == as_stages
        [switch] = [record for record in read_metrics(folder) if record["kind"] == "targets_clock"]
        assert (switch["step"], switch["from"], switch["to"]) == (4, "t0", "t1")
