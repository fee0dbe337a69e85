"""The spread of the demo: what its figures are, which goals are met, and that it continues where it was."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo_spread import figures, goals, keep, main, measure, parse_seeds
from potstill.common.spread import T_QUANTILES, Spread, is_gain
from potstill.launch.demo.sizes import ARMS

LOSSES = {"labels": [3.70, 3.74, 3.72], "kd": [3.50, 3.52, 3.51], "distilled": [3.45, 3.48, 3.46]}


def test_the_figures_are_paired_by_seed() -> None:
    found = figures(LOSSES)
    assert found["labels_sd"] == 0.02
    assert (found["gap_mean"], found["gap_min"], found["gap_sd"]) == (0.2567, 0.25, 0.0058)
    assert (found["kd_gap_mean"], found["selector_gain_mean"]) == (0.21, 0.0467)
    assert found["selector_worth_it"] == "yes"
    assert found["means"] == {"labels": 3.72, "kd": 3.51, "distilled": 3.4633}


def test_a_goal_that_is_missed_is_said_to_be() -> None:
    assert list(goals(figures(LOSSES)).values()) == [True, True, True]
    wide = {"labels": [3.70, 3.80, 3.72], "kd": LOSSES["kd"], "distilled": [3.66, 3.48, 3.46]}
    assert list(goals(figures(wide)).values()) == [False, False, False]


def test_what_three_seeds_allow_to_say() -> None:
    assert is_gain([0.04, 0.05, 0.06]) is True
    assert is_gain([-0.04, -0.05, -0.06]) is False
    assert is_gain([0.01, 0.05, 0.09]) is None  # all ahead, and 4.3 standard errors reach below 0
    assert is_gain([0.05]) is None
    low, high = Spread.of([1.0, 2.0, 3.0]).interval()
    # For 1 and 2 degrees of freedom the quantile of Student's t has a closed form.
    assert T_QUANTILES[0] == pytest.approx(math.tan(math.pi * 0.475), abs=5e-4)
    assert T_QUANTILES[1] == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), abs=5e-4)
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(4.303 / math.sqrt(3))
    assert Spread.of([1.0]).format() == "1.0000"
    with pytest.raises(ValueError, match="no value"):
        Spread.of([])


@pytest.mark.parametrize("text", ["1", "1,1", "a,b", "-1,2"])
def test_seeds_that_make_no_spread_are_refused(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        parse_seeds(text)


def write_runs(root: Path, seeds: list[int]) -> None:
    """Run folders as `potstill train` leaves them, in so far as they are read here."""
    for at, seed in enumerate(seeds):
        for arm in ARMS:
            folder = root / "runs" / f"{arm}-{seed}"
            folder.mkdir(parents=True)
            records = [{"kind": "eval", "step": step, "heldout_loss": LOSSES[arm][at] + 1 / step} for step in (1, 100)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "ngrams.json").write_text(json.dumps({"unigram": 5.5, "bigram": 3.9, "positions": 100}))


def test_the_result_has_a_section_for_each_set_of_seeds(tmp_path: Path) -> None:
    results: list[dict[str, Any]] = []
    for name, seeds in (("a", [1, 2, 3]), ("b", [11, 12, 13])):
        write_runs(tmp_path / name, seeds)
        results.append(measure(tmp_path / name, seeds))
        keep(tmp_path / "demo_spread.md", results[-1])
    assert results[0]["gap_mean"] == 0.2567 and results[0]["curves"]["kd"] == {1: 4.51, 100: 3.52}
    kept = json.loads((tmp_path / "demo_spread.json").read_text())
    assert list(kept) == ["1,2,3", "11,12,13"]
    assert kept["1,2,3"]["goals"]["labels_sd 0.0200 <= 0.03"] == "met"
    text = (tmp_path / "demo_spread.md").read_text()
    assert "## Seeds 1,2,3" in text and "## Seeds 11,12,13" in text
    assert "Was the selector worth it? yes" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs_and_repeated_has_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--seeds", "11,12", "--output", str(tmp_path / "demo")]
    assert main(words) == 0
    first = capsys.readouterr().out
    found = json.loads(first.splitlines()[-1])
    assert found["seeds"] == [11, 12] and found["gap_min"] <= found["gap_mean"]
    assert len(set(found["losses"]["labels"])) == 2  # the seeds reach the initial weights
    assert main(words) == 0
    again = capsys.readouterr().out
    assert " $ potstill" not in again
    assert again.splitlines()[-1] == first.splitlines()[-1]
