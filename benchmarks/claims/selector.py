"""Informative examples first: half of the rows, chosen by a small model and the teacher, beside all of them.

Paper: difference sampling (MiniPLM, arXiv 2410.17215): half of the rows, by loss(reference) - loss(teacher); 500M
    students 44.8 in place of 42.2 (average of nine), and plain KD 43.6. Excess loss by token (Rho-1, arXiv
    2404.07965): 16 points few-shot on maths from the best 60 to 70 %. SALT_DS (arXiv 2410.18779): rows by the median
    of the small model's losses at tokens that it can learn.
Set-up: English novels of which 64 % of the tokens are noise, held out is clean text; vocabulary 512, rows of 256. The
    teacher (0.38 M parameters) and a small model (0.08 M) have seen clean text of other books, a reference of 0.08 M
    the noisy text itself, as in MiniPLM. Student 0.13 M, 300 steps of 4 rows: one pass over the text, cosine, alpha
    0.9, forward KL with the tail. Learning rate for labels, in a first pilot of one seed: 6e-3 ends at 4.169, 12e-3 at
    4.289.
Arms: labels; KD on everything; KD on half of the rows: by the difference, by the difference to the small model that
    has seen clean text, by that model's lowest loss and its salt_median_drop, at random; by the difference with a
    share that grows from a half to all; labels on the rows of the difference; KD on half of the tokens of each row:
    by excess loss, by rank of the label, at random, and on the tokens of all the text with an excess loss above 0,
    each with and without the cross-entropy of the others; rows by difference and tokens by excess loss together.
Pass: named beforehand: rows by difference end lower than random rows, and lower than KD on everything, each beyond
    the 95 % interval of its paired differences; and they come to the final loss of KD on everything having read fewer
    targets, in four seeds of five.
Cost: 18 arms x 5 seeds x half a minute of one core, and three minutes for the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims.base import Arm, Bench, Claim, Finding, Outcome, Plot, Table
from benchmarks.claims.noisy import NEEDS, Noisy, build_models
from benchmarks.claims.paired import compare, count, mean_and_sd, most, steady
from benchmarks.claims.runs import Runs
from benchmarks.claims.stages import store_bytes
from benchmarks.claims.what_is_kept import Bools, Floats, auc, loss_difference, noise_of_rows, upper_part, write_masked
from potstill.common.jobs import Job
from potstill.storage import StoreReader

SHARE = 0.5
KD = {"alpha": 0.9, "divergence": "forward_kl", "missing_mass": "tail"}
ALL, NAMED, RANDOM = "KD, all", "rows: difference", "rows: random"
CLEAN_REFERENCE = "rows: difference, clean reference"
EXCESS, RANDOM_TOKENS = "tokens: excess", "tokens: random"
EXCESS_BAND = "tokens: excess above 0"  # of all the text, not of each row; about half of it
CE_KEPT = ", CE on all"
BOTH = "both: difference, excess"
SMALL_LOSS = {"store": "small", "stat": "mean_loss"}
REFERENCE_LOSS = {"store": "reference", "stat": "mean_loss"}
TEACHER_LOSS = {"store": "teacher", "stat": "mean_loss"}
ROWS: dict[str, dict[str, Any]] = {
    NAMED: {"score": {"kind": "difference", "of": [REFERENCE_LOSS, TEACHER_LOSS]}, "keep": "highest"},
    CLEAN_REFERENCE: {"score": {"kind": "difference", "of": [SMALL_LOSS, TEACHER_LOSS]}, "keep": "highest"},
    "rows: low loss": {"score": {"kind": "stat", "of": [SMALL_LOSS]}, "keep": "lowest"},
    "rows: SALT": {
        "score": {"kind": "stat", "of": [{"store": "small", "stat": "salt_median_drop"}]},
        "keep": "highest",
    },
    RANDOM: {"score": {"kind": "random"}},
}
TOKENS: dict[str, dict[str, Any]] = {
    EXCESS: {"policy": "excess_loss", "source": "reference", "reference": "teacher", "share": SHARE},
    EXCESS_BAND: {"policy": "excess_band", "source": "reference", "reference": "teacher", "low": 0.0},
    "tokens: rank": {"policy": "label_rank", "source": "small", "max_rank": 10},
    RANDOM_TOKENS: {"policy": "random", "share": SHARE},
}
# Of these the held-out loss is also told apart: where the excess loss would choose, and where not.
TOLD_APART = ("labels", ALL, NAMED, EXCESS, EXCESS + CE_KEPT, EXCESS_BAND, RANDOM_TOKENS)


def build(bench: Bench) -> Iterator[list[Job]]:
    """Models, the teacher's targets and the small models' scores of the noisy text and of what is held out."""
    yield from build_models(bench)
    setting = Noisy(bench)
    stages = setting.stages
    yield [
        *setting.models(),
        stages.score("small", "noisy", "small"),
        stages.score("reference", "noisy", "reference"),
        stages.dump("noisy", "noisy", "teacher", "--mode top_p_k --p 0.98 --k 64"),
        stages.score("heldout-reference", "heldout", "reference"),
        stages.dump("heldout-teacher", "heldout", "teacher", "--mode top_k --k 1"),
    ]
    differences = loss_difference(stages.scores("heldout-reference"), stages.targets("heldout-teacher"))
    chosen = [upper_part(row, SHARE) for row in differences]
    rest = [np.isfinite(row) & ~mine for row, mine in zip(differences, chosen, strict=True)]
    for name, positions in (("chosen", chosen), ("rest", rest)):
        write_masked(stages.tokens("heldout"), Path(heldout_part(bench, name)), positions)


def heldout_part(bench: Bench, name: str) -> str:
    """The held-out rows with the positions measured that excess loss would choose, or with the others."""
    return str(Noisy(bench).stages.folder / "data" / f"heldout-{name}")


def arms(bench: Bench) -> dict[str, Arm]:
    """Labels, KD on everything, and KD on halves chosen in different ways."""
    setting = Noisy(bench)
    found: dict[str, dict[str, Any]] = {"labels": setting.student("noisy")}

    def kd(name: str, stage: dict[str, Any], **objective: Any) -> None:
        found[name] = setting.student(
            "noisy", targets="noisy", stage=stage, objective={**KD, **objective}, scores=("small", "reference")
        )

    kd(ALL, {})
    for name, rows in ROWS.items():
        kd(name, {"rows": {**rows, "share": SHARE}})
    growing = {"kind": "linear", "start": SHARE, "end": 1.0}
    kd(f"{NAMED}, then all", {"rows": {**ROWS[NAMED], "share": growing, "segments": 8}})
    kd(f"{NAMED}, labels", {"rows": {**ROWS[NAMED], "share": SHARE}}, alpha=0.0)
    for name, tokens in TOKENS.items():
        kd(name, {"tokens": tokens})
        kd(name + CE_KEPT, {"tokens": {**tokens, "applies_to": "kd"}}, off_kd="ce")
    kd(BOTH, {"rows": {**ROWS[NAMED], "share": SHARE}, "tokens": TOKENS[EXCESS]})
    evals = {
        part: (
            "--heldout",
            heldout_part(bench, part),
            "--max-rows",
            str(setting.size.heldout_rows),
            "--num-threads",
            "1",
        )
        for part in ("chosen", "rest")
    }
    return {name: Arm(config=tree, evals=evals if name in TOLD_APART else {}) for name, tree in found.items()}


def findings(bench: Bench, runs: Runs) -> tuple[Finding, ...]:
    """The comparisons of the choice that was named beforehand, and what is told beside."""
    final = {name: runs.final(name) for name in runs.arms}
    last = float(Noisy(bench).size.student.steps)
    fewer = [step is not None and step < last for step in runs.reach(NAMED, final[ALL])]

    def beside(better: str, worse: str) -> Finding:
        return compare(f"{better} ends lower than {worse}", final[better], final[worse], rule=False)

    return (
        compare(f"{NAMED} ends lower than {RANDOM}", final[NAMED], final[RANDOM]),
        compare(f"{NAMED} ends lower than {ALL}", final[NAMED], final[ALL]),
        count(f"{NAMED} comes to the final loss of {ALL} having read fewer targets", fewer, most(len(fewer))),
        steady("labels", final["labels"]),
        beside(ALL, "labels"),
        beside(RANDOM, ALL),
        beside(f"{NAMED}, then all", ALL),
        beside(f"{NAMED}, then all", NAMED),
        beside(f"{NAMED}, labels", "labels"),
        *(beside(name, RANDOM) for name in ROWS if name not in (NAMED, RANDOM)),
        *(beside(name, RANDOM_TOKENS) for name in TOKENS if name != RANDOM_TOKENS),
        *(beside(name + CE_KEPT, RANDOM_TOKENS + CE_KEPT) for name in TOKENS if name != RANDOM_TOKENS),
        beside(EXCESS, ALL),
        beside(EXCESS + CE_KEPT, ALL),
        beside(EXCESS_BAND, ALL),
        beside(EXCESS_BAND, EXCESS),
        beside(BOTH, NAMED),
    )


def judge(bench: Bench, runs: Runs) -> Outcome:
    """Final losses on clean text, targets read to the final loss of KD on everything, and what each choice keeps."""
    shown = ("labels", ALL, NAMED, RANDOM, f"{NAMED}, then all", EXCESS, RANDOM_TOKENS)
    plot = Plot(
        name="loss",
        title="Clean text held out, after training on noisy text",
        x="step",
        y="held-out loss, nats per token",
        curves={name: [curve[2:] for curve in runs.curves(name)] for name in shown},
    )
    tables = (losses_table(bench, runs), apart_table(runs), kept_table(bench))
    return Outcome(findings=findings(bench, runs), tables=tables, plots=(plot,))


def losses_table(bench: Bench, runs: Runs) -> Table:
    """A line for each arm: final loss, when it comes to the final loss of KD on everything, what it reads."""
    final = {name: runs.final(name) for name in runs.arms}
    reach = {name: runs.reach(name, final[ALL]) for name in runs.arms}
    setting = Noisy(bench)
    lm, store = setting.size.student, setting.stages.targets("noisy")
    num_rows = StoreReader(store).num_rows
    bytes_a_row = store_bytes(store) / num_rows
    lines = []
    for name in runs.arms:
        steps = [step for step in reach[name] if step is not None]
        halved = name.startswith(("rows", "both")) and not name.endswith("all")
        different = min(lm.steps * lm.rows, round(SHARE * num_rows) if halved else num_rows)
        has_targets = name != "labels" and not name.endswith(", labels")
        read = different if has_targets else 0
        lines.append(
            (
                name,
                mean_and_sd(final[name]),
                mean_and_sd(runs.final(name, "runtime_seconds"), 0),
                f"{len(steps)} of {len(reach[name])}",
                f"{np.mean(steps):.0f}" if steps else "-",
                f"{np.mean(steps) * lm.rows:.0f}" if steps and has_targets else "-",
                str(read),
                f"{read * bytes_a_row / 1e6:.1f}",
            )
        )
    header = (
        "arm",
        "final loss",
        "seconds",
        "reach KD's",
        "at step",
        "rows of targets read till then",
        "different rows read in all",
        "MB of targets",
    )
    return Table(title=f"Held-out loss of clean text (nats per token), and what was read to reach that of '{ALL}'",
                 header=header, rows=tuple(lines))  # fmt: skip


def apart_table(runs: Runs) -> Table:
    """Why a choice of tokens loses or wins: the loss where it would choose, and where it would not."""
    lines = []
    for name in TOLD_APART:
        parts = [[found["heldout_loss"] for found in runs.evaluated(name, part)] for part in ("chosen", "rest")]
        lines.append((name, *(mean_and_sd(part) for part in parts)))
    title = "Held-out loss where the half of each row with the largest excess loss is, and in the other half"
    return Table(title=title, header=("arm", "chosen", "other"), rows=tuple(lines))


def kept_table(bench: Bench) -> Table:
    """What each choice keeps: noise, how well its score tells clean from noise, clean positions taught in a step."""
    setting = Noisy(bench)
    stages, batch_rows = setting.stages, setting.size.student.rows
    tokenizer = stages.folder / "data" / "teacher" / "tokenizer"
    noise = noise_of_rows(stages.folder / "corpus" / "noisy.jsonl", tokenizer, stages.tokens("noisy"))
    noisy_label = [np.append(row[1:], False) for row in noise]  # of the token that a position predicts
    excess = loss_difference(stages.scores("reference"), stages.targets("noisy"))
    labelled = [np.isfinite(row) for row in excess]

    def line(name: str, score_auc: float | None, rows: Sequence[int], positions: Sequence[Bools]) -> tuple[str, ...]:
        kept = np.concatenate([noisy_label[row][positions[row]] for row in rows])
        clean = batch_rows * float((~kept).sum()) / len(rows)
        return name, f"{100 * kept.mean():.1f} %", "-" if score_auc is None else f"{score_auc:.3f}", f"{clean:.0f}"

    everything = range(len(noise))
    is_clean = np.array([row.mean() for row in noise]) < SHARE
    lines = [line(f"{ALL}; random rows", None, everything, labelled)]
    for name, score in row_scores(bench).items():
        best = np.argsort(-score, kind="stable")[: round(SHARE * len(score))].tolist()
        lines.append(line(name, auc(score, is_clean), best, labelled))
    flat, found = np.concatenate(excess), np.concatenate(labelled)
    by_token = auc(flat[found], ~np.concatenate(noisy_label)[found])
    lines.append(line(EXCESS, by_token, everything, [upper_part(row, SHARE) for row in excess]))
    lines.append(line(EXCESS_BAND, by_token, everything, [row >= 0.0 for row in excess]))
    return Table(title="What is kept: noise, AUC of the score (clean against noise), clean positions taught in a step",
                 header=("choice", "noise", "AUC", "clean positions a step"), rows=tuple(lines))  # fmt: skip


def row_scores(bench: Bench) -> dict[str, Floats]:
    """Score of every row by each choice of rows, the wanted end upwards."""
    stages = Noisy(bench).stages
    small, reference = (StoreReader(stages.scores(name)).row_stats for name in ("small", "reference"))
    teacher = np.asarray(StoreReader(stages.targets("noisy")).row_stats["mean_loss"], np.float64)
    return {
        NAMED: reference["mean_loss"] - teacher,
        CLEAN_REFERENCE: small["mean_loss"] - teacher,
        "rows: low loss": -np.asarray(small["mean_loss"], np.float64),
        "rows: SALT": np.asarray(small["salt_median_drop"], np.float64),
    }


CLAIM = Claim(
    name="selector",
    title="Half of the rows, chosen by a small model and the teacher, beat all of them and a random half",
    build=build,
    arms=arms,
    judge=judge,
    needs=NEEDS,
)
