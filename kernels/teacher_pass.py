"""The teacher's pass over logits as they are given: what goes in, and the table that it fills.

For backends that read raw logits once (teacher_triton.py); the torch way works on padded float32 chunks instead
(teacher_rows.py, tiles.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Rows of TopKTable.figures; then lse_at and log_tail_at, one row for each further temperature.
FIGURES = ("lse", "entropy", "label_logprob", "excluded_mass", "log_tail")


@dataclass(frozen=True)
class TeacherRows:
    """B tokens of a teacher call: raw logits [B, head] (any floating dtype and row stride, unit column stride, never
    written to), labels int64 [B] (-100 none), and what makes z of them. Ids are the columns below vocab_size; further
    temperatures (not 1) are for lse and tails."""

    raw: Tensor
    labels: Tensor
    vocab_size: int
    temperatures: tuple[float, ...]
    soft_cap: float | None
    logit_scale: float


@dataclass(frozen=True)
class TopKTable:
    """The results of N tokens as the passes write them: ids int32 [N, k], logprobs float32 [N, k], label_rank int32
    [N], figures float32 [5 + 2 nT, N] in the order of FIGURES, then lse_at and log_tail_at."""

    ids: Tensor
    logprobs: Tensor
    label_rank: Tensor
    figures: Tensor

    @classmethod
    def empty(cls, num_tokens: int, k: int, num_temperatures: int, device: torch.device) -> "TopKTable":
        def made(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            ids=made(num_tokens, k, dtype=torch.int32),
            logprobs=made(num_tokens, k, dtype=torch.float32),
            label_rank=made(num_tokens, dtype=torch.int32),
            figures=made(len(FIGURES) + 2 * num_temperatures, num_tokens, dtype=torch.float32),
        )

    def narrow(self, start: int, count: int) -> "TopKTable":
        """The same memory for some of the tokens."""
        ids, logprobs, rank = (part.narrow(0, start, count) for part in (self.ids, self.logprobs, self.label_rank))
        return TopKTable(ids, logprobs, rank, self.figures.narrow(1, start, count))

    def columns(self, temperatures: tuple[float, ...]) -> dict[str, Tensor | Mapping[float, Tensor]]:
        """The fields of a TopK by name, all views."""
        rows = self.figures.unbind(0)
        first, number = len(FIGURES), len(temperatures)
        return {
            "ids": self.ids,
            "logprobs": self.logprobs,
            "label_rank": self.label_rank,
            **dict(zip(FIGURES, rows[:first], strict=True)),
            "lse_at": dict(zip(temperatures, rows[first : first + number], strict=True)),
            "log_tail_at": dict(zip(temperatures, rows[first + number :], strict=True)),
        }


class TopKPass(Protocol):
    """Raw logits to the k best ids and every figure of a token, without a wait for the device."""

    def __call__(self, rows: TeacherRows, k: int, out: TopKTable) -> None:
        """Fills `out`. Labels that are no ids below vocab_size: no memory is touched there, label_logprob is NaN."""
        ...

    def row_bytes(self, vocab_size: int, k: int, num_temperatures: int) -> int:
        """Bytes of device memory that a token needs besides its logits and its results."""
        ...
