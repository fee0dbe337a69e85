"""Batch -> top-k on the device -> host, without waiting: the copy is waited for where the result is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from potstill.kernels.topk import TopK, teacher_topk
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.engines import TeacherEngine
from potstill.teacher_dump.selection import RULED_OUT_LOGIT


@dataclass(frozen=True)
class TopKOnItsWay:
    """Top-k of a batch being copied to the host; `wait` gives it there."""

    topk: TopK
    copied: Any  # a CUDA event, or None on the CPU

    def wait(self) -> TopK:
        """The top-k with all tensors on the host; blocks until the copy is done."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.topk


def batch_topk(
    engine: TeacherEngine,
    batch: TeacherBatch,
    *,
    k: int,
    vocab_size: int,
    temperatures: Sequence[float],
    chunk_bytes: int,
) -> TopKOnItsWay:
    """Run the teacher over a batch and take the k best ids at its M target positions."""
    output = engine.forward(batch)
    labels = torch.from_numpy(batch.labels).to(engine.device, non_blocking=True)
    head = engine.head
    values: dict[str, Any]
    if head is None:
        assert output.logits is not None
        values = {"logits": output.logits.clamp(min=RULED_OUT_LOGIT)}
    else:
        values = {
            "hidden": output.hidden,
            "weight": head.weight,
            "bias": head.bias,
            "soft_cap": head.soft_cap,
            "logit_scale": head.logit_scale,
        }
    topk = teacher_topk(
        **values,
        k=min(k, vocab_size),
        vocab_size=vocab_size,
        temperatures=tuple(temperatures),
        labels=labels,
        chunk_bytes=chunk_bytes,
    )
    return _to_host(topk)


def _to_host(topk: TopK) -> TopKOnItsWay:
    if topk.ids.device.type != "cuda":
        return TopKOnItsWay(topk, None)

    def move(value: Tensor) -> Tensor:
        pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return pinned.copy_(value, non_blocking=True)

    moved: dict[str, Any] = {}
    for field in fields(topk):
        value = getattr(topk, field.name)
        moved[field.name] = {t: move(v) for t, v in value.items()} if isinstance(value, dict) else move(value)
    copied = torch.cuda.Event()
    copied.record()
    return TopKOnItsWay(replace(topk, **moved), copied)
