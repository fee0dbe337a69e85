"""The setting of the claim progressive: sparse parity, learned by small GPT-2s through the store.

An example is a row of random bits, a query token, and the parity of the bits at the support's places: 18 tokens of a
vocabulary of 3, of which the last alone is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from benchmarks.claims.jump import Curve, Ints, Jump, JumpSize, Net

QUERY = 2  # the token behind the bits


@dataclass(frozen=True, kw_only=True)
class ParitySize(JumpSize):
    """Numbers of the setting: how many bits, and the places of those that count."""

    bits: int
    support: tuple[int, ...]


SIZES: dict[str, ParitySize] = {
    "quick": ParitySize(
        bits=4,
        support=(0,),
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
    "cpu": ParitySize(
        bits=16,
        support=(1, 4, 7, 10, 14),
        examples=49_152,
        heldout=1024,
        teacher=Net(heads=8, lr=2e-4),
        student=Net(heads=2, lr=1e-3),
        teacher_seeds=tuple(range(12)),
        teacher_steps=8000,
        save_every=50,
        refresh=500,
        first=1000,
        cap=4500,
        eval_every=100,
        near=0.07,
    ),
}
SIZES["gpu"] = SIZES["cpu"]  # such nets are too small for a GPU to matter


@dataclass(frozen=True)
class Parity(Jump):
    """Sparse parity."""

    name: ClassVar[str] = "parity"
    words: ClassVar[tuple[str, ...]] = ("0", "1", "?")

    @property
    def size(self) -> ParitySize:
        """The numbers of the bench's scale."""
        return SIZES[self.bench.scale]

    @property
    def length(self) -> int:
        """Bits, query, parity."""
        return self.size.bits + 2

    def examples(self, random: np.random.Generator, count: int) -> tuple[Ints, Ints]:
        """Bits, query and parity, of which the parity is trained on."""
        bits = random.integers(0, 2, (count, self.size.bits))
        parity = bits[:, list(self.size.support)].sum(1, keepdims=True) % 2
        ids = np.concatenate([bits, np.full((count, 1), QUERY), parity], axis=1).astype(np.int32)
        mask = np.zeros_like(ids)
        mask[:, -1] = 1
        return ids, mask

    def measured(self, points: Sequence[tuple[int, float]]) -> Curve:
        """From chance to certainty."""
        return Curve(tuple(points), floor=0.5, top=1.0)
