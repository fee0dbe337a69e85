"""The claim progressive: how it chooses its teacher and checkpoints by the teacher's curve, and how it judges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.claims.base import Bench
from benchmarks.claims.grammar import Grammar
from benchmarks.claims.jump import Curve
from benchmarks.claims.parity import Parity
from benchmarks.claims.progressive import arms, beats
from potstill.common.config import build_config
from potstill.common.errors import UserError
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.clock import stage_clock

STEPS = range(50, 8001, 50)


def accuracy(step: int) -> float:
    """Chance, a jump from step 2450 to 2750, a dip behind it that is not of chance."""
    if step <= 2450:
        return 0.52 if step % 100 else 0.48
    return {2500: 0.6, 2550: 0.66, 2600: 0.84, 2650: 0.96, 2700: 0.9}.get(step, 1.0)


def parity(work: Path, *, steps: int = 8000, seed: int = 2, jump: bool = True) -> Parity:
    """The setting with the figures of one finished teacher."""
    setting = Parity(Bench(work=work, data=work, scale="cpu", seeds=(1, 2)))
    folder = setting.folder / "teachers" / str(seed)
    folder.mkdir(parents=True)
    lines = [{"kind": "eval", "step": step, "accuracy": accuracy(step) if jump else 0.5} for step in STEPS]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "done.json").write_text(json.dumps({"step": steps}))
    return setting


def test_the_jump_is_read_off_the_curve() -> None:
    curve = Curve(tuple((step, accuracy(step)) for step in STEPS))
    assert (curve.begins, curve.inside, curve.learned) == (2450, 2550, 2750)
    assert Curve(((50, 0.5), (100, 0.52))).learned is None


def test_checkpoints_are_chosen_by_the_teacher_alone(tmp_path: Path) -> None:
    setting = parity(tmp_path)
    assert setting.teacher == 2 and setting.inside == 2550 and setting.before == 1200
    series = setting.series
    assert setting.inside in series and series[-1] == 8000 and max(series[:-1]) < 2750 + setting.refresh
    assert abs(setting.refresh - 500) < 400 and setting.inside % setting.refresh == 0


def test_the_student_learns_from_the_inside_checkpoint_for_a_whole_refresh(tmp_path: Path) -> None:
    setting = parity(tmp_path)
    tree = arms(setting.bench)["series"].config
    config = build_config(TrainConfig, {**tree, "run": {**tree["run"], "output_dir": "run"}}, source="test")
    [stage] = config.curriculum
    assert stage.targets_clock is not None
    names = stage.target_names(config.data.targets)
    clock = stage_clock(stage.targets_clock, names, {}, key="curriculum.0.targets_clock")
    parts = {store: first for first, store, _ in clock.parts(config.run.max_steps or 0)}
    assert parts["t2550"] == 2550 - setting.refresh and parts["t8000"] == 2550
    assert set(parts) == set(names)


def test_a_teacher_that_is_not_done_or_does_not_jump_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no teacher of the seeds"):
        _ = parity(tmp_path / "short", steps=3200).teacher
    with pytest.raises(UserError, match="no teacher of the seeds"):
        _ = parity(tmp_path / "flat", jump=False).teacher


def test_never_is_slower_than_any_step_and_a_tie_is_not_sooner() -> None:
    steps = {"labels": [None, 500.0, 400.0, None], "one_shot": [None, None, 900.0, 300.0]}
    assert beats({**steps, "inside": [800.0, 400.0, 400.0, None]}, "inside") == [True, True, False, False]


def grammar(work: Path) -> Grammar:
    """The setting without anything made."""
    return Grammar(Bench(work=work, data=work, scale="cpu", seeds=(1, 2)))


def test_a_sentence_is_what_the_grammar_derives(tmp_path: Path) -> None:
    setting = grammar(tmp_path)
    ids, mask = setting.examples(np.random.Generator(np.random.Philox(1)), 200)
    assert (ids[:, 0] == 3).all() and ids.shape == (200, 33) and np.flatnonzero(mask[0]).tolist() == [16, 32]
    symbols = ids[:, 1:]
    for rules in reversed(setting.rules):
        made_of = {tuple(pair): symbol for symbol, pairs in enumerate(rules.tolist()) for pair in pairs}
        assert len(made_of) == rules.shape[0] * 2  # no two rules of a level are alike
        symbols = np.array([[made_of[tuple(pair)] for pair in row.reshape(-1, 2).tolist()] for row in symbols])
    assert symbols.shape == (200, 1) and not symbols.any()


def test_the_climb_on_a_grammar_is_measured_from_the_token_before_to_the_teachers_end(tmp_path: Path) -> None:
    setting = grammar(tmp_path)
    assert 0.45 < setting.floor < 0.55
    points = [(step, 0.5 if step < 400 else min(0.85, 0.5 + (step - 350) / 1000)) for step in range(50, 1601, 50)]
    curve = setting.measured(points)
    assert curve.top == pytest.approx(0.85) and curve.at(0.9) == pytest.approx(
        setting.floor + 0.9 * (0.85 - setting.floor)
    )
    assert curve.begins < curve.inside < (curve.learned or 0) and abs(dict(points)[curve.inside] - curve.at(0.5)) < 0.03
