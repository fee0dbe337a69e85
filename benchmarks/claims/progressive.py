"""Progressive distillation: a checkpoint from inside the teacher's jump teaches what the last one hides.

Paper: ("Progressive distillation induces an implicit curriculum", arXiv 2410.05464): on sparse parity a
student that learns from the teacher's intermediate checkpoints, or from one of them and then the last, needs fewer
steps than from labels or from the last checkpoint alone, if the one is from inside the teacher's phase transition;
one from before it does not help. With transformers the progressive student jumps at 3.5M examples; labels and
one-shot are near 0.5 at 8M.

Set-up: (parity.py; a grammar has progressive_grammar) rows of 16 bits, support 5, loss on the parity alone; GPT-2s
of one layer with heads of 8. The teacher: 8 heads, learning rate 2e-4, 8000 steps, the first of the seeds 1000, 1001,
... whose jump is over within 40 % of its steps (not every one jumps) and has a checkpoint of accuracy 0.58 to 0.72,
of one each 50 steps. Students: 2 heads, 1e-3. Adam (0.9, 0.95), constant rate after 100 steps, batches of 64 examples,
initial weights by width. KD alone where there is a teacher (alpha 1, T 1).

Arms: labels; the last checkpoint (one_shot); the series on the teacher's own clock (series: speed 1, refresh
about 500 steps, so laid that the inside checkpoint is one of them: a student needs some hundred steps of it. Chosen
after a pilot, in which a series of refresh 100 was sooner than labels in two seeds of five alone: docs/log.md); 1000
steps from the checkpoint of the jump whose accuracy is nearest to 0.65, then the last (inside); 1000 steps from the
one half way to where the jump begins, then the last (before, the control).

Pass: inside and series reach 95 % held-out accuracy in fewer steps than labels and one_shot, each in at least 4
of 5 seeds; before does not. Who never reaches it within the cap is slower than any who does.

Cost: the teacher 3 minutes, its stores 4, a student of 4500 steps three, all on one core.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.claims.base import Arm, Bench, Claim, Finding, Outcome, Plot, Table
from benchmarks.claims.jump import Jump
from benchmarks.claims.paired import count, mean_and_sd, most, written
from benchmarks.claims.parity import Parity
from benchmarks.claims.runs import Runs
from potstill.common.jobs import Job

FIGURE = "accuracy"  # one position of a row's example is trained on: the share of right answers
PLAIN = ("labels", "one_shot")


def build(bench: Bench) -> Iterator[list[Job]]:
    """Examples, teacher, stores."""
    yield from Parity(bench).build()


def arms(bench: Bench) -> dict[str, Arm]:
    """The arms by name."""
    return curricula(Parity(bench))


def judge(bench: Bench, runs: Runs) -> Outcome:
    """Count the seeds."""
    return judged(Parity(bench), runs, "Sparse parity")


def curricula(setting: Jump) -> dict[str, Arm]:
    """The arms of a setting by name; they differ in the curriculum alone."""
    size, last = setting.size, setting.size.teacher_steps
    targets = {f"t{step}": str(setting.targets(step)) for step in {*setting.series, setting.inside, setting.before}}

    def arm(*stages: dict[str, Any], stores: Sequence[int] = ()) -> Arm:
        tree = setting.run_tree(size.student, steps=size.cap, every=size.eval_every)
        tree["run"]["name"] = "progressive"
        tree["checkpoint"] = {"keep_last": 1}
        tree["objective"] = {"alpha": 1.0, "temperature_side": "teacher", **setting.objective}
        tree["data"]["targets"] = {f"t{step}": targets[f"t{step}"] for step in sorted(set(stores))}
        return Arm(config={**tree, "curriculum": list(stages)})

    def first_then_last(step: int) -> Arm:
        first = {"name": "first", "until": size.first, "targets": f"t{step}"}
        return arm(first, {"name": "last", "targets": f"t{last}"}, stores=(step, last))

    clock = {"prefix": "t", "refresh": setting.refresh, "speed": 1.0}
    return {
        "labels": arm({"name": "labels"}),
        "one_shot": arm({"name": "last", "targets": f"t{last}"}, stores=(last,)),
        "series": arm({"name": "series", "targets_clock": clock}, stores=setting.series),
        "inside": first_then_last(setting.inside),
        "before": first_then_last(setting.before),
    }


def sooner(one: float | None, other: float | None) -> bool:
    """Whether the first reached the goal, and the second later or never."""
    return one is not None and (other is None or one < other)


def beats(steps: dict[str, list[float | None]], arm: str) -> list[bool]:
    """By seed, whether an arm reaches the goal sooner than both plain arms."""
    return [all(sooner(own, steps[other][number]) for other in PLAIN) for number, own in enumerate(steps[arm])]


def judged(setting: Jump, runs: Runs, title: str) -> Outcome:
    """Count the seeds in which an arm comes to the setting's goal sooner; beside it wall time and bytes."""
    bench, goals = setting.bench, [setting.goal] * len(setting.bench.seeds)
    goal = f"{100 * setting.goal:.0f} %"
    steps = {arm: runs.reach(arm, goals, FIGURE, falling=False) for arm in runs.arms}
    seconds = {arm: runs.reach(arm, goals, FIGURE, x="runtime_seconds", falling=False) for arm in runs.arms}
    needed = most(len(bench.seeds))
    control = beats(steps, "before")
    against_control = [sooner(a, b) for a, b in zip(steps["inside"], steps["before"], strict=True)]
    than = f"sooner at {goal} than labels and the last alone"
    findings = (
        count(f"inside the jump, then the last: {than}", beats(steps, "inside"), needed),
        count(f"the series on the teacher's clock: {than}", beats(steps, "series"), needed),
        Finding(
            text=f"before the jump, then the last: sooner than both in fewer than {needed} of {len(control)} seeds",
            passed=sum(control) < needed,
            effect=float(sum(control)),
            unit="seeds",
            values=tuple(float(value) for value in control),
        ),
        count("inside the jump: sooner than before it", against_control, needed, rule=False),
    )
    seeds = tuple(f"seed {seed}" for seed in bench.seeds)
    teacher = setting.curve(setting.teacher)
    return Outcome(
        findings=findings,
        tables=(
            Table(title=f"Steps to {goal} held-out accuracy (of {setting.size.cap})", header=("arm", *seeds),
                  rows=tuple((arm, *written(found, 0)) for arm, found in steps.items())),
            Table(title="Seconds of training to it, without evaluations", header=("arm", *seeds),
                  rows=tuple((arm, *written(found, 1)) for arm, found in seconds.items())),
            Table(title=f"Held-out accuracy at step {setting.size.cap}, over the seeds", header=("arm", "accuracy"),
                  rows=tuple((arm, mean_and_sd(runs.final(arm, FIGURE))) for arm in runs.arms)),
            Table(title="Stores that an arm learns from", header=("arm", "stores", "bytes"),
                  rows=tuple((arm, *_stores(runs, arm)) for arm in runs.arms)),
        ),
        plots=(
            Plot(name="progressive", title=f"{title}: accuracy of the students", x="step", y=FIGURE,
                 curves={arm: runs.curves(arm, FIGURE) for arm in runs.arms}),
            Plot(name="progressive_teacher", title=f"{title}: the teacher's jump", x="step of the teacher",
                 y=FIGURE, curves={"teacher": [[(float(step), value) for step, value in teacher.points]]}),
        ),
        notes=(
            f"Teacher: seed {1000 + setting.teacher}; its jump begins after step {teacher.begins}, learned from step "
            f"{teacher.learned} on, trained to {setting.size.teacher_steps}. Inside: step {setting.inside}; before: "
            f"step {setting.before}; series: {', '.join(map(str, setting.series))}.",
        ),
    )  # fmt: skip


def _stores(runs: Runs, arm: str) -> tuple[str, str]:
    """How many targets stores an arm names, and their bytes."""
    from pathlib import Path

    places = runs.arms[arm].config["data"]["targets"].values()
    sizes = [file.stat().st_size for place in places for file in Path(place).rglob("*") if file.is_file()]
    return str(len(places)), f"{sum(sizes):,}"


CLAIM = Claim(
    name="progressive",
    title="A checkpoint from inside the teacher's jump, or the series of them, teaches sooner than labels or the last",
    build=build,
    arms=arms,
    judge=judge,
)
