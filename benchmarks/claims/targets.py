"""What to store of a teacher: everything, its best entries, or draws; the order of the Sparse Logit Sampling study.

Paper: Sparse Logit Sampling (arXiv 2503.16870), 3B to 300M: loss of labels 2.81, full KD 2.75, renormalised top-12
    2.87 (worse than no KD), a bucket for the tail 2.77, 50 draws 2.75; calibration error 1.2, 0.7, 4.7, 0.4, 0.8 %.
Set-up: clean English novels, vocabulary 512, rows of 256; teacher 0.38 M parameters, student 0.13 M, 300 steps of 4
    rows: one pass, cosine, alpha 1, so that nothing but what is stored can repair a target. Five stores of one teacher
    over one text. `full` is the most that a store keeps: the best 255 of the 512 ids, and the mass of the others. The
    learning rate is that of `selector`, chosen for labels.
Arms: labels; full; top-p-k (p 0.95, at most 50, with the tail); top-12 renormalised; top-12 with the tail, from the
    same store; 50 draws; 12 draws.
Pass: top-12 renormalised ends with a higher loss and a higher calibration error than full, and than 50 draws, each
    beyond the 95 % interval of its paired differences; 50 draws are not worse than full by more than a tenth of what
    full gains over labels (the study's losses are rounded to a sixth of that); the tail is between: lower in loss than
    renormalised beyond the interval, and full at least as low as the tail.
Cost: 7 arms x 5 seeds x half a minute of one core, three minutes for the teacher, three for its stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.claims.base import Arm, Bench, Claim, Finding, Outcome, Plot, Table
from benchmarks.claims.noisy import NEEDS, Noisy, build_models
from benchmarks.claims.paired import compare, mean_and_sd, steady
from benchmarks.claims.runs import Runs
from benchmarks.claims.stages import store_bytes
from potstill.common.jobs import Job
from potstill.common.spread import Spread, differences
from potstill.storage import StoreReader

MARGIN = 0.1  # of what full gains over labels
STORES = {
    "full": "--mode top_k --k 255",
    "top_p_k": "--mode top_p_k --p 0.95 --k 50",
    "top_12": "--mode top_k --k 12",
    "draws_50": "--mode sample --set selection.num_draws=50",
    "draws_12": "--mode sample --set selection.num_draws=12",
}
FULL, RENORM, TAIL, DRAWS = "full", "top-12 renormalised", "top-12 with tail", "50 draws"
# Arm -> its store, and what the objective says beside alpha.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    FULL: ("full", {"missing_mass": "tail"}),
    "top-p-k": ("top_p_k", {"missing_mass": "tail"}),
    RENORM: ("top_12", {"missing_mass": "renorm"}),
    TAIL: ("top_12", {"missing_mass": "tail"}),
    DRAWS: ("draws_50", {"divergence": "sampled"}),
    "12 draws": ("draws_12", {"divergence": "sampled"}),
}


def build(bench: Bench) -> Iterator[list[Job]]:
    """The teacher and its stores of the clean text."""
    yield from build_models(bench)
    setting = Noisy(bench)
    yield [
        *setting.models(),
        *(setting.stages.dump(name, "clean", "teacher", words) for name, words in STORES.items()),
    ]


def arms(bench: Bench) -> dict[str, Arm]:
    """Labels, and pure KD from each store."""
    setting = Noisy(bench)
    found = {"labels": Arm(config=setting.student("clean"))}
    for name, (store, objective) in ARMS.items():
        found[name] = Arm(config=setting.student("clean", targets=store, objective={"alpha": 1.0, **objective}))
    return found


def findings(runs: Runs) -> tuple[Finding, ...]:
    """The order of the study, in loss and calibration."""
    loss, error = figures(runs)
    margin = MARGIN * max(0.0, Spread.of(differences(loss["labels"], loss[FULL])).mean)
    near: dict[str, Any] = {"margin": margin, "beyond_interval": False}
    within = "within a tenth of the gain over labels"
    return (
        compare(f"{FULL} ends lower than {RENORM}", loss[FULL], loss[RENORM]),
        compare(f"{DRAWS} end lower than {RENORM}", loss[DRAWS], loss[RENORM]),
        compare(f"{FULL} is better calibrated than {RENORM}", error[FULL], error[RENORM], unit="points"),
        compare(f"{DRAWS} are better calibrated than {RENORM}", error[DRAWS], error[RENORM], unit="points"),
        compare(f"{DRAWS} end as low as {FULL}, {within}", loss[DRAWS], loss[FULL], **near),
        compare(f"{TAIL} ends lower than {RENORM}", loss[TAIL], loss[RENORM]),
        compare(f"{FULL} ends as low as {TAIL}", loss[FULL], loss[TAIL], beyond_interval=False),
        steady("labels", loss["labels"]),
        compare(f"{FULL} ends lower than labels", loss[FULL], loss["labels"], rule=False),
        compare(f"labels end lower than {RENORM}", loss["labels"], loss[RENORM], rule=False),
        compare(f"12 draws end as low as {FULL}, {within}", loss["12 draws"], loss[FULL], **near, rule=False),
        compare(f"top-p-k ends as low as {FULL}, {within}", loss["top-p-k"], loss[FULL], **near, rule=False),
    )


def figures(runs: Runs) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Final loss in nats, and calibration error in per cent, of each arm by seed."""
    loss = {name: runs.final(name) for name in runs.arms}
    error = {name: [100 * value for value in runs.final(name, "calibration_error")] for name in runs.arms}
    return loss, error


def judge(bench: Bench, runs: Runs) -> Outcome:
    """Loss, calibration error and bytes of each kind of store."""
    plot = Plot(
        name="loss",
        title="The same teacher, stored in different ways",
        x="step",
        y="held-out loss, nats per token",
        curves={name: [curve[2:] for curve in runs.curves(name)] for name in runs.arms},
    )
    return Outcome(findings=findings(runs), tables=(stores_table(bench, runs),), plots=(plot,))


def stores_table(bench: Bench, runs: Runs) -> Table:
    """A line for each arm: loss, gain, calibration, and what a token of its store takes."""
    stages = Noisy(bench).stages
    loss, error = figures(runs)
    gain = sum(loss["labels"]) - sum(loss[FULL])
    lines = []
    for name in runs.arms:
        size = "-"
        if name in ARMS:
            store = stages.targets(ARMS[name][0])
            size = f"{store_bytes(store) / StoreReader(store).num_tokens:.1f}"
        share = 100 * (sum(loss["labels"]) - sum(loss[name])) / gain
        seconds = mean_and_sd(runs.final(name, "runtime_seconds"), 0)
        lines.append((name, mean_and_sd(loss[name]), f"{share:.0f} %", mean_and_sd(error[name], 2), size, seconds))
    header = ("arm", "loss", "of full's gain", "calibration error, %", "bytes a token", "seconds")
    return Table(title="Held-out clean text at the end", header=header, rows=tuple(lines))


CLAIM = Claim(
    name="targets",
    title="Draws do as well as the whole distribution; the renormalised best twelve do not",
    build=build,
    arms=arms,
    judge=judge,
    needs=NEEDS,
)
