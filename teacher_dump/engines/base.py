"""What every engine gives: hidden states before the head, logits, or a finished top-k; and the ranks that run it.

Legend: B lines, L tokens per line, M target positions of a batch, D hidden size, V output rows of the head (padding
included), k entries per position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from potstill.teacher_dump.placing import WorkerPlace, worker_place

if TYPE_CHECKING:
    from torch import Tensor, device

    from potstill.kernels.topk import TopK
    from potstill.teacher_dump.batches import TeacherBatch
    from potstill.teacher_dump.job import WorkerSummary


@dataclass(frozen=True)
class Head:
    """Output layer: logits = soft_cap * tanh(logit_scale * (hidden @ weight.T + bias) / soft_cap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    soft_cap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states before the head at the batch's target positions, and the head to apply to them."""

    hidden: Tensor  # [M, D], on the engine's device
    head: Head


@dataclass(frozen=True)
class Logits:
    """The model's own logits at the batch's target positions; -inf rules an id out."""

    logits: Tensor  # [M, V], on the engine's device


@dataclass(frozen=True)
class FinishedTopK:
    """The k best ids at the batch's target positions with all figures of a TopK, as `TopKWanted` asks for them.

    See finished.py for what is checked of it.
    """

    topk: TopK  # [M, k], on the engine's device


TeacherOutput = HiddenStates | Logits | FinishedTopK


@dataclass(frozen=True, kw_only=True)
class TopKWanted:
    """What a finished top-k must hold, the same for every batch of a run."""

    k: int  # at most the vocabulary
    vocab_size: int  # ids at and above it are left out, before anything is normalised
    temperatures: tuple[float, ...]  # besides 1


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
    def vocab_size(self) -> int:
        """Output rows, padding included."""

    def forward(self, batch: TeacherBatch) -> TeacherOutput:
        """Run the model over a batch."""

    def idle_pass(self) -> None:
        """Take part in a pass of the other ranks without rows of one's own; nothing to do for one process."""


@runtime_checkable
class TellsOfItself(Protocol):
    """A TeacherEngine whose parts are only known when it is loaded, and that counts its own speed."""

    def notes(self) -> Mapping[str, Any]:
        """What it runs, for the record of each unit; plain values."""

    def speed(self) -> str:
        """Its speed so far, in words for the log."""


class Ranks(Protocol):
    """The ranks that hold one teacher together. Every method but `place` is a collective call of theirs."""

    @property
    def world(self) -> int:
        """How many of them have units of their own."""

    @property
    def in_step(self) -> bool:
        """Whether all of them must run the same number of passes, so that none may skip a unit."""

    def run(self, work: Callable[[], WorkerSummary]) -> WorkerSummary:
        """A worker's whole work, on each rank that has units of its own; the others are there for them meanwhile."""

    def place(self, worker: int | None, num_workers: int | None) -> WorkerPlace:
        """This rank's share of the units; the arguments say which worker of how many the ranks are together."""

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""

    def agree_to_stop(self, reason: str | None) -> str | None:
        """The reason to stop at this pass, the same decision on all ranks; None to go on."""

    def barrier(self) -> None:
        """Wait for all ranks."""


class OneProcess:
    """See Ranks. A teacher that this process holds alone: there is nobody to agree with."""

    world = 1
    in_step = False

    def run(self, work: Callable[[], WorkerSummary]) -> WorkerSummary:
        return work()

    def place(self, worker: int | None, num_workers: int | None) -> WorkerPlace:
        return worker_place(worker, num_workers)

    def largest(self, value: int) -> int:
        return value

    def agree_to_stop(self, reason: str | None) -> str | None:
        return reason

    def barrier(self) -> None:
        pass
