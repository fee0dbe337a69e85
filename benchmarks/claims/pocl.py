"""POCL: easy problems first, in cumulative stages with rising temperature and KD share. arXiv 2506.05695.

Paper: "Being Strong Progressively!", GPT-2 1.5B to 0.1B on Dolly; ROUGE-L over five sets 18.10 with plain KD and 19.70
with POCL (forward KL), +1.5 to +2.6 with other losses. Easy is what the initial student answers well: ROUGE-L of its
own greedy answers and its loss on the reference, fused by reciprocal ranks. Four stages train on the easiest 25, 50,
75 and 100 % with temperature 1 to 2 and KD share 0.7 to 1, each with a fresh schedule and optimizer.

Set-up: the arithmetic setting (arithmetic.py): 2 x 48 student, trained before; three fifths of the problems are out
of reach for it and for its teacher. 400 steps of 64 problems, one peak learning rate for all arms, cosine to 0. The
published gain is confounded by learning rate, batch and epochs; here these are equal, and each part has its arm.

Arms: KD (share 0.9, the mean of the ramp; temperature 1); order only; ramps only; restarts only (schedule and
optimizer, at the bounds of the stages); POCL; order and restarts; hard to easy, as POCL but for the order.

Pass: POCL above KD in exact match of greedy answers, mean over the eight levels, beyond the 95 % interval of the
paired differences.

Pilots (one seed): the order gains, the ramp costs as much or more, since the last stage has temperature 2 and no
labels where the teacher is wrong. Student before its levels were mastered, rate 1e-3: KD 39.2, order only 40.1, ramps
only 38.1, POCL 37.8. This set-up: KD 55.1, POCL 53.5; after the easiest quarter alone it stood at 55.1.

Cost: 7 arms x 5 seeds x half a minute of one core; five minutes for the setting, once for `paced` and `pocl`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.claims.arithmetic import TEMPERATURES, Arithmetic, curves, exact_match, level_table
from benchmarks.claims.base import Arm, Bench, Claim, Outcome, Plot
from benchmarks.claims.paired import compare
from benchmarks.claims.runs import Runs
from potstill.common.jobs import Job

KD_SHARE = 0.9  # the mean of the ramp over all steps
ENDS = (0.1, 0.3, 0.6, None)  # of the stages: lengths as their sets of rows, 1 : 2 : 3 : 4
SHARES = (0.25, 0.5, 0.75, 1.0)
RAMP = tuple(zip((1.0, *TEMPERATURES), (0.7, 0.8, 0.9, 1.0), strict=True))
FIGURES = [
    {"store": "start", "stat": "mean_greedy_score", "rank_first": "highest"},
    {"store": "start", "stat": "mean_loss"},
]
POCL, KD = "POCL", "KD"
# Arm: which rows come first, whether temperature and share rise, whether the stages begin afresh.
ARMS: dict[str, tuple[str | None, bool, bool]] = {
    KD: (None, False, False),
    "order only": ("highest", False, False),
    "ramps only": (None, True, False),
    "restarts only": (None, False, True),
    POCL: ("highest", True, True),
    "order and restarts": ("highest", False, True),
    "hard to easy": ("lowest", True, True),
}


def build(bench: Bench) -> Iterator[list[Job]]:
    """The setting."""
    yield Arithmetic(bench).jobs()


def stages(keep: str | None, ramps: bool, restarts: bool) -> list[dict[str, Any]]:
    """The four stages of an arm; one alone where nothing sets them apart."""
    found = []
    for number, (end, share, (temperature, alpha)) in enumerate(zip(ENDS, SHARES, RAMP, strict=True)):
        stage: dict[str, Any] = {"targets": "teacher", "until": end, "alpha": alpha if ramps else KD_SHARE}
        stage["temperature"] = temperature if ramps else 1.0
        stage["restart_optimizer"] = restarts and number > 0
        if keep is not None and share < 1.0:
            score = {"kind": "rank_fusion", "fusion_k": 60, "ties": "mean", "of": FIGURES}
            stage["rows"] = {"score": score, "keep": keep, "share": share, "segments": 1}
        found.append(stage)
    return found if keep is not None or ramps or restarts else [{**found[-1], "until": None}]


def arms(bench: Bench) -> dict[str, Arm]:
    """The parts of the method, alone and together."""
    setting = Arithmetic(bench)
    found = {}
    for name, (keep, ramps, restarts) in ARMS.items():
        schedule = {"kind": "cosine", "span": "stages" if restarts else "run", "warmup": 0, "min_ratio": 0.0}
        found[name] = Arm(config=setting.student(stages(keep, ramps, restarts), schedule=schedule))
    return found


def judge(bench: Bench, runs: Runs) -> Outcome:
    """POCL against KD, and each part of it."""
    ends = {name: exact_match(runs, name) for name in runs.arms}

    def above(better: str, worse: str, *, rule: bool = False) -> Any:
        text = f"{better} above {worse} in exact match"
        return compare(text, ends[better], ends[worse], unit="points", lower_is_better=False, rule=rule)

    findings = (
        above(POCL, KD, rule=True),
        above("order only", KD),
        above("ramps only", KD),
        above("restarts only", KD),
        above("order and restarts", KD),
        above(POCL, "hard to easy"),
    )
    plot = Plot(
        name="exact",
        title="Exact match over eight levels of arithmetic",
        x="step",
        y="exact match, points",
        curves={name: curves(runs, name) for name in (KD, "order only", POCL, "hard to easy")},
    )
    table = level_table(bench, runs, "Exact match of greedy answers at the end, in points, by level")
    return Outcome(findings=findings, tables=(table,), plots=(plot,))


CLAIM = Claim(
    name="pocl",
    title="Easy problems first, in cumulative stages, raise exact match over plain KD",
    build=build,
    arms=arms,
    judge=judge,
)
