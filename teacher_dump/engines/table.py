"""The table of engines. The configuration reads it, so nothing heavy is imported with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from potstill.teacher_dump.engines.vllm_engine.options import IDLE_OPTIONS, REFUSED_OPTIONS
from potstill.teacher_dump.engines.vllm_logprobs.options import LOGPROBS_OPTIONS


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """What the configuration and the worker need to know of an engine before its module is imported.

    module:      whole name of the module with `load(teacher, wanted) -> TeacherEngine`
    description: one phrase for the help of `teacher.engine`
    is_group:    whether several ranks hold one teacher; the module then has `join_group(teacher) -> Ranks`
    mixture:     whole name of the module whose `load` runs an ensemble of such teachers as one; None: there is none
    refuses:     settings of TeacherConfig that it cannot run with, key -> values
    gives_top_k: whether it gives a finished top-k, of which nothing can be drawn
    only_logprobs: whether log-probabilities at T = 1 are all it gives: no entropy, no tails at other temperatures
    mixes:       whether its units may stand in a store beside those of others that mix (engine_mix.py)
    split:       how it runs with `tensor_parallel` above 1, as an entry of its own; None: it does not
    splits_itself:    whether it runs with `tensor_parallel` above 1 by this same entry, inside one worker
    takes_row_length: whether its `load` takes the keyword `row_length`
    pins:        whole name of the module with `pins(teacher, dtype=...) -> Mapping`: versions and settings of the
                 engine itself, for run.json; None: it has none
    idle_options:    keys of `teacher.load_options` that change nothing of a store, and are left out of run.json
    refuses_options: keys of `teacher.load_options` that it cannot run with -> why, or what to do
    """

    module: str
    description: str
    is_group: bool = False
    mixture: str | None = None
    refuses: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    gives_top_k: bool = False
    only_logprobs: bool = False
    mixes: bool = False
    split: EngineEntry | None = None
    splits_itself: bool = False
    takes_row_length: bool = False
    pins: str | None = None
    idle_options: frozenset[str] = frozenset()
    refuses_options: Mapping[str, str] = field(default_factory=dict)


ENGINES: dict[str, EngineEntry] = {
    "hf": EngineEntry(
        module="potstill.teacher_dump.engines.hf",
        description="one device",
        mixture="potstill.teacher_dump.engines.ensemble",
        mixes=True,
        split=EngineEntry(
            module="potstill.teacher_dump.engines.tensor_parallel",
            description="ranks that hold a part of every layer are one worker",
            is_group=True,
            mixes=True,
            refuses={"compile": (True,)},
        ),
    ),
    "zero3": EngineEntry(
        module="potstill.teacher_dump.engines.zero3",
        description="a group of ranks is one worker",
        is_group=True,
        mixes=True,
        refuses={"compile": (True,), "head": ("logits",)},
    ),
    "vllm": EngineEntry(
        module="potstill.teacher_dump.engines.vllm_engine.engine",
        description="hidden states by vLLM, which spreads a teacher over GPUs itself",
        mixes=True,
        refuses={"compile": (True,), "head": ("logits",)},
        splits_itself=True,
        takes_row_length=True,
        pins="potstill.teacher_dump.engines.vllm_engine.pins",
        idle_options=IDLE_OPTIONS,
        refuses_options=REFUSED_OPTIONS,
    ),
    "vllm_logprobs": EngineEntry(
        module="potstill.teacher_dump.engines.vllm_logprobs.engine",
        description="log-probabilities that vLLM tells, where it gives no hidden states: no entropy, no draws, T = 1",
        refuses={"compile": (True,), "head": ("logits", "hidden")},
        gives_top_k=True,
        only_logprobs=True,
        splits_itself=True,
        takes_row_length=True,
        pins="potstill.teacher_dump.engines.vllm_logprobs.pins",
        idle_options=IDLE_OPTIONS,
        refuses_options={**REFUSED_OPTIONS, **dict.fromkeys(LOGPROBS_OPTIONS, "the engine sets it itself")},
    ),
}


def describe_engines() -> str:
    """All engines in one line of help."""
    return "; ".join(f"{name}: {entry.description}" for name, entry in ENGINES.items())


def entry_of(name: str, tensor_parallel: int = 1) -> EngineEntry:
    """The entry of engine `name` as it runs over this many parts. Raises ValueError where it does not."""
    entry = ENGINES[name]
    if tensor_parallel == 1 or entry.splits_itself:
        return entry
    if entry.split is None:
        able = " or ".join(name for name, entry in ENGINES.items() if entry.split is not None or entry.splits_itself)
        raise ValueError(
            f"engine {name} does not know tensor_parallel={tensor_parallel}: leave it out, or use engine {able}"
        )
    return entry.split


def refusal_text(name: str, tensor_parallel: int = 1) -> str:
    """What engine `name` cannot run with, and what to do."""
    refuses = entry_of(name, tensor_parallel).refuses
    words = [key if value is True else f"{key}={value}" for key, values in refuses.items() for value in values]
    if tensor_parallel > 1:
        return f"engine {name} with tensor_parallel={tensor_parallel} does not know {' or '.join(words)}: leave it out"
    if len(words) == 1:
        return f"engine {name} does not know {words[0]}: leave it out, or use engine hf"
    return f"engine {name} knows neither {' nor '.join(words)}: leave them out, or use engine hf"
