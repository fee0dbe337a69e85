"""Progressive distillation on a grammar: the teacher's checkpoints teach its sentences sooner than its last one.

Paper: ("Progressive distillation induces an implicit curriculum", arXiv 2410.05464): on probabilistic context-free
grammars students that learn from the teacher's checkpoints end above labels and above the last checkpoint alone: top-1
of BERT after 8000 steps 0.957 by progressive distillation, 0.928 one-shot, 0.926 by labels; the best single checkpoint
to begin with is from early in the teacher's training. The autoregressive runs are trained on the last tokens of spans.

Set-up: (grammar.py) sentences of 32 tokens of three symbols, of which the 16th and the last are trained on: the best
guess from the token before is right in half of them, from the whole sentence before in 0.88. GPT-2s of two layers
with heads of 8. The teacher: 8 heads, learning rate 1e-3, 4000 steps, the first of the seeds 1000, 1001, ... whose
climb is over within 40 % of its steps. Students: 4 heads, 3e-3 (of 1e-3 and 3e-3 the better for labels). The students
take the teacher's best guess alone (temperature 1e-20), as the paper's scripts for grammars do. All else as in
progressive.

Arms: as in progressive; the inside checkpoint is that half way from the guess by the token before to the teacher's
end (on parity at 30 %: there is no jump here, but a climb), learned from for 600 steps.

Pass: as in progressive, where 95 % of sparse parity is 90 % of the way from chance to certainty: inside and series
reach 90 % of the way to the teacher's end in fewer steps than labels and one_shot, each in at least 4 of 5 seeds;
before does not.

Cost: the teacher nine minutes, its eight stores twelve, a student of 2000 steps three and a half, all on one core.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.claims.base import Arm, Bench, Claim, Outcome
from benchmarks.claims.grammar import Grammar
from benchmarks.claims.progressive import curricula, judged
from benchmarks.claims.runs import Runs
from potstill.common.jobs import Job


def build(bench: Bench) -> Iterator[list[Job]]:
    """Sentences, teacher, stores."""
    yield from Grammar(bench).build()


def arms(bench: Bench) -> dict[str, Arm]:
    """The arms by name."""
    return curricula(Grammar(bench))


def judge(bench: Bench, runs: Runs) -> Outcome:
    """Count the seeds."""
    return judged(Grammar(bench), runs, "A grammar")


CLAIM = Claim(
    name="progressive_grammar",
    title="On a grammar, too, a checkpoint from inside the teacher's climb, or the series of them, teaches sooner",
    build=build,
    arms=arms,
    judge=judge,
)
