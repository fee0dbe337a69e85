"""The setting of the claim progressive_grammar: sentences of a probabilistic context-free grammar.

The grammar is one of Allen-Zhu and Li's make (cfg3, arXiv 2305.13673), small: each symbol of a level has as many
equally likely rules, each of two symbols of the next level, and no two rules of a level are alike. A sentence of five
levels is 32 tokens behind a beginning. As in the paper's autoregressive runs, the last token alone of the spans of
one level is trained on. The grammar is draw 10: the first in which the whole sentence before such a token says at
least 0.15 more of it (share of best guesses that are right: 0.88) than the seven tokens before it do (0.68; the one
before: 0.50).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from benchmarks.claims.jump import Curve, Ints, Jump, JumpSize, Net

LAST = 10  # so many of the teacher's last evaluations are its end


@dataclass(frozen=True, kw_only=True)
class GrammarSize(JumpSize):
    """Numbers of the setting: levels of rules, rules of a symbol, the draw of the grammar, tokens of a trained span."""

    levels: int
    rules: int
    draw: int
    span: int


SIZES: dict[str, GrammarSize] = {
    "quick": GrammarSize(
        levels=2,
        rules=2,
        draw=10,
        span=2,
        examples=512,
        heldout=64,
        teacher=Net(heads=2, lr=3e-3),
        student=Net(heads=1, lr=3e-3),
        teacher_seeds=(0,),
        teacher_steps=200,
        save_every=10,
        refresh=20,
        first=20,
        cap=60,
        eval_every=20,
        near=0.5,
    ),
    "cpu": GrammarSize(
        levels=5,
        rules=2,
        draw=10,
        span=16,
        examples=65_536,
        heldout=2048,
        teacher=Net(heads=8, lr=1e-3, layers=2),
        student=Net(heads=4, lr=3e-3, layers=2),
        teacher_seeds=tuple(range(4)),
        teacher_steps=4000,
        save_every=50,
        refresh=250,
        first=600,
        cap=2000,
        eval_every=100,
        near=0.04,
        batch_rows=16,
        examples_in_row=4,
    ),
}
SIZES["gpu"] = SIZES["cpu"]  # such nets are too small for a GPU to matter


@dataclass(frozen=True)
class Grammar(Jump):
    """A grammar of three symbols a level."""

    name: ClassVar[str] = "grammar"
    words: ClassVar[tuple[str, ...]] = ("a", "b", "c", "^")
    # The teacher's best guess alone, as in the paper's scripts for grammars.
    objective: ClassVar[dict[str, Any]] = {"temperature": 1e-20, "missing_mass": "renorm"}

    @property
    def size(self) -> GrammarSize:
        """The numbers of the bench's scale."""
        return SIZES[self.bench.scale]

    @property
    def length(self) -> int:
        """The beginning and the sentence."""
        return 1 + 2**self.size.levels

    @cached_property
    def rules(self) -> list[Ints]:
        """For each level [symbols, rules, 2]: what a symbol may become. Of the first level there is one symbol."""
        random, symbols = np.random.default_rng(self.size.draw), len(self.words) - 1
        levels = []
        for level in range(self.size.levels):
            above = symbols if level else 1
            pairs: list[list[int]] = []
            while len(pairs) < above * self.size.rules:
                pair = random.integers(0, symbols, 2).tolist()
                pairs += [pair] if pair not in pairs else []
            levels.append(np.array(pairs, np.int32).reshape(above, self.size.rules, 2))
        return levels

    def examples(self, random: np.random.Generator, count: int) -> tuple[Ints, Ints]:
        """Sentences behind the beginning; the last token of each span is trained on."""
        sentence = np.zeros((count, 1), int)
        for rules in self.rules:
            chosen = random.integers(0, self.size.rules, sentence.shape)
            sentence = rules[sentence, chosen].reshape(count, -1)
        start = np.full((count, 1), len(self.words) - 1)
        ids = np.concatenate([start, sentence], axis=1).astype(np.int32)
        mask = np.zeros_like(ids)
        mask[:, self.size.span :: self.size.span] = 1
        return ids, mask

    @cached_property
    def floor(self) -> float:
        """What the best guess from the token before scores on 20,000 sentences of its own."""
        ids, mask = self.examples(np.random.Generator(np.random.Philox(8)), 20_000)
        counts = np.zeros((len(self.words), len(self.words)))
        trained = mask[:, 1:] == 1
        np.add.at(counts, (ids[:, :-1][trained], ids[:, 1:][trained]), 1)
        return float(counts.max(1).sum() / counts.sum())

    def measured(self, points: Sequence[tuple[int, float]]) -> Curve:
        """From what the token before says to the teacher's last evaluations."""
        last = [accuracy for _, accuracy in points[-LAST:]]
        return Curve(tuple(points), floor=self.floor, top=float(np.mean(last)) if last else 1.0, middle=0.5)
