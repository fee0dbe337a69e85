"""Stored logits of a larger teacher lower the loss, most with alpha on the learning rate's clock (PD).

Paper: arXiv 2410.16215. A 1.9B student of GLM-4-9B, averages of eight sets after fine-tuning: labels 37.7; with the
    learning rate on the schedule WSD (warm-up, stable, decay) labels 38.2, constant alpha 1 39.6, alpha on the clock
    of the learning rate with 0.9 at most 40.7. Divergences at constant alpha 1, cosine: NLL 38.3, KLD 38.7, MSE 34.9.
    Temperature 2: +2.5 %, 1: +1.6 %. Larger students gain more (330M -0.5, 1.9B +0.6, 6.8B +3.1).
Set-up: the text setting (text.py); the teacher is larger than each student and has read other books besides. All arms
    share rows, learning rate and its schedule WSD; students of three widths the same learning rate. Targets are the
    smallest set of mass 0.98, at most 50 entries of 1024, and the tail as a bucket of its own. NLL has no arm: for a
    fixed target it is KLD and the target's entropy, so every gradient, and every run, is the same.
Arms: labels; KLD with alpha 1, and with 0.9; alpha WSD to 0.9 at temperature 1 and 2 (of the teacher, as in the study),
    and with the entries renormalised in place of the tail; MSE of probabilities and of log-probabilities with alpha 1;
    labels and alpha WSD for a narrower and a wider student.
Pass: alpha WSD ends at or below constant alpha 1 (mean), which ends below labels beyond the 95 % interval of the paired
    differences; MSE of probabilities ends last, behind every other arm of its size beyond the interval; the wide
    student gains more from alpha WSD than the narrow one beyond the interval. Labels spread by at most 0.03 nats.
Cost: 12 arms x 5 seeds of half a minute on one core (the wide student a minute), ten minutes for the teacher and its
    targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.claims.base import Arm, Bench, Claim, Finding, Outcome, Plot
from benchmarks.claims.ends import ends_table
from benchmarks.claims.paired import compare, steady
from benchmarks.claims.runs import Runs
from benchmarks.claims.text import NEEDS, WSD, Shape, Text
from potstill.common.jobs import Job
from potstill.common.spread import differences

TEMPERATURE = 2.0  # one of text.SELECTION
# Narrower and wider than the student of the setting.
WIDTHS = {
    "quick": {"narrow": Shape(32, 1), "wide": Shape(64, 1)},
    "cpu": {"narrow": Shape(48, 2), "wide": Shape(96, 3)},
    "gpu": {"narrow": Shape(128, 3), "wide": Shape(384, 4)},
}
ALPHA_WSD = {"kind": "wsd", "start": 0.0, "peak": 0.9, "end": 0.0, "warmup": WSD["warmup"], "decay": WSD["decay"]}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "labels": {},
    "constant_1": {"alpha": 1.0},
    "constant_0.9": {"alpha": 0.9},
    "wsd": {"alpha": ALPHA_WSD},
    "wsd_t2": {"alpha": ALPHA_WSD, "temperature": TEMPERATURE, "temperature_side": "teacher"},
    "wsd_renorm": {"alpha": ALPHA_WSD, "missing_mass": "renorm"},
    "mse_probs": {"alpha": 1.0, "divergence": "mse_probs"},
    "mse_logprobs": {"alpha": 1.0, "divergence": "mse_logprobs"},
}
SIZED = ("labels", "wsd")
# Told beside the rules: sentence, the better arm, the worse one.
BESIDE = (
    ("alpha WSD ends below constant alpha 0.9", "wsd", "constant_0.9"),
    ("alpha WSD ends below labels", "wsd", "labels"),
    ("temperature 2 ends below temperature 1", "wsd_t2", "wsd"),
    ("a tail ends below entries renormalised", "wsd", "wsd_renorm"),
    ("MSE of log-probabilities ends above labels", "labels", "mse_logprobs"),
)


def build(bench: Bench) -> Iterator[list[Job]]:
    """The text, the teacher, and its targets with the tails of temperature 2."""
    text = Text(bench)
    yield [*text.stores(), *text.teacher(), text.dump("teacher", "teacher")]


def arms(bench: Bench) -> dict[str, Arm]:
    """The arms by name; those of other widths are NAME_narrow and NAME_wide."""
    text = Text(bench)
    found = {name: _arm(text, name, text.size.student.shape) for name in OBJECTIVES}
    widths = WIDTHS[bench.scale]
    return found | {f"{name}_{width}": _arm(text, name, shape) for width, shape in widths.items() for name in SIZED}


def _arm(text: Text, name: str, shape: Shape) -> Arm:
    if name == "labels":
        return Arm(config=text.config(shape=shape))
    data = {"targets": {"teacher": str(text.targets("teacher"))}}
    return Arm(
        config=text.config(data=data, curriculum=[{"targets": "teacher"}], objective=OBJECTIVES[name], shape=shape)
    )


def judge(bench: Bench, runs: Runs) -> Outcome:
    """Compare the ends of the arms, and the gains of the widths."""
    ends = {arm: runs.final(arm) for arm in runs.arms}
    gains = {width: differences(ends[f"labels{width}"], ends[f"wsd{width}"]) for width in ("_narrow", "", "_wide")}
    others = [ends[name] for name in OBJECTIVES if not name.startswith("mse")]
    worst = [max(values) for values in zip(*others, strict=True)]
    findings = (
        compare("alpha WSD ends at or below constant alpha 1", ends["wsd"], ends["constant_1"], beyond_interval=False),
        compare("constant alpha 1 ends below labels", ends["constant_1"], ends["labels"]),
        compare("MSE of probabilities ends above the worst of the others", worst, ends["mse_probs"]),
        _wider("the wide student gains more than the narrow one", gains["_wide"], gains["_narrow"]),
        _wider("the wide student gains more than the middle one", gains["_wide"], gains[""], rule=False),
        _wider("the middle student gains more than the narrow one", gains[""], gains["_narrow"], rule=False),
        steady("labels", ends["labels"], rule=True),
        *(compare(text, ends[better], ends[worse], rule=False) for text, better, worse in BESIDE),
    )
    baselines = {
        arm: f"labels{arm[arm.index('_') :]}" if arm.endswith(("_narrow", "_wide")) else "labels" for arm in ends
    }
    shown = ("labels", "constant_1", "constant_0.9", "wsd", "mse_probs")
    text = Text(bench)
    first = 0.2 * text.size.student.steps  # before it all arms fall by nats, and nothing else could be seen
    curves = {arm: [[point for point in curve if point[0] >= first] for curve in runs.curves(arm)] for arm in shown}
    return Outcome(
        findings=findings,
        tables=(ends_table("Ends of the arms", runs, baselines),),
        plots=(Plot(name="loss", title="Held-out loss", x="step", y="nats", curves=curves),),
        notes=(
            f"The teacher ends at a held-out loss of {text.final_loss('teacher'):.4f}.",
            "NLL and KLD differ by the teacher's entropy, which no student moves: their runs are the same.",
        ),
    )


def _wider(text: str, more: list[float], less: list[float], *, rule: bool = True) -> Finding:
    return compare(text, more, less, lower_is_better=False, rule=rule)


CLAIM = Claim(
    name="pd",
    title="stored logits of a larger teacher lower the loss; alpha on the rate's clock does no worse than alpha 1",
    build=build,
    arms=arms,
    judge=judge,
    needs=NEEDS,
)
