"""A student that starts from a part of its teacher's weights ends below one that starts from random weights.

Paper: Minitron (arXiv 2407.14679): pruning a trained model and distilling its logits takes up to 40 times fewer tokens
    than training from random weights; KD alone beats the label loss for such a start; cutting width beats cutting
    depth once it is trained. Ministral 3 (arXiv 2601.08584) makes a family of models so.
Set-up: the novels of the text setting in rows of 128 tokens; its teacher (4 layers of 128) cut once by `potstill prune`
    on 128 rows: by width to half the channels, neurons and heads, and by depth to half the layers. Random starts have
    the same two shapes, with initial weights by width. All arms: the student's steps, rows, learning rate and WSD
    schedule, forward KL at temperature 1 with the tail, alpha 1 for KD and 0 for labels. Seeds differ in the order of
    the rows and, where the start is random, in the weights.
Arms: pruned and random, width and depth, KD and labels: eight.
Pass: for width and for depth: pruned with KD ends below random with KD, and below pruned with labels, each beyond the
    95 % interval of the paired differences.
Beside the rule: tokens after which the pruned start with KD has come to what the random one ends at; width against
    depth (the shapes differ in parameters: the table has them); the order after KD against the order before it.
Cost: 8 arms x 5 seeds of half a minute on one core; the teacher's five minutes are those of the other claims on text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.claims.base import Arm, Bench, Claim, Outcome, Plot, Table
from benchmarks.claims.ends import ends_table
from benchmarks.claims.paired import compare, mean_and_sd, written
from benchmarks.claims.runs import Runs
from benchmarks.claims.text import NEEDS, Shape, Text
from potstill.common.jobs import Job

TEACHER = "teacher"
CUTS = ("width", "depth")
EVALUATIONS = 20


def shape_of(text: Text, cut: str) -> Shape:
    """Of the student: as wide as the setting's students and as deep as the teacher, or half as deep and as wide."""
    teacher = text.size.teacher.shape
    if cut == "width":
        return Shape(text.size.student.shape.hidden, teacher.layers)
    return Shape(teacher.hidden, max(1, teacher.layers // 2))


def prune_job(text: Text, cut: str) -> Job:
    """`potstill prune` of the teacher to the shape, on rows of the students' text."""
    sizes = shape_of(text, cut).config(row_length=text.size.row_length)
    output = text.model(f"pruned-{cut}")
    words = ["prune", "--model", text.model(TEACHER), "--tokens", text.tokens, "--output", output, "--no-check"]
    words += ["--num-layers", sizes["num_hidden_layers"], "--hidden-size", sizes["hidden_size"]]
    words += ["--intermediate-size", sizes["intermediate_size"], "--num-heads", sizes["num_attention_heads"]]
    words += ["--set", "num_threads=1"]
    return Job(
        name=f"prune-{cut}",
        command=("potstill", *map(str, words)),
        needs=(f"export-{TEACHER}",),
        is_done=(output / "config.json").is_file,
    )


def build(bench: Bench) -> Iterator[list[Job]]:
    """Text, teacher, its targets, and its two cuts."""
    text = Text(bench)
    made = [*text.stores(), *text.teacher(), text.dump(TEACHER, TEACHER)]
    yield [*made, *(prune_job(text, cut) for cut in CUTS)]


def arms(bench: Bench) -> dict[str, Arm]:
    """Each start with each loss, for each shape; all share the rest."""
    text = Text(bench)
    found = {}
    for cut in CUTS:
        shape = shape_of(text, cut)
        for start in ("pruned", "random"):
            for loss, objective in (("KD", {"alpha": 1.0, "ce_weight": 0.0}), ("labels", {"alpha": 0.0})):
                distils = loss == "KD"
                tree = text.config(
                    data={"targets": {TEACHER: str(text.targets(TEACHER))}} if distils else None,
                    curriculum=[{"targets": TEACHER} if distils else {}],
                    objective=objective,
                    shape=shape,
                    evaluations=EVALUATIONS,
                )
                if start == "pruned":
                    tree["model"] = {"path": str(text.model(f"pruned-{cut}"))}
                found[f"{start} {cut}, {loss}"] = Arm(config=tree)
    return found


def judge(bench: Bench, runs: Runs) -> Outcome:
    """The end of each arm, and how soon the pruned starts come to where the random ones end."""
    final = {name: runs.final(name) for name in runs.arms}
    findings = []
    for cut in CUTS:
        ours, theirs, labels = f"pruned {cut}, KD", f"random {cut}, KD", f"pruned {cut}, labels"
        findings += [
            compare(f"KD from weights pruned by {cut} ends below KD from random ones", final[ours], final[theirs]),
            compare(f"KD from weights pruned by {cut} ends below labels from the same", final[ours], final[labels]),
            compare(
                f"labels from weights pruned by {cut} end below labels from random ones",
                final[labels],
                final[f"random {cut}, labels"],
                rule=False,
            ),
        ]
    width, depth = final["pruned width, KD"], final["pruned depth, KD"]
    findings.append(compare("width ends below depth, both pruned and distilled", width, depth, rule=False))
    plots = [
        Plot(
            name=cut,
            title=f"Starts pruned by {cut}, and random ones of that shape",
            x="step",
            y="held-out loss, nats per token",
            curves={name: runs.curves(name) for name in runs.arms if _cut_of(name) == cut},
        )
        for cut in CUTS
    ]
    labels_of = {name: f"random {_cut_of(name)}, labels" for name in runs.arms}
    price = ends_table("Price; labels are those from random weights of the shape", runs, labels_of)
    return Outcome(findings=tuple(findings), tables=(_ends(runs, final), price, _cuts(bench)), plots=tuple(plots))


def _cut_of(arm: str) -> str:
    return next(cut for cut in CUTS if f" {cut}," in arm)


def _ends(runs: Runs, final: dict[str, list[float]]) -> Table:
    """A line for each arm: its end, and the steps to the end of KD from random weights of its shape."""
    rows = []
    for name, losses in final.items():
        reached = runs.reach(name, final[f"random {_cut_of(name)}, KD"])
        rows.append((name, mean_and_sd(losses), "/".join(written(reached, 0))))
    header = ("arm", "held-out loss", "steps to the end of KD from random weights, by seed")
    return Table(title="At equal tokens", header=header, rows=tuple(rows))


def _cuts(bench: Bench) -> Table:
    """What was cut, and the loss before any training."""
    text, rows = Text(bench), []
    for cut in CUTS:
        record: dict[str, Any] = json.loads((text.model(f"pruned-{cut}") / "potstill_prune.json").read_text())
        for name in ("whole", "pruned") if cut == CUTS[0] else ("pruned",):
            sizes = record[name]
            shape = f"{sizes['num_layers']} x {sizes['hidden_size']}, {sizes['num_heads']} heads"
            told = "the teacher" if name == "whole" else f"pruned by {cut}"
            rows.append((told, shape, f"{sizes['num_parameters']:,}", f"{sizes['loss']:.4f}"))
    header = ("model", "layers x channels", "parameters", "loss on the calibration rows, untrained")
    return Table(title="The cuts", header=header, rows=tuple(rows))


CLAIM = Claim(
    name="pruned",
    title="A start from the teacher's pruned weights, distilled, beats a random start and beats labels",
    build=build,
    arms=arms,
    judge=judge,
    needs=NEEDS,
)
