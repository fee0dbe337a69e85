"""What every engine gives: hidden states before the head, and the head; or logits.

Legend: B lines, L tokens per line, D hidden size, V output rows of the head (padding included).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, device

    from potstill.teacher_dump.batches import TeacherBatch


@dataclass(frozen=True)
class Head:
    """Output layer: logits = soft_cap * tanh(logit_scale * (hidden @ weight.T + bias) / soft_cap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    soft_cap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class TeacherOutput:
    """Exactly one of hidden [M, D] and logits [M, V], at the batch's M target positions, on the engine's device."""

    hidden: Tensor | None = None
    logits: Tensor | None = None


class TeacherEngine(Protocol):
    """A loaded teacher. `forward` may be called from one thread only."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str:
        """Type the weights compute in, e.g. bfloat16."""

    @property
    def device(self) -> device: ...

    @property
    def head(self) -> Head | None:
        """The output layer, or None when `forward` gives logits."""

    @property
    def vocab_size(self) -> int:
        """Output rows, padding included."""

    def forward(self, batch: TeacherBatch) -> TeacherOutput:
        """Run the model over a batch."""

    def idle_pass(self) -> None:
        """Take part in a pass of a group's other ranks; nothing to do for an engine without a group."""
