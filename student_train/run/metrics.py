"""Figures of a run: sums on the device, one reduction per line, JSON lines always, trackers by extra."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.student_train.config.train import LoggingConfig
from potstill.student_train.model.loss_terms import term_parts
from potstill.student_train.run.engine import all_reduce_sum
from potstill.student_train.run.hooks import Hooks
from potstill.student_train.run.source_figures import source_count_names, source_sum_names
from potstill.student_train.run.trackers import Tracker, open_trackers

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"

# Dense peak of bfloat16 matrix units, FLOP/s; a device that is not listed has no MFU rather than a guessed one.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA B200": 2250e12,
}


@dataclass(frozen=True)
class ModelCost:
    """FLOPs of a token in the backbone and of a trained position in the head.

    `peak` is None for unknown devices, `per_token` where it is unknown what a layer costs (its kind, or how many
    experts a token passes through).
    """

    per_token: float | None
    per_position: float
    peak: float | None

    def utilisation(self, sums: dict[str, float], *, seconds: float, world_size: int) -> float | None:
        """Model FLOPs that were needed over what the devices could do (MFU)."""
        if self.peak is None or self.per_token is None:
            return None
        flops = self.per_token * sums["tokens"] + self.per_position * sums["positions"]
        return flops / (seconds * self.peak * world_size)

    def saved_share(self, sums: dict[str, float]) -> float | None:
        """Share of the model's FLOPs that the token selector saved in the head.

        A choice by the student's own figures costs one forward of the head (a third of `per_position`) over every
        position that it measures: the share is below 0 where that is more than the choice saves.
        """
        if self.per_token is None:
            return None
        saved = self.per_position * (sums["labelled"] - sums["positions"] - sums["measured"] / 3.0)
        whole = self.per_token * sums["tokens"] + self.per_position * sums["labelled"]
        return saved / whole if whole else 0.0


def attention_spans(config: Any, row_length: int) -> list[float] | None:
    """Mean number of tokens that a token of a full row looks at, per layer of the text configuration.

    Half the row under causal attention; fewer in layers with a sliding window; None where a layer is something else.
    The bounds of documents are not known here, and attention with a mask computes over them anyway.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    local = min(window or row_length, row_length)
    spans = {"sliding_attention": local * (1.0 - local / (2.0 * row_length)), "full_attention": row_length / 2.0}
    return [spans[kind] for kind in kinds] if set(kinds) <= set(spans) else None


def head_width(config: Any) -> int:
    """Dimensions of one attention head; many architectures set it apart from hidden_size / num_attention_heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def flops_per_token(*, backbone_parameters: int, attention_spans: Sequence[float], attention_width: int) -> float:
    """Forward and backward of the backbone per token: 6 per parameter, and 12 * width per token that is looked at."""
    return 6.0 * backbone_parameters + 12.0 * attention_width * sum(attention_spans)


def head_flops_per_position(*, hidden_size: int, vocab_size: int) -> float:
    """Logits, gradient of the hidden states, gradient of the weight: 6 D V for each position that is trained on."""
    return 6.0 * hidden_size * vocab_size


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: of the device's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Meter:
    """Adds up the sums of micro-batches between two lines of metrics."""

    def __init__(self, device: torch.device, sum_names: tuple[str, ...], *, sources: tuple[str, ...] = ()) -> None:
        """`sum_names`: those of the student's loss terms, in the order of the sums; `sources`: names, if several."""
        self._device = device
        self._names = (*sum_names, *source_sum_names(sources), "tokens")
        self._count_names = source_count_names(sources)
        self.reset()

    def reset(self) -> None:
        """Start a new line."""
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)
        self._counts = np.zeros(len(self._count_names))  # of the host, by source
        self._losses: list[Tensor] = []
        self._step_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self.digests: list[str] = []
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Time of training since the line began: what was spent inside `paused` is not in it."""
        return time.monotonic() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside: evaluations and saves are no work of the steps beside them."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - began

    def add(self, loss: Tensor, sums: Tensor, num_tokens: int) -> None:
        """Count one micro-batch: its share of the step's loss, its sums [S], its real tokens. No host sync."""
        self._sums[:-1] += sums.detach()
        self._sums[-1] += num_tokens
        self._step_loss += loss.detach()

    def end_step(self, digest: str, source_counts: NDArray[np.float64] | None = None) -> None:
        """Close the step; `digest` names the rows of its global batch, `source_counts` [G, 2] are StepBatch's."""
        if source_counts is not None:
            self._counts += source_counts.flatten()
        self._losses.append(self._step_loss.clone())
        self._step_loss.zero_()
        self.digests.append(digest)

    def reduce(self) -> tuple[dict[str, float], list[float]]:
        """Sums over all ranks by name (and `tokens`), and the loss of each step. One all-reduce, one sync."""
        counts = torch.from_numpy(self._counts).to(self._device)
        values = all_reduce_sum(torch.cat([self._sums, counts, torch.stack(self._losses)])).tolist()
        names = (*self._names, *self._count_names)
        return dict(zip(names, values[: len(names)], strict=True)), values[len(names) :]


def loss_figures(sums: dict[str, float]) -> dict[str, float | None]:
    """Means of a line of metrics; null where nothing was counted (no targets: no KD figures), or a term is off."""

    def mean(name: str, weight: str) -> float | None:
        return sums[name] / sums[weight] if sums.get(weight, 0.0) > 0 else None

    return {
        **{figure: mean(name, weight) for figure, (name, weight) in term_parts().items()},
        "kept_mass": mean("kept_mass", "target_weight"),
        "student_mass": mean("student_mass", "target_weight"),
        "agreement": mean("agreement", "target_weight"),
        "accuracy": mean("correct", "label_weight"),
        "entropy": mean("entropy", "weight"),
        "selected_share": mean("positions", "labelled"),
        "kd_share": mean("kd_positions", "labelled") if sums["kd_weight"] > 0 else None,
        "effective_positions": sums["weight"] ** 2 / sums["squared_weight"] if sums["squared_weight"] > 0 else None,
    }


class MetricsLog:
    """The JSON lines of a run (rank 0 writes, other ranks do nothing), and what goes to the trackers beside them.

    A write that fails is kept in `failure` and not raised: rank 0 alone would leave the other ranks waiting for it. The
    train loop asks at its next look, on all ranks.
    """

    def __init__(self, run: Path, options: LoggingConfig, *, name: str, hooks: Hooks | None = None) -> None:
        self._run, self._options, self._name = run, options, name
        self._hooks = hooks or Hooks()
        self.path = run / METRICS_FILE
        self._file: FileIO | None = None
        self._trackers: list[Tracker] = []
        self.failure: OSError | None = None

    def open(self) -> None:
        """Open the file and the trackers (rank 0). Raises OSError, and UserError of a tracker."""
        # Without a buffer: what a full disk did not take must not be tried again at the end.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 -- closed in close()
        self._trackers = open_trackers(self._run, self._options, name=self._name)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is on the file system when this returns, or `failure` says why it is not."""
        self._hooks.report(record)
        if self._file is None or self.failure is not None:
            return
        # JSON has no NaN; a figure that is not a number is null.
        record = {name: _finite(value) for name, value in record.items()}
        left = memoryview((json.dumps(record, allow_nan=False) + "\n").encode())
        try:
            while left:  # a disk takes what still fits and fails at the next write
                left = left[self._file.write(left) :]
            for tracker in self._trackers if record["kind"] != "sample" else ():
                tracker.log(record)
        except OSError as error:
            self.failure = error

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except OSError as error:
                # The JSON lines are whole or `failure` was raised; this must not hide why the run ends.
                log.error("%s could not write its last figures: %s", type(tracker).__name__, error)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(part) for part in value]
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run, in order. A half-written last line (a killed run) is left out."""
    path = run / METRICS_FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            log.warning("%s: a line is not whole JSON; passed over", path)
    return records


def cut_metrics(run: Path, step: int) -> None:
    """Move records behind `step` to metrics.discarded.jsonl: the resumed run writes these steps again."""
    records = read_metrics(run)
    kept = [record for record in records if record["step"] <= step]
    dropped = [record for record in records if record["step"] > step]
    if dropped:
        with open(run / "metrics.discarded.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in dropped)
    if (run / METRICS_FILE).exists():  # also without whole records: a half line would spoil the next one
        part = run / f".{METRICS_FILE}.part"
        part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        part.replace(run / METRICS_FILE)
