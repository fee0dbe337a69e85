"""Logging for commands: time, level, rank and message on standard error; the library itself only asks for loggers."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment: while a bar is drawn, that is a stream which writes above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def setup_logging(*, rank: int | None = None, level: int = logging.INFO) -> None:
    """Send log records to standard error, marked with the rank; ranks above 0 only from warnings up.

    `rank` defaults to the RANK of the launcher's environment, if there is one.
    """
    if rank is None and "RANK" in os.environ:
        rank = int(os.environ["RANK"])
    mark = f" [rank {rank}]" if rank is not None else ""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s{mark} %(message)s", "%H:%M:%S"))
    root = logging.getLogger("potstill")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level if not rank else max(level, logging.WARNING))
