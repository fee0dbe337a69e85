"""What an actor of `potstill dump --ray` runs. Its arguments are plain data, of which every node makes its own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from potstill.teacher_dump.unit_worker import UnitDone, UnitFailed, UnitWorker


class TeacherActor:
    """A teacher in a process of the cluster. Made at once; `open` loads.

    `folder` is where the command was given: relative paths begin there on every node that has it.
    """

    def __init__(self, config: Mapping[str, Any], rows: NDArray[np.int64] | None, *, folder: str) -> None:
        self._config, self._rows, self._folder = config, rows, folder
        self._worker: UnitWorker | None = None

    def open(self) -> tuple[str, str]:
        """Open the stores and load the teacher; returns Ray's id of the node, and a name for messages.

        Raises UserError and StoreError, for instance where a path is not to be seen on this node.
        """
        import logging

        import ray
        from transformers.utils.logging import disable_progress_bar

        from potstill.common.log import setup_logging
        from potstill.teacher_dump.config import DumpConfig
        from potstill.teacher_dump.dumping import DumpJob
        from potstill.teacher_dump.unit_worker import UnitWorker

        # The driver has what happens in view; of an actor it hears what is wrong.
        setup_logging(level=logging.WARNING)
        disable_progress_bar()
        if os.path.isdir(self._folder):  # where it is not, absolute paths and URLs are all that can be meant
            os.chdir(self._folder)
        config = DumpConfig.model_validate(self._config)
        self._worker = UnitWorker(config, config.teacher, DumpJob(config, self._rows))
        return ray.get_runtime_context().get_node_id(), f"process {os.getpid()} on {socket.gethostname()}"

    def run(self, units: Sequence[int], num_refused: int) -> Iterator[UnitDone | UnitFailed]:
        """Do these units; see UnitWorker.run. The driver stops it by cancelling the call."""
        import ray

        context = ray.get_runtime_context()
        assert self._worker is not None
        yield from self._worker.run(
            units,
            num_refused=num_refused,
            asked_to_stop=lambda: "the driver" if context.is_canceled() else None,
        )

    def finish(self) -> None:
        """Answers when the calls before it are over."""
