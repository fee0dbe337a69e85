"""Keep apart what is for a person and what libraries print: the first stays on standard error, the rest goes to a file.

DeepSpeed, torch, gloo, NCCL and transformers write to both standard streams, some of them below Python. A training
process therefore gives its two file descriptors to a log file and keeps a copy of standard error as `sys.stderr`, for
potstill's own log and progress (which is still a terminal if it was one).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# Read by huggingface_hub when it is imported: no bars of "Loading weights" between the lines of the log.
QUIET_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


@contextlib.contextmanager
def noise_to(path: Path) -> Iterator[None]:
    """While open, what anything but potstill prints is appended to `path`, also by child processes and C++ code.

    `sys.stderr` and the log of potstill go where standard error went (the log to the file too). Everything is as
    before on leaving. Not for several threads at once: descriptors and `logging` belong to the whole process.
    """
    os.environ.setdefault(QUIET_BARS, "1")
    before = sys.stdout, sys.stderr
    for stream in before:
        stream.flush()
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(path.open("a", encoding="utf-8", buffering=1))
        stack.enter_context(_libraries_to(sink))
        sys.stderr = stack.enter_context(_copy_of_stderr())
        sys.stdout = sink
        stack.callback(_give_back, before)
        for number in (1, 2):
            stack.enter_context(_descriptor_to(number, sink))
        stack.enter_context(_log_to(sink))
        yield


def _give_back(streams: tuple[TextIO, TextIO]) -> None:
    sys.stderr.flush()
    sys.stdout.flush()
    sys.stdout, sys.stderr = streams


@contextlib.contextmanager
def _log_to(sink: TextIO) -> Iterator[None]:
    """While open, potstill's log goes to what `sys.stderr` is now, and to the file as well."""
    logger = logging.getLogger("potstill")
    moved = [(found, found.setStream(sys.stderr)) for found in logger.handlers if type(found) is logging.StreamHandler]
    copy = logging.StreamHandler(sink)
    copy.setFormatter(logger.handlers[0].formatter if logger.handlers else None)
    logger.addHandler(copy)
    try:
        yield
    finally:
        logger.removeHandler(copy)
        for found, stream in moved:
            if stream is not None:
                found.setStream(stream)


@contextlib.contextmanager
def _copy_of_stderr() -> Iterator[TextIO]:
    """A stream that stays with the person when descriptor 2 goes to a file; `sys.stderr` itself if it is not that."""
    try:
        own = sys.stderr.fileno() == 2
    except (OSError, ValueError, io.UnsupportedOperation):  # a notebook, a test that reads what is printed
        own = False
    if not own:
        yield sys.stderr
        return
    with open(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1) as stream:
        yield stream


@contextlib.contextmanager
def _descriptor_to(number: int, sink: TextIO) -> Iterator[None]:
    """While open, file descriptor `number` is that of `sink`."""
    kept = os.dup(number)
    os.dup2(sink.fileno(), number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


@contextlib.contextmanager
def _libraries_to(sink: TextIO) -> Iterator[None]:
    """While open, warnings and the loggers of libraries (those imported so far, and those that add no handler)."""
    root = logging.getLogger()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s %(message)s", "%H:%M:%S"))
    root.addHandler(handler)
    logging.captureWarnings(True)
    moved = [(found, found.setStream(sink)) for found in _library_handlers()]
    try:
        yield
    finally:
        for found, stream in moved:
            if stream is not None:
                found.setStream(stream)
        logging.captureWarnings(False)
        root.removeHandler(handler)


def _library_handlers() -> list[logging.StreamHandler[TextIO]]:
    """Handlers that libraries have put on the standard streams."""
    loggers = [found for found in logging.root.manager.loggerDict.values() if isinstance(found, logging.Logger)]
    return [
        handler
        for logger in loggers
        if not logger.name.startswith("potstill")
        for handler in logger.handlers
        if type(handler) is logging.StreamHandler and handler.stream in (sys.stdout, sys.stderr)
    ]
