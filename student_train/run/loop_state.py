"""What a run carries from step to step and through its checkpoints, apart from weights, optimizer and data order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from potstill.common.errors import UserError
from potstill.student_train.run.spikes import SpikeWindow

STATE_VERSION = 1


@dataclass
class LoopState:
    """Counts since the first step of the run, equal on all ranks."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # real tokens that went through the student, of all ranks; counted at lines of metrics
    skipped: int = 0  # steps whose update was dropped (nan_policy skip), as far as they were looked at
    runtime_seconds: float = 0.0  # of training, without evaluations and saves; counted at lines of metrics
    spikes: SpikeWindow = field(default_factory=SpikeWindow)

    def to_json(self) -> dict[str, Any]:
        """JSON for the checkpoint; a key that was never needed is left out."""
        window = self.spikes
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "runtime_seconds": self.runtime_seconds,
            **({} if window.stage is None else {"spike_stage": window.stage, "recent_losses": list(window.losses)}),
            **({"spikes": window.num_spikes} if window.num_spikes else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LoopState:
        """What `to_json` wrote, also before there was a version. Raises UserError that says what is wrong."""
        version = value.get("version", 1)
        if version != STATE_VERSION:
            raise UserError(
                f"loop state version {version!r}, expected {STATE_VERSION}: it was written by another version of "
                "potstill; continue with that version, or from another checkpoint"
            )
        missing = [key for key in ("step", "tokens", "skipped", "runtime_seconds") if key not in value]
        if missing:
            raise UserError(f"the loop state lacks {', '.join(missing)}; the checkpoint is damaged, take another one")
        return cls(
            step=int(value["step"]),
            tokens=int(value["tokens"]),
            skipped=int(value["skipped"]),
            runtime_seconds=float(value["runtime_seconds"]),
            spikes=SpikeWindow(
                stage=value.get("spike_stage"),
                losses=[float(loss) for loss in value.get("recent_losses", ())],
                num_spikes=int(value.get("spikes", 0)),
            ),
        )
