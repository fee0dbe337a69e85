"""A smaller teacher that leaves early saves steps; one that stays costs loss (SALT).

Paper: arXiv 2410.18779. A 2.8B student that a 1.5B model teaches for the first 36K of 208K steps comes to the few-shot
    average of plain training in less than 70 % of its steps and ends above it (47.94 against 47.32). Kept throughout,
    the teacher costs more than it gives. What is easy for the small model is learned earlier for its help, what is hard
    is not. SALT_DS, which also chooses the rows of the first part, ends close to SALT.
Set-up: the text setting (text.py). The teacher is smaller than the student (105 against 212 thousand parameters)
    and has read the same text for longer: in 1000 steps of 8 rows, where students take 500. It ends below the label arm
    and above SALT. All arms share student, rows, learning rate and its schedule, and, where the teacher speaks, alpha 1
    (the paper: 0.667; two arms have it) and temperature 1. "In 90 % of the steps" is a run of its own whose schedule
    ends there, taught for as many steps as the whole run: a loss in the middle of a schedule says nothing of one at its
    end. Held-out rows stand in four quarters by the small model's loss.
Arms: labels; SALT to 17 % and to 34 % of the steps; SALT to 34 % in 90 % of the steps; KD throughout; both with alpha
    0.667; SALT_DS to 17 % (half of the rows, the highest salt_median_drop of an early checkpoint); its rows without KD;
    random rows with KD.
Pass: SALT (34 %) has come to the label arm's final loss in 90 % of its steps; KD throughout ends above SALT; before the
    teacher leaves, the easy quarter has gained more over labels than the hard one: each beyond the 95 % interval of
    the paired differences. Labels spread over the seeds by at most 0.03 nats.
Before this set-up (loss of SALT, 34 %, in 90 % of the steps, against the label arm's): small model of 500 steps,
    alpha 0.667: 4.253 against 4.245 (five seeds). 1000 steps, alpha 0.667 (one seed): 4.191 against 4.227, but KD
    throughout 4.146 against SALT's 4.161. 800 steps, alpha 1 (three seeds): 0.023, 0.054 and 0.006 below. 1000 steps,
    alpha 1 (one seed): 4.179, KD throughout 4.310. To leave after 60 or 80 % in place of 34 did not help (one seed).
Cost: 10 arms x 5 seeds of half a minute on one core, three minutes for the small model and its stores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claims.base import Arm, Bench, Claim, Outcome, Plot, Table
from benchmarks.claims.ends import ends_table
from benchmarks.claims.paired import compare, mean_and_sd, steady
from benchmarks.claims.runs import Runs
from benchmarks.claims.text import NEEDS, Model, Shape, Text
from potstill.common.jobs import Job
from potstill.storage import StoreReader

QUARTERS = ("easy", "second", "third", "hard")
SHORT, LONG, STEPS_SHARE = 0.17, 0.34, 0.9
ALPHA, PAPER_ALPHA, ROWS_SHARE = 1.0, 0.667, 0.5
EVALUATIONS = 10
# Told beside the rules: sentence, the better arm, the worse one.
BESIDE = (
    ("SALT (34 %) ends below labels", "salt_34", "labels"),
    ("SALT (17 %) ends below labels", "salt_17", "labels"),
    ("KD throughout ends below labels", "kd", "labels"),
    ("SALT (34 %, alpha 0.667) ends below labels", "salt_34_mixed", "labels"),
    ("SALT (34 %, alpha 0.667) ends below KD throughout (alpha 0.667)", "salt_34_mixed", "kd_mixed"),
    ("SALT_DS ends below SALT (17 %)", "salt_ds", "salt_17"),
    ("SALT_DS ends below its rows without KD", "salt_ds", "ds_rows"),
    ("SALT_DS ends below random rows", "salt_ds", "random_rows"),
)
SMALL = {
    "quick": Model(shape=Shape(32, 1), steps=4, batch_rows=4, lr=8e-3),
    "cpu": Model(shape=Shape(48, 2), steps=1000, batch_rows=8, lr=1.2e-2),
    "gpu": Model(shape=Shape(128, 4), steps=1200, batch_rows=12, lr=4e-3),
}


def build(bench: Bench) -> Iterator[list[Job]]:
    """The text, the small model and its early checkpoint, targets, scores; then the quarters of the held-out rows."""
    text = Text(bench)
    small = SMALL[bench.scale]
    yield [
        *text.stores(),
        *text.language_model("small", small, early=small.steps // 2),
        text.dump("small", "small"),
        text.score("small-early", "small-early"),
        text.score_heldout("small"),
    ]
    yield quarter_jobs(text)


def quarter_jobs(text: Text) -> list[Job]:
    """Cut the held-out rows into quarters by the small model's mean loss; jobs that make a tokens store of each."""
    tokens = StoreReader(text.heldout)
    losses = StoreReader(text.heldout_scores("small")).row_stats["mean_loss"]
    folder = text.folder / "quarters"
    folder.mkdir(exist_ok=True)
    jobs = []
    for name, rows in zip(QUARTERS, np.array_split(np.argsort(losses, kind="stable"), len(QUARTERS)), strict=True):
        path = folder / f"{name}.jsonl"
        found = [json.dumps({"input_ids": row.tokens.tolist()}) for row in tokens.tokens_rows(np.sort(rows))]
        path.write_text("\n".join([*found, ""]), encoding="utf-8")
        jobs.append(text.import_rows(f"quarter-{name}", path, quarter(text, name).parent))
    return jobs


def quarter(text: Text, name: str) -> Path:
    """Tokens store of a quarter of the held-out rows."""
    return text.folder / "quarters" / name / "train"


def arms(bench: Bench) -> dict[str, Arm]:
    """The arms by name."""
    text = Text(bench)
    steps = text.size.student.steps
    taught = {"targets": "teacher", "alpha": ALPHA}
    mixed = {**taught, "alpha": PAPER_ALPHA}
    chosen = {"score": {"kind": "stat", "of": [{"store": "early", "stat": "salt_median_drop"}]}, "share": ROWS_SHARE}
    random = {"score": {"kind": "random"}, "share": ROWS_SHARE}
    short, long = round(SHORT * steps), round(LONG * steps)
    stages: dict[str, list[dict[str, Any]]] = {
        "labels": [{}],
        "salt_17": [{**taught, "until": short}, {}],
        "salt_34": [{**taught, "until": long}, {}],
        "salt_34_in_90": [{**taught, "until": long}, {}],
        "kd": [taught],
        "salt_34_mixed": [{**mixed, "until": long}, {}],
        "kd_mixed": [mixed],
        "salt_ds": [{**taught, "until": short, "rows": {**chosen, "segments": 1}}, {}],
        "ds_rows": [{"until": short, "rows": {**chosen, "segments": 1}}, {}],
        "random_rows": [{**taught, "until": short, "rows": {**random, "segments": 1}}, {}],
    }
    shares = {"salt_34_in_90": STEPS_SHARE}
    return {
        name: Arm(config=_config(text, found, round(shares.get(name, 1.0) * steps))) for name, found in stages.items()
    }


def _config(text: Text, stages: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """A student's run. Rows come from one source; four more name the quarters to measure, and are drawn from never."""
    tokens = str(text.tokens)
    taught = {"targets": {"teacher": str(text.targets("small"))}, "scores": {"early": str(text.scores("small-early"))}}
    sources = {"text": {"tokens": tokens, **taught}}
    sources |= {name: {"tokens": tokens, "heldout": str(quarter(text, name))} for name in QUARTERS}
    stages = [{**stage, "mix": {"text": 1}} for stage in stages]
    return text.config(data={"sources": sources}, curriculum=stages, steps=steps, evaluations=EVALUATIONS)


def judge(bench: Bench, runs: Runs) -> Outcome:
    """Compare the ends, and the quarters at the last evaluation before the teacher leaves."""
    ends = {arm: runs.final(arm) for arm in runs.arms}
    steps = Text(bench).size.student.steps
    gains = _gains(runs)
    taught = {name: [_last(curve, LONG * steps) for curve in curves] for name, curves in gains.items()}
    findings = (
        compare("SALT (34 %) in 90 % of the steps ends below labels", ends["salt_34_in_90"], ends["labels"]),
        compare("SALT (34 %) ends below KD throughout", ends["salt_34"], ends["kd"]),
        compare(
            "the easy quarter gains more than the hard one before the teacher leaves",
            taught["easy"],
            taught["hard"],
            lower_is_better=False,
        ),
        steady("labels", ends["labels"], rule=True),
        *(compare(text, ends[better], ends[worse], rule=False) for text, better, worse in BESIDE),
    )
    shown = ("labels", "salt_17", "salt_34", "kd")
    curves = {arm: [_after_warmup(curve, steps) for curve in runs.curves(arm)] for arm in shown}
    return Outcome(
        findings=findings,
        tables=(
            ends_table("Ends of the arms", runs, dict.fromkeys(runs.arms, "labels")),
            _quarter_table(runs, gains, steps),
        ),
        plots=(
            Plot(name="loss", title="Held-out loss", x="step", y="nats", curves=curves),
            Plot(name="quarters", title="KD below labels, by quarter", x="step", y="nats", curves=gains),
        ),
        notes=(_teacher_note(bench),),
    )


def _gains(runs: Runs) -> dict[str, list[list[tuple[float, float]]]]:
    """How far KD throughout lies below labels at each evaluation, by quarter and seed."""
    found = {}
    for name in QUARTERS:
        pairs = zip(
            runs.curves("labels", f"{name}/heldout_loss"), runs.curves("kd", f"{name}/heldout_loss"), strict=True
        )
        found[name] = [
            [(step, before - after) for (step, before), (_, after) in zip(labels, kd, strict=True)]
            for labels, kd in pairs
        ]
    return found


def _last(curve: list[tuple[float, float]], until: float) -> float:
    """The value at the last evaluation up to a step."""
    return [value for step, value in curve if step <= until][-1]


def _after_warmup(curve: list[tuple[float, float]], steps: int) -> list[tuple[float, float]]:
    """The part of a curve whose differences can be seen: without the first tenth."""
    return [(step, value) for step, value in curve if step > steps / 10]


def _quarter_table(runs: Runs, gains: dict[str, list[list[tuple[float, float]]]], steps: int) -> Table:
    rows = []
    for name in QUARTERS:
        labels = [curve[-1][1] for curve in runs.curves("labels", f"{name}/heldout_loss")]
        at = [[_last(curve, share * steps) for curve in gains[name]] for share in (SHORT, LONG, 1.0)]
        rows.append((name, mean_and_sd(labels), *(mean_and_sd(values) for values in at)))
    header = ("quarter", "labels at the end", f"KD below at {SHORT:.0%}", f"at {LONG:.0%}", "at the end")
    return Table(title="Held-out loss by quarter of the small model's loss", header=header, rows=tuple(rows))


def _teacher_note(bench: Bench) -> str:
    text, small = Text(bench), SMALL[bench.scale]
    return (
        f"The small model ends at a held-out loss of {text.final_loss('small'):.4f} after {small.steps} steps of "
        f"{small.batch_rows} rows; the students take {text.size.student.steps} of {text.size.student.batch_rows}."
    )


CLAIM = Claim(
    name="salt",
    title="A smaller teacher in the place of labels saves steps if it leaves early, and costs loss if it stays",
    build=build,
    arms=arms,
    judge=judge,
    needs=NEEDS,
)
