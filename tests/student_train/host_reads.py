"""What a rank runs to find out where the train loop makes the host wait for the device."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch

from tests.student_train import workers

# Each of these brings a value of a tensor to the host; on a GPU the host then waits for all work before it.
WAITING = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
OURS = ("/student_train/run/", "/student_train/data/", "/student_train/curriculum/", "/storage/")
OTHERS = ("/student_train/", "/kernels/", "/deepspeed/")


def owner(frame: FrameType | None) -> str | None:
    """File of the nearest caller that is no part of torch, if it is one of the loop's own; engine and model are not."""
    while frame is not None:
        name = frame.f_code.co_filename
        if any(part in name for part in OURS):
            return name.rsplit("/", 1)[-1]
        if any(part in name for part in OTHERS):
            return None
        frame = frame.f_back
    return None


def host_reads(tree: dict[str, Any]) -> list[tuple[int, str]]:
    """Train, and note in order what happened: (steps done by then, what).

    What: "ask" and "read" of the watch over the steps, "forward", and "<file> <method>" for each value that the driving
    thread brought to the host.
    """
    from potstill.student_train.run import late_read, loop, trainer

    seen: list[tuple[int, str]] = []
    runs: list[Any] = []

    def note(what: str) -> None:
        if runs:
            seen.append((runs[0].state.step, what))

    def noting(kind: Any, name: str, what: str) -> None:
        honest: Callable[..., Any] = getattr(kind, name)

        def call(*args: Any, **options: Any) -> Any:
            note(what)
            return honest(*args, **options)

        setattr(kind, name, call)

    def counting(name: str) -> None:
        honest: Callable[..., Any] = getattr(torch.Tensor, name)

        def call(*args: Any, **options: Any) -> Any:
            file = owner(sys._getframe(1)) if threading.current_thread() is threading.main_thread() else None
            if file is not None:
                note(f"{file} {name}")
            return honest(*args, **options)

        setattr(torch.Tensor, name, call)

    train_steps = loop.train_steps

    def watched(run: Any, progress: Any) -> str:
        runs.append(run)
        noting(late_read.LateRead, "start", "ask")
        noting(late_read.LateRead, "finish", "read")
        noting(type(run.engine), "forward", "forward")
        for name in WAITING:
            counting(name)
        return train_steps(run, progress)

    trainer.train_steps = watched  # in a process of its own
    trainer.train(workers.config_of(tree))
    return seen
