"""PACED: problems that the student now solves sometimes count most, w = p (1 - p). arXiv 2603.11178.

Paper: Qwen3-8B to 1.7B on MATH-500, 69.4 before, 76.8 with forward KL, 78.5 with a hard filter, 79.4 with PACED;
forward KL and then reverse KL better still; the signal to noise of gradients is a bell in the pass rate p and vanishes
at 0 and 1; what is mastered is forgotten by 1.4 % at most.

Set-up: the arithmetic setting (arithmetic.py): 2 x 48 student, trained before; three fifths of the problems are
out of reach for it and for its teacher, and a sixth is mastered. p is the chance that sampling writes the reference,
which in arithmetic, with one right answer, is the product of its tokens' probabilities; it is scored again every 100
steps, and weights have mean 1 over the problems of each batch. 400 steps of 64 problems, pure KD, one learning rate
for all arms.

Arms: uniform; hard filter (p from 0.1 to 0.9); beta; uniform forward then reverse KL; beta forward then reverse; a
random share of the problems as large as the filter's (control).

Pass: beta >= hard filter >= uniform in exact match over the eight levels (means over seeds), and beta above uniform
beyond the 95 % interval; signal to noise at some p inside 0.05 to 0.95 is above that at both ends (below 0.01, above
0.99) in at least 4 of 5 samples of problems; the mastered levels stay within 2 points of where they began.

Pilots (one seed): student before its levels were mastered, rate 1e-3: uniform 38.2, filter 41.1, beta 41.5. This
set-up: uniform 54.5, filter 56.0, beta 56.1. Signal to noise falls to nothing towards 1, but its top is at p = 0.01 to
0.05 and the lower end keeps half of it: what a teacher says wrongly it says coherently.

Cost: 6 arms x 5 seeds x half a minute of one core, and a minute for the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from benchmarks.claims.arithmetic import MASTERED, Arithmetic, curves, exact_match, level_table, start_figures
from benchmarks.claims.base import Arm, Bench, Claim, Outcome, Plot, Table
from benchmarks.claims.gradient_noise import BINS, SAMPLES, signal_to_noise
from benchmarks.claims.paired import compare, count, most
from benchmarks.claims.runs import Runs
from potstill.common.jobs import Job

MARGIN = 2.0  # points that a mastered level may lose
REFRESH = {"quick": 5, "cpu": 100, "gpu": 200}
UNIFORM, FILTER, BETA, RANDOM = "uniform", "hard filter", "beta", "random share"
FORMS: dict[str, dict[str, Any]] = {FILTER: {"form": "band", "a": 0.1, "b": 0.9}, BETA: {"form": "beta"}}
RANDOM_SHARE = 0.3  # of the problems have 0.1 <= p <= 0.9 at the start


def build(bench: Bench) -> Iterator[list[Job]]:
    """The setting."""
    yield Arithmetic(bench).jobs()


def arms(bench: Bench) -> dict[str, Arm]:
    """Weights of problems by p, with forward KL alone and with reverse KL in the second half."""
    found = {UNIFORM: _arm(bench, None), FILTER: _arm(bench, FILTER), BETA: _arm(bench, BETA)}
    found |= {f"{name}, forward then reverse": _arm(bench, form, reverse=True) for name, form in PAIRS.items()}
    rows = {"score": {"kind": "random"}, "share": RANDOM_SHARE, "segments": 1}
    return found | {RANDOM: _arm(bench, None, rows=rows)}


PAIRS = {UNIFORM: None, BETA: BETA}


def _arm(bench: Bench, form: str | None, *, reverse: bool = False, **stage: Any) -> Arm:
    setting = Arithmetic(bench)
    stage |= {"targets": "teacher", "divergence": "forward_kl"}
    groups: dict[str, Any] = {"objective": {"alpha": 1.0, "off_kd": "nothing"}}
    if form is not None:
        weights = {"of": "document", "store": "current", "column": "answer_probability", "mean_over": "units"}
        stage["weights"] = {**weights, **FORMS[form]}
        groups["rescoring"] = {"every_steps": REFRESH[bench.scale], "batch_rows": 256}
    stages = [{**stage, "until": 0.5}, {**stage, "divergence": "reverse_kl"}] if reverse else [stage]
    schedule = {"kind": "cosine", "warmup": 0.05, "min_ratio": 0.0}
    return Arm(config=setting.student(stages, schedule=schedule, **groups))


def judge(bench: Bench, runs: Runs) -> Outcome:
    """The order of the weights, the bell, and what is kept."""
    ends = {name: exact_match(runs, name) for name in runs.arms}

    def order(better: str, worse: str, **options: Any) -> Any:
        options = {"unit": "points", "lower_is_better": False, **options}
        return compare(f"{better} at least {worse} in exact match", ends[better], ends[worse], **options)

    start = start_figures(bench)
    kept = [100.0 * sum(start[name] for name in MASTERED) / len(MASTERED)] * len(bench.seeds)
    signal = signal_to_noise(bench)
    both = [f"{name}, forward then reverse" for name in PAIRS]
    findings = (
        compare("beta above uniform in exact match", ends[BETA], ends[UNIFORM], unit="points", lower_is_better=False),
        order(BETA, FILTER, beyond_interval=False),
        order(FILTER, UNIFORM, beyond_interval=False),
        count(
            "signal to noise is higher inside than at both ends of p",
            [_is_bell(one) for one in signal],
            most(SAMPLES),
            of="samples",
        ),
        compare(
            f"the mastered levels are kept within {MARGIN:.0f} points by beta",
            exact_match(runs, BETA, MASTERED),
            kept,
            unit="points",
            lower_is_better=False,
            margin=MARGIN,
        ),
        order(both[1], both[0], rule=False),
        order(both[1], BETA, rule=False),
        order(RANDOM, UNIFORM, rule=False),
    )
    shown = (UNIFORM, FILTER, BETA, both[1])
    plot = Plot(
        name="exact",
        title="Exact match over eight levels of arithmetic",
        x="step",
        y="exact match, points",
        curves={name: curves(runs, name) for name in shown},
    )
    table = level_table(bench, runs, "Exact match of greedy answers at the end, in points, by level")
    return Outcome(findings=findings, tables=(table, _signal_table(signal)), plots=(plot,))


def _is_bell(signal: list[float | None]) -> bool:
    """Whether some inner bin (0.05 <= p < 0.95) carries more signal than the first and the last; False if unknown."""
    ends = (signal[0], signal[-1])
    inner = [value for value, low in zip(signal, BINS, strict=False) if value is not None and 0.05 <= low < 0.95]
    return bool(inner) and all(end is not None and max(inner) > end for end in ends)


def _signal_table(signal: list[list[float | None]]) -> Table:
    lines = []
    for number, (low, high) in enumerate(pairwise(BINS)):
        values = [f"{one[number]:.4f}" if one[number] is not None else "too few" for one in signal]
        lines.append((f"{low:g} to {high:g}", *values))
    header = ("p", *(f"sample {number}" for number in range(1, SAMPLES + 1)))
    return Table(
        title="Signal to noise of the problems' gradients, student as it comes", header=header, rows=tuple(lines)
    )


CLAIM = Claim(
    name="paced",
    title="Weights p (1 - p) do at least as well as a hard filter, and that as uniform weights",
    build=build,
    arms=arms,
    judge=judge,
)
