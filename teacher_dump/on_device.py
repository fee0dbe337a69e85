"""Batch -> figures on the device -> host, without waiting: the copy is waited for where the result is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor

from potstill.kernels.device_guard import on_device_of
from potstill.kernels.topk import Sampled, TopK, select_sample, teacher_topk
from potstill.kernels.types import SparseTargetTensors
from potstill.teacher_dump.batches import TeacherBatch, target_places
from potstill.teacher_dump.engines.base import (
    FinishedTopK,
    HiddenStates,
    Logits,
    TeacherEngine,
    TopKWanted,
    TopLogprobs,
)
from potstill.teacher_dump.engines.finished import check_top_k
from potstill.teacher_dump.engines.top_logprobs import check_top_logprobs
from potstill.teacher_dump.host_copies import pinned_like, to_device
from potstill.teacher_dump.selection import RULED_OUT_LOGIT

Result = TypeVar("Result", TopK, Sampled, TopLogprobs)


@dataclass(frozen=True)
class OnItsWay(Generic[Result]):
    """A result being copied to the host; `wait` gives it there."""

    result: Result
    copied: Any  # a CUDA event, or None on the CPU
    check: Callable[[Result], Result] | None = None  # what reads values, and so belongs on the host

    def wait(self) -> Result:
        """The result with all tensors on the host; blocks until the copy is done. Raises what the check raises."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.result if self.check is None else self.check(self.result)


class BestOptions(TypedDict):
    """What is asked of a batch; chunk_bytes bounds the logits that exist at a time (None: by device)."""

    k: int
    vocab_size: int
    temperatures: Sequence[float]
    chunk_bytes: int | None


def batch_topk(engine: TeacherEngine, batch: TeacherBatch, **options: Unpack[BestOptions]) -> OnItsWay[TopK]:
    """Run the teacher over a batch and take the k best ids at its M target positions, with every figure of a TopK."""
    found = batch_best(engine, batch, **options)
    assert isinstance(found.result, TopK), "the configuration refuses engines that see log-probabilities alone"
    return cast("OnItsWay[TopK]", found)


def batch_best(
    engine: TeacherEngine, batch: TeacherBatch, **options: Unpack[BestOptions]
) -> OnItsWay[TopK] | OnItsWay[TopLogprobs]:
    """As batch_topk, but an engine that sees log-probabilities alone gives them."""
    k, vocab_size, temperatures = options["k"], options["vocab_size"], tuple(options["temperatures"])
    output = engine.forward(batch)
    wanted = TopKWanted(k=min(k, vocab_size), vocab_size=vocab_size, temperatures=temperatures)
    labels = torch.from_numpy(batch.labels)
    if isinstance(output, TopLogprobs):
        return _to_host(output, lambda top: _storable(check_top_logprobs(top, labels, wanted, engine=engine.name)))
    if isinstance(output, FinishedTopK):
        return _to_host(output.topk, lambda topk: check_top_k(topk, labels, wanted, engine=engine.name))
    of_model = _teacher_options(engine, output, batch, vocab_size=vocab_size, chunk_bytes=options["chunk_bytes"])
    return _to_host(_storable(teacher_topk(**of_model, k=wanted.k, temperatures=temperatures)))


def batch_sample(
    engine: TeacherEngine,
    batch: TeacherBatch,
    *,
    num_draws: int,
    power: float,
    seed: int,
    vocab_size: int,
    chunk_bytes: int | None,
) -> OnItsWay[Sampled]:
    """Run the teacher over a batch and draw ids at its M target positions; draws are keyed by (seed, row, position)."""
    output = engine.forward(batch)
    assert isinstance(output, HiddenStates | Logits), "the configuration refuses to draw from a finished top-k"
    options = _teacher_options(engine, output, batch, vocab_size=vocab_size, chunk_bytes=chunk_bytes)
    rows, positions = (to_device(array, engine.device) for array in target_places(batch.rows))
    options |= {"seed": seed, "rows": rows, "positions": positions}
    return _to_host(_storable(select_sample(**options, num_draws=num_draws, power=power)))


def _storable(result: Result) -> Result:
    """The same with a number for a label that the teacher rules out: means over a row would be -inf otherwise."""
    return replace(result, label_logprob=result.label_logprob.clamp_min(RULED_OUT_LOGIT))


def _teacher_options(
    engine: TeacherEngine,
    output: HiddenStates | Logits,
    batch: TeacherBatch,
    *,
    vocab_size: int,
    chunk_bytes: int | None,
) -> dict[str, Any]:
    """What the kernels need to know of a model's output."""
    options: dict[str, Any] = {
        "labels": to_device(batch.labels, engine.device),
        "vocab_size": vocab_size,
        "chunk_bytes": chunk_bytes,
    }
    if isinstance(output, Logits):
        return options | {"logits": output.logits}
    return options | {
        "hidden": output.hidden,
        "weight": output.head.weight,
        "bias": output.head.bias,
        "soft_cap": output.head.soft_cap,
        "logit_scale": output.head.logit_scale,
    }


def _to_host(result: Result, check: Callable[[Result], Result] | None = None) -> OnItsWay[Result]:
    if result.label_logprob.device.type != "cuda":
        return OnItsWay(result, None, check)
    # An event is recorded on the current device's stream: on another than the result's it would come too early.
    with on_device_of(result.label_logprob):
        moved = _moved(result)
        copied = torch.cuda.Event()
        copied.record()
    return OnItsWay(moved, copied, check)


def _moved(value: Any) -> Any:
    """The same value with its tensors on their way into pinned memory."""
    if isinstance(value, Tensor):
        return pinned_like(value).copy_(value, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(item) for key, item in value.items()}
    if isinstance(value, TopK | Sampled | TopLogprobs | SparseTargetTensors):
        return replace(value, **{field.name: _moved(getattr(value, field.name)) for field in fields(value)})
    return value
