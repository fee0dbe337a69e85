"""The claims on arithmetic: problems and their answers, arms that are runs, rules that decide as their heads say."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.claims import gradient_noise, paced, pocl
from benchmarks.claims.arithmetic import LEVELS, NAMES, SHARES, Arithmetic, Level, write_problems
from benchmarks.claims.base import Bench, Claim
from benchmarks.claims.gradient_noise import BINS, SAMPLES
from benchmarks.claims.runs import Run, Runs
from potstill.storage import TokensRow


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(work=tmp_path / "work", data=tmp_path / "data", scale="quick", seeds=(1, 2))


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_answers_are_right_and_of_one_length(level: Level) -> None:
    draws = random.Random(3)
    for _ in range(50):
        first, second = level.problem(draws)
        found = level.answer(first, second)
        wanted = {"+": first + second, "-": first - second, "*": first * second}[level.operation]
        assert int(found[::-1]) == wanted >= 0 and len(found) == level.width
        assert len(level.without_carry(first, second)) == level.width
        assert len(f"{first}{level.operation}{second}={found}") < 16, "it must fit a row with its end"


def test_forgotten_carries_by_hand() -> None:
    add, subtract = (Level("", operation, (2, 2), False) for operation in "+-")
    assert add.without_carry(58, 67) == "510"  # 8 + 7 = 5, 5 + 6 = 1, last digit first
    assert add.answer(58, 67) == "521"
    assert subtract.without_carry(52, 37) == "52"  # 2 - 7 = 5, 5 - 3 = 2
    assert Level("", "*", (2, 2), False).without_carry(12, 34) == "8400"  # 12 * 4


def test_problems_are_the_same_each_time_and_forget_in_their_share(tmp_path: Path) -> None:
    for name in "ab":
        write_problems(tmp_path / name, SHARES["problems"], 2000, seed=1, forgotten=0.85)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    wrong = hard = 0
    for line in (tmp_path / "a").read_text().splitlines():
        record = json.loads(line)
        prompt, response = record["prompt"], record["response"]
        operation = next(mark for mark in "+-*" if mark in prompt)
        one, other = (text[::-1] for text in prompt[:-1].split(operation))
        level = next(x for x in LEVELS if x.operation == operation and x.digits == (len(one), len(other)))
        is_right = level.answer(int(one), int(other)) == response
        assert is_right or not level.taught
        hard += not level.taught
        wrong += not is_right
    assert hard / 2000 == pytest.approx(0.6, abs=0.05)
    # Some problems have no carry to forget.
    assert 0.7 < wrong / hard < 0.85


@pytest.mark.parametrize("claim", [pocl.CLAIM, paced.CLAIM], ids=lambda claim: claim.name)
def test_arms_are_runs_that_differ_and_are_as_long(bench: Bench, claim: Claim) -> None:
    arms = claim.arms(bench)
    assert len({Run(bench=bench, arm=arm, seed=1).folder for arm in arms.values()}) == len(arms)
    shared = [{**arm.config, "curriculum": None, "rescoring": None, "schedule": None} for arm in arms.values()]
    assert all(one == other for one, other in pairwise(shared))


def test_the_stages_of_pocl_are_those_of_its_head(bench: Bench) -> None:
    arms = pocl.arms(bench)
    stages = arms[pocl.POCL].config["curriculum"]
    assert [stage["until"] for stage in stages] == [0.1, 0.3, 0.6, None]
    assert [stage["alpha"] for stage in stages] == [0.7, 0.8, 0.9, 1.0]
    assert [stage["temperature"] for stage in stages] == [1.0, 1.3333, 1.6667, 2.0]
    assert [stage.get("rows", {}).get("share") for stage in stages] == [0.25, 0.5, 0.75, None]
    (kd,) = arms[pocl.KD].config["curriculum"]
    lengths = np.diff([0.0, 0.1, 0.3, 0.6, 1.0])
    assert kd["alpha"] == pytest.approx(float(lengths @ [0.7, 0.8, 0.9, 1.0])) and kd["temperature"] == 1.0


def finished(bench: Bench, claim: Claim, values: dict[str, float]) -> Runs:
    """Runs of all arms, with this exact match on each level (0 where an arm is not named), by seed a little higher."""
    arms = claim.arms(bench)
    for name, arm in arms.items():
        for seed in bench.seeds:
            value = values.get(name, 0.0) + 0.001 * seed
            folder = Run(bench=bench, arm=arm, seed=seed).folder
            folder.mkdir(parents=True)
            line = {"kind": "eval", "step": 10, "answer_accuracy": value}
            line["sources"] = {level: {"answer_accuracy": value} for level in NAMES}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for model in ("start", "teacher"):
        for level in NAMES:
            path = Arithmetic(bench).folder / "figures" / f"{model}_{level}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"answer_accuracy": 0.4}))
    return Runs(bench, arms)


def write_signal(bench: Bench, values: list[float | None]) -> None:
    (Arithmetic(bench).folder / "signal_to_noise.json").write_text(json.dumps([values] * SAMPLES))


BELL = [0.0, 0.01, 0.05, 0.04, 0.02, 0.01, 0.01]


@pytest.mark.parametrize(
    ("values", "signal", "failing"),
    [
        ({"beta": 0.6, "hard filter": 0.5, "uniform": 0.4}, BELL, []),
        ({"beta": 0.5, "hard filter": 0.6, "uniform": 0.4}, BELL, ["beta at least hard filter"]),
        ({"beta": 0.6, "hard filter": 0.3, "uniform": 0.4}, BELL, ["hard filter at least uniform"]),
        ({"beta": 0.6, "hard filter": 0.5, "uniform": 0.4}, [*BELL[:-1], 0.5], ["signal to noise"]),
        ({"beta": 0.6, "hard filter": 0.5, "uniform": 0.4}, [None, *BELL[1:]], ["signal to noise"]),
        ({"beta": 0.37, "hard filter": 0.36, "uniform": 0.35}, BELL, ["mastered"]),
    ],
)
def test_paced_is_judged_by_each_of_its_rules(
    bench: Bench, values: dict[str, float], signal: list[float | None], failing: list[str]
) -> None:
    assert len(BELL) == len(BINS) - 1
    runs = finished(bench, paced.CLAIM, values)
    write_signal(bench, signal)
    outcome = paced.judge(bench, runs)
    broken = [finding.text for finding in outcome.findings if finding.rule and not finding.passed]
    assert outcome.passed is (not failing) and len(broken) == len(failing), broken
    assert all(word in text for word, text in zip(failing, broken, strict=True))


@pytest.mark.parametrize(("values", "passed"), [({"POCL": 0.6, "KD": 0.5}, True), ({"POCL": 0.5, "KD": 0.6}, False)])
def test_pocl_is_judged_by_exact_match(bench: Bench, values: dict[str, float], passed: bool) -> None:
    outcome = pocl.judge(bench, finished(bench, pocl.CLAIM, values))
    assert outcome.passed is passed and abs(outcome.findings[0].effect) == pytest.approx(10.0)
    assert outcome.tables[0].rows[0][1] == "40.0" and len(outcome.tables[0].rows) == 1 + len(pocl.ARMS)


def test_signal_to_noise_by_hand() -> None:
    """Against the mean and the variances of the gradients, one by one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 15}
    config = AutoConfig.for_model("gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **sizes)
    torch.manual_seed(0)
    student, teacher = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    draws = np.random.default_rng(0)
    mask = np.array([0, 0, 0, 1, 1], bool)
    rows = [TokensRow(n, draws.integers(15, size=5).astype(np.int32), np.array([5], np.int32), mask) for n in range(4)]
    gradients = []
    for row in rows:
        ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
        mine, theirs = (model(input_ids=ids).logits[0, 2:4].log_softmax(-1) for model in (student, teacher))
        loss = (theirs.exp() * (theirs - mine)).sum(-1).mean()
        found = torch.autograd.grad(loss, list(student.parameters()))
        gradients.append(torch.cat([part.flatten() for part in found]).double())
    each = torch.stack(gradients)
    variance = each.var(0).sum()
    wanted = float((each.mean(0).square().sum() - variance / 4) / variance)
    assert gradient_noise._of_problems(student, teacher, rows) == pytest.approx(wanted, rel=1e-4)
