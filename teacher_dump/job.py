"""What `dump` and `score` differ in, and what a worker of either tells when it is done or was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.common.progress import format_seconds
from potstill.storage import KBound, RunSpec, StoreReader, StoreWriter
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.left_out import LeftOut
from potstill.teacher_dump.pipeline import HostResult

if TYPE_CHECKING:
    from potstill.teacher_dump.engines.base import TeacherEngine, TopKWanted


class StoppedError(UserError):
    """A signal ended the worker before its share was done; what is committed is safe."""

    def __init__(self, message: str, signal_name: str = "") -> None:
        super().__init__(message, signal_name)
        self.signal_name = signal_name  # SIGTERM, SIGUSR1; something else where another rank of a group was asked

    def __str__(self) -> str:
        return str(self.args[0])


class Job(Protocol):
    """What `dump` and `score` differ in."""

    word: str
    mixes: ClassVar[bool] = True  # whether its units may be those of several engines: they are made by one forward pass

    def spec(self, tokens: StoreReader, teacher: dict[str, object]) -> RunSpec:
        """run.json of the store to write."""

    def id_frequencies(self, tokens: StoreReader) -> NDArray[np.int64] | None:
        """Occurrences [V] by which the store ranks its ids; None where it keeps them as they are."""
        return None

    def left_out(self, spec: RunSpec) -> LeftOut | None:
        """Which rows the model is not run over; None where it is run over all."""
        return None

    def wanted(self, vocab_size: int) -> TopKWanted | None:
        """What an engine that gives a finished top-k must put into it; None where draws are made."""

    def compute(self, engine: TeacherEngine, batch: TeacherBatch, vocab_size: int) -> HostResult:
        """Run the model over a batch; the result finishes in another thread."""

    def beside(self, tokens: StoreReader) -> StoreWriter | None:
        """The writer of a second store, of the same units, that comes of the same work; None: there is none."""
        return None

    def k_bound(self, figures: Mapping[str, float]) -> KBound | None:
        """How often the selection stopped at k, from the sums of `BatchRows`; None where it has no such bound."""
        return None


@dataclass(frozen=True)
class WorkerSummary:
    """What a worker did, and how the store stands after it."""

    path: str
    word: str
    worker: int
    num_workers: int
    units: int
    rows: int
    tokens: int
    refused_rows: tuple[int, ...]
    excluded_mass: float  # mean softmax mass on ids that no tokenizer entry has
    seconds: float
    stage_seconds: Mapping[str, float]
    num_missing: int  # units of the whole store
    sealed: bool
    bytes_per_token: float | None  # of the sealed store, else of this worker's last unit
    k_bound: KBound | None  # over this worker's rows

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def format(self) -> str:
        """A few lines for a person."""
        lines = [
            f"{self.word}: worker {self.worker} of {self.num_workers} did {self.units} units, {self.rows} rows, "
            f"{self.tokens} tokens in {format_seconds(self.seconds)} ({self.tokens_per_second:,.0f} tokens/s)"
            f" -> {self.path}"
        ]
        if self.k_bound is not None:
            lines.append(self.k_bound.describe(self.bytes_per_token))
        elif self.bytes_per_token is not None:
            lines.append(f"{self.bytes_per_token:.1f} B/token")
        if self.refused_rows:
            lines.append(
                f"refused rows, stored without targets: {len(self.refused_rows)} {list(self.refused_rows[:10])}"
            )
        if self.excluded_mass > 0:
            lines.append(f"mean mass on ids beyond the tokenizer, left out: {self.excluded_mass:.2g}")
        if self.sealed:
            lines.append("the store is complete and sealed")
        elif self.num_missing:
            lines.append(f"{self.num_missing} units are still missing; run again, or wait for the other workers")
        else:
            lines.append(f"the store is complete; seal it with: potstill seal {self.path}")
        return "\n".join(lines)
