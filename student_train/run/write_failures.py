"""A disk that takes no more: the failure is noted on its rank, every rank learns of it, one error says what to do.

A rank that raises alone in the middle of a save leaves the others waiting in the next collective call, under NCCL until
the group's time-out. So failures of writing are held back until all ranks have come to the same place.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.student_train.run.engine import Topology, gather_objects

# What torch 2.13's writers say of a failed write: the zip writer, which loses the system's reason ("unexpected pos 640
# vs 598"), its stream, and the writer of the older format ("write(): fd 3 failed with No space left on device").
_TORCH_WRITERS = ("inline_container.cc", "iostream error", "write(): fd")
_PROBE_BYTES = 1 << 16
ROOM = "make room there (or raise the quota, or the limit on file sizes)"


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; the message names step, folder, cause, and the checkpoint that stands."""


def is_write_failure(error: BaseException) -> bool:
    """Whether this is what a failed write of ours, DeepSpeed's or torch's raises. Anything else is not for us."""
    return isinstance(error, OSError) or (
        type(error) is RuntimeError and any(sign in str(error) for sign in _TORCH_WRITERS)
    )


def describe(error: BaseException, folder: Path) -> str:
    """The failure in words: the system's own for an OSError, else torch's and what the system says to a small write."""
    if isinstance(error, OSError):
        return str(error)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
        found = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free there"
    except OSError as now:
        found = str(now)
    return f"{found} (torch: {' '.join(str(error).split())[:200]})"


@dataclass
class SharedSave:
    """One save by all ranks, in parts; after each part all ranks go on, or all raise CheckpointWriteError."""

    folder: Path
    step: int
    topology: Topology
    last_saved: str | None
    written: list[str] = field(default_factory=list)  # names of the files that DeepSpeed wrote on this rank

    @contextmanager
    def part(self) -> Iterator[None]:
        """Work without collective calls; a failed write in it is raised behind it, on all ranks."""
        failure: BaseException | None = None
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not is_write_failure(error):
                raise
            failure = error
        self._agree(failure)

    @contextmanager
    def deepspeed_part(self, engine: Any) -> Iterator[None]:
        """DeepSpeed's own save: its two writers note their failure, so that its collective calls all take place."""
        failures: list[BaseException] = []

        def noting(write: Callable[..., object]) -> Callable[..., None]:
            def write_or_note(*args: Any, **options: Any) -> None:
                if failures:
                    return  # the checkpoint is lost; no more bytes onto a full disk
                try:
                    write(*args, **options)
                except (OSError, RuntimeError) as error:
                    if not is_write_failure(error):
                        raise
                    failures.append(error)

            return write_or_note

        writer = engine.checkpoint_engine
        save = writer.save

        def save_and_list(state_dict: Any, path: str) -> None:
            save(state_dict, path)
            self.written.append(Path(path).resolve().relative_to(self.folder.resolve()).as_posix())

        writer.save, engine._copy_recovery_script = noting(save_and_list), noting(engine._copy_recovery_script)
        try:
            yield
        finally:
            del writer.save, engine._copy_recovery_script
        self._agree(failures[0] if failures else None)

    def _agree(self, failure: BaseException | None) -> None:
        """Tell all ranks what failed on this one. Raises CheckpointWriteError on all if it failed on any."""
        told = gather_objects(None if failure is None else describe(failure, self.folder))
        if not any(told):
            return
        if self.topology.is_main:
            # It has no manifest, so it counts for nothing; what it holds may be the bytes that are missing.
            shutil.rmtree(self.folder, ignore_errors=True)
        causes = "; ".join(f"rank {rank}: {cause}" for rank, cause in enumerate(told) if cause is not None)
        stands = f"the checkpoint that stands is {self.last_saved}" if self.last_saved else "no checkpoint stands"
        raise CheckpointWriteError(
            f"step {self.step}: the checkpoint {self.folder} could not be written. {causes}. What was written of it "
            f"is deleted; {stands}. Please {ROOM} and start the same command again: it continues from "
            f"{'that checkpoint' if self.last_saved else 'the start'}"
        ) from failure
