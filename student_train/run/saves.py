"""The checkpoints that one run writes, and which of them is the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.student_train.run.checkpoint import apply_retention, checkpoint_folder, save_checkpoint
from potstill.student_train.run.engine import on_main
from potstill.student_train.run.hooks import Hooks
from potstill.student_train.run.run_base import RunBase


class Saves:
    """Writes checkpoints; `last` is the folder of the newest, which messages name."""

    def __init__(
        self, base: RunBase, *, pinned: dict[str, Any], extra: dict[str, Any], last: str | None, hooks: Hooks
    ) -> None:
        self._base, self._pinned, self._extra, self._hooks = base, pinned, extra, hooks
        self.last = last

    @property
    def is_current(self) -> bool:
        """Whether the last checkpoint is of this very step: writing it again would only put a whole one at risk."""
        folder = checkpoint_folder(self._base.folder, self._base.state.step)
        return self.last is not None and Path(self.last).resolve() == folder.resolve()

    def write(self) -> None:
        """Commit a checkpoint on all ranks (a collective call).

        Raises on all of them CheckpointWriteError, and RunHeldError where another run has taken the folder.
        """
        base = self._base
        on_main(base.topology, base.lock.check)
        folder = save_checkpoint(
            base.engine,
            run=base.folder,
            topology=base.topology,
            state=base.state,
            data=base.legs.state_dict(),
            write_decisions=base.legs.write,
            pinned=self._pinned,
            extra=self._extra,
            last_saved=self.last,
        )
        self.last = str(folder)
        self._hooks.report({"kind": "checkpoint", "step": base.state.step, "checkpoint": self.last})
        if base.topology.is_main:
            apply_retention(base.config.checkpoint, base.folder)
