"""The claims `selector` and `targets`: what is told of a choice, and that their arms differ in nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.claims import selector, targets
from benchmarks.claims.base import SCALES, Arm, Bench, Claim
from benchmarks.claims.runs import Run, Runs
from benchmarks.claims.what_is_kept import auc, noisy_characters, upper_part, write_masked
from potstill.storage import StoreReader
from tests.teacher_dump.tiny import make_tokens


def _bench(tmp_path: Path, scale: Any = "quick", seeds: tuple[int, ...] = (1, 2, 3)) -> Bench:
    return Bench(work=tmp_path / "work", data=tmp_path / "data", scale=scale, seeds=seeds)


@pytest.mark.parametrize("claim", [selector.CLAIM, targets.CLAIM], ids=lambda claim: claim.name)
@pytest.mark.parametrize("scale", SCALES)
def test_arms_are_runs_of_their_own_and_differ_in_what_is_compared_alone(
    claim: Claim, scale: Any, tmp_path: Path
) -> None:
    bench = _bench(tmp_path, scale)
    arms = claim.arms(bench)
    folders = {Run(bench=bench, arm=arm, seed=1).folder for arm in arms.values()}  # refuses a wrong configuration
    assert len(folders) == len(arms)
    shared = []
    for arm in arms.values():
        tree = json.loads(json.dumps(arm.config))
        for key in ("objective", "curriculum"):
            tree.pop(key, None)
        for key in ("targets", "scores"):
            tree["data"].pop(key, None)
        shared.append(tree)
    assert all(tree == shared[0] for tree in shared)


def _runs(bench: Bench, claim: Claim, figures: dict[str, tuple[float, float]]) -> Runs:
    """Finished runs of all arms with these final losses and calibration errors, a little apart by seed."""
    arms: dict[str, Arm] = claim.arms(bench)
    runs = Runs(bench, arms)
    for name, (loss, error) in figures.items():
        for seed in bench.seeds:
            folder = runs.run(name, seed).folder
            folder.mkdir(parents=True)
            noise = 0.001 * (seed + len(name) % 3)
            lines = [
                {"kind": "eval", "step": step, "heldout_loss": value + noise, "calibration_error": error + noise / 10}
                for step, value in ((6, loss + 0.5), (9, loss + 0.1), (12, loss))
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs


STUDY = {
    "labels": (2.81, 0.012),
    "full": (2.75, 0.007),
    "top-p-k": (2.76, 0.008),
    "top-12 renormalised": (2.87, 0.047),
    "top-12 with tail": (2.77, 0.004),
    "50 draws": (2.75, 0.008),
    "12 draws": (2.752, 0.01),
}


def test_the_study_itself_passes_and_every_other_order_fails(tmp_path: Path) -> None:
    def rules(changes: dict[str, tuple[float, float]], place: str) -> dict[str, bool]:
        runs = _runs(_bench(tmp_path / place), targets.CLAIM, {**STUDY, **changes})
        return {found.text: found.passed for found in targets.findings(runs) if found.rule}

    assert all(rules({}, "study").values())
    assert all(rules({"50 draws": (2.753, 0.008)}, "margin").values())
    failed = rules({"50 draws": (2.757, 0.008)}, "draws")
    assert [text for text, passed in failed.items() if not passed] == [
        "50 draws end as low as full, within a tenth of the gain over labels"
    ]
    failed = rules({"top-12 renormalised": (2.76, 0.047)}, "renorm")
    assert [text for text, passed in failed.items() if not passed] == [
        "top-12 with tail ends lower than top-12 renormalised"
    ]
    failed = rules({"top-12 renormalised": (2.87, 0.006)}, "error")
    assert sum(not passed for passed in failed.values()) == 2


def test_the_selector_must_beat_random_rows_and_all_rows_and_read_less(tmp_path: Path) -> None:
    def rules(named: float, random: float, place: str) -> list[bool]:
        bench = _bench(tmp_path / place)
        figures = dict.fromkeys(selector.arms(bench), (3.0, 0.01)) | {
            "rows: difference": (named, 0.01),
            "rows: random": (random, 0.01),
        }
        runs = _runs(bench, selector.CLAIM, figures)
        return [found.passed for found in selector.findings(bench, runs) if found.rule]

    assert rules(2.8, 3.0, "good") == [True, True, True]
    assert rules(2.95, 2.9, "random") == [False, True, False]  # better than all, but not before the last evaluation
    assert rules(3.2, 3.4, "worse") == [True, False, False]


def test_what_a_choice_keeps(tmp_path: Path) -> None:
    assert noisy_characters([[1, 3, "log"], [4, 5, "ocr"]], 6).tolist() == [False, True, True, False, True, False]
    score = np.array([0.1, np.nan, 3.0, 2.0, 2.0, -1.0])
    assert upper_part(score, 0.5).tolist() == [False, False, True, True, True, False]
    assert upper_part(score, 0.4).tolist() == [False, False, True, True, False, False]
    clean = np.array([False, True, False, True])
    assert auc(np.array([1.0, 2.0, 2.0, 3.0]), clean) == pytest.approx(0.875)
    assert np.isnan(auc(np.array([1.0, 2.0]), np.array([True, True])))


def test_the_part_that_is_measured_is_the_part_that_was_chosen(tmp_path: Path) -> None:
    source = make_tokens(tmp_path / "tokens")
    rows = StoreReader(source).tokens_rows(range(6))
    chosen = [np.arange(len(row.tokens)) % 3 == 0 for row in rows]
    for _ in range(2):  # the second time it is there
        write_masked(str(source), tmp_path / "masked", chosen)
    for row, positions, plain in zip(StoreReader(tmp_path / "masked").tokens_rows(range(6)), chosen, rows, strict=True):
        assert np.array_equal(row.tokens, plain.tokens)
        assert np.array_equal(row.has_target(), positions & plain.has_target())
