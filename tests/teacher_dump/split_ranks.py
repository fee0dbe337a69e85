"""What the ranks of one split teacher do in the tests; importable, because it runs in processes of its own."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.teacher_dump import DumpConfig, dump

SELECTION = {"mode": "top_k", "k": 8}


def settings(tokens: str, output: str, model: str, **teacher: Any) -> DumpConfig:
    """A dump in float32 with two ranks to the teacher, or as `teacher` says."""
    asked = {"model": model, "tensor_parallel": 2, "dtype": "float32", "batch_rows": 2, "check_tokenizer": False}
    return DumpConfig(tokens=tokens, output=output, teacher=asked | teacher, selection=SELECTION)


def dump_all(tokens: str, series: str, begun: str, stopped: str, models: list[str]) -> dict[str, Any]:
    """A series, a store that one process began, and one that a signal interrupts; what this rank saw of them."""
    engines, passes = _watched()
    found: dict[str, Any] = {}
    summary: Any = dump(settings(tokens, series, models[0], checkpoints=models))
    found["series"] = [(one.units, one.num_missing, one.sealed) for one in summary.members]
    found["held"] = [_share_held(engine.model) for engine in engines]
    if os.environ["RANK"] == "0":
        found["distance"] = _from_one_process(engines[-1].head, *passes[-1], model=models[-1])
    with _in_pass(2, _signal_myself):
        found["stopped"] = _outcome(lambda: dump(settings(tokens, stopped, models[0])))
    found["begun"] = _outcome(lambda: dump(settings(tokens, begun, models[0])))
    return found


def lose_rank(tokens: str, output: str, model: str, lost: int) -> None:
    """A dump in whose second pass one rank dies; the other writes into OUTPUT.seen what it saw of that."""
    with _in_pass(2, lambda: os._exit(1) if int(os.environ["RANK"]) == lost else None):
        seen = _outcome(lambda: dump(settings(tokens, output, model)))
    Path(f"{output}.seen").write_text(seen)


def _watched() -> tuple[list[Any], list[tuple[Any, Any]]]:
    """The engines that this rank loads from here on, and the passes that it leads: (batch, hidden states)."""
    from potstill.teacher_dump.engines import tensor_parallel

    engines: list[Any] = []
    passes: list[tuple[Any, Any]] = []
    load, forward = tensor_parallel.load, tensor_parallel.SplitEngine.forward

    def spying_load(teacher: Any, wanted: Any = None) -> Any:
        engines.append(load(teacher, wanted))
        return engines[-1]

    def spying_forward(engine: Any, batch: Any) -> Any:
        output = forward(engine, batch)
        passes.append((batch, output.hidden))
        return output

    tensor_parallel.load = spying_load  # in a process of its own
    tensor_parallel.SplitEngine.forward = spying_forward  # type: ignore[method-assign]
    return engines, passes


def _share_held(model: Any) -> float:
    parts = [getattr(p, "_local_tensor", p).numel() for p in model.parameters()]
    return float(sum(parts) / sum(p.numel() for p in model.parameters()))


def _from_one_process(head: Any, batch: Any, states: Any, *, model: str) -> dict[str, float]:
    """Largest differences of a split teacher's hidden states and head to those of a process alone."""
    from potstill.teacher_dump.engines.hf import load

    alone: Any = load(settings("-", "-", model, tensor_parallel=1).teacher).forward(batch)
    assert states.shape == alone.hidden.shape and len(states) > 0
    return {
        "hidden": float((states - alone.hidden).abs().max() / alone.hidden.abs().max()),
        "head": float((head.weight - alone.head.weight).abs().max()),
    }


def _outcome(work: Callable[[], Any]) -> str:
    try:
        return str(work().format())
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def _signal_myself() -> None:
    """The first rank gets USR1, the others TERM, which is not theirs to answer."""
    os.kill(os.getpid(), signal.SIGUSR1 if os.environ["RANK"] == "0" else signal.SIGTERM)


@contextmanager
def _in_pass(number: int, act: Callable[[], None]) -> Iterator[None]:
    """`act` on each rank as this pass of the dump begins there, counted from 1."""
    from potstill.teacher_dump.engines.tensor_parallel import SplitEngine

    passes, before = itertools.count(1), SplitEngine._lines

    def acting(engine: Any, *arguments: Any) -> Any:
        if next(passes) == number:
            act()
        return before(engine, *arguments)

    SplitEngine._lines = acting  # type: ignore[method-assign]
    yield
    SplitEngine._lines = before  # type: ignore[method-assign]
