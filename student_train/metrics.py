"""Figures of a run: sums on the device, one reduction per line, JSON lines always, trackers by extra."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.student_train.config import LoggingConfig
from potstill.student_train.distributed import Topology, all_reduce_sum
from potstill.student_train.model import SUM_NAMES

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

    `peak` is None for unknown devices, `per_token` where it is unknown how many experts a token passes through.
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
        """Share of the model's FLOPs that the token selector saved in the head."""
        if self.per_token is None:
            return None
        saved = self.per_position * (sums["labelled"] - sums["positions"])
        whole = self.per_token * sums["tokens"] + self.per_position * sums["labelled"]
        return saved / whole if whole else 0.0


def flops_per_token(*, backbone_parameters: int, num_layers: int, hidden_size: int, row_length: int) -> float:
    """Forward and backward of the backbone per token: 6 per parameter, and causal attention 6 * layers * D * L."""
    return 6.0 * backbone_parameters + 6.0 * num_layers * hidden_size * row_length


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

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Start a new line."""
        self._sums = torch.zeros(len(SUM_NAMES) + 1, dtype=torch.float64, device=self._device)
        self._losses: list[Tensor] = []
        self._step_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self.digests: list[str] = []
        self.started = time.monotonic()

    def add(self, loss: Tensor, sums: Tensor, num_tokens: int) -> None:
        """Count one micro-batch: its share of the step's loss, its sums [S], its real tokens. No host sync."""
        self._sums[:-1] += sums.detach()
        self._sums[-1] += num_tokens
        self._step_loss += loss.detach()

    def end_step(self, digest: str) -> None:
        """Close the step; `digest` names the rows of its global batch."""
        self._losses.append(self._step_loss.clone())
        self._step_loss.zero_()
        self.digests.append(digest)

    def reduce(self) -> tuple[dict[str, float], list[float]]:
        """Sums over all ranks by name (and `tokens`), and the loss of each step. One all-reduce, one sync."""
        values = all_reduce_sum(torch.cat([self._sums, torch.stack(self._losses)])).tolist()
        count = len(SUM_NAMES) + 1
        return dict(zip((*SUM_NAMES, "tokens"), values[:count], strict=True)), values[count:]


def loss_figures(sums: dict[str, float]) -> dict[str, float | None]:
    """Means of a line of metrics; null where nothing was counted (no targets: no KD figures)."""

    def mean(name: str, weight: str) -> float | None:
        return sums[name] / sums[weight] if sums[weight] > 0 else None

    return {
        "ce": mean("ce", "label_weight"),
        "kd": mean("kd", "kd_weight"),
        "z": mean("z", "weight"),
        "router_aux": mean("router_aux", "router_batches"),
        "kept_mass": mean("kept_mass", "target_weight"),
        "student_mass": mean("student_mass", "target_weight"),
        "agreement": mean("agreement", "target_weight"),
        "accuracy": mean("correct", "label_weight"),
        "entropy": mean("entropy", "weight"),
        "selected_share": mean("positions", "labelled"),
        "kd_share": mean("kd_positions", "labelled") if sums["kd_weight"] > 0 else None,
        "effective_positions": sums["weight"] ** 2 / sums["squared_weight"] if sums["squared_weight"] > 0 else None,
    }


def check_trackers(options: LoggingConfig) -> None:
    """Refuse a tracker whose package is missing, before anything is built. Raises UserError."""
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("logging.tensorboard needs the extra: pip install 'potstill[tracking]'")
    if options.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise UserError("logging.wandb needs the package wandb: pip install wandb")


class Tracker(Protocol):
    """A place that figures go to besides the JSON lines."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one line of metrics."""

    def close(self) -> None:
        """Write what is left."""


def flat_numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numeric figures of a record, named kind/figure."""
    return {
        f"{record['kind']}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


class TensorBoardTracker:
    """TensorBoard events in `<run>/tensorboard`."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        for name, value in flat_numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases; `offline` writes to `<run>/wandb` and sends nothing."""

    def __init__(self, run: Path, *, mode: Literal["offline", "online"], name: str) -> None:
        import wandb  # type: ignore[import-not-found,unused-ignore]

        # One id per folder: a resumed run goes on in the same place, and two folders never meet.
        key = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(project="potstill", name=name, dir=str(run), mode=mode, id=key, resume="allow")

    def log(self, record: dict[str, Any]) -> None:
        self._run.log(flat_numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class MetricsLog:
    """The JSON lines of a run (rank 0 writes, other ranks do nothing)."""

    def __init__(self, run: Path, options: LoggingConfig, *, name: str, topology: Topology) -> None:
        self._file = None
        self._trackers: list[Tracker] = []
        if topology.is_main:
            self._file = open(run / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 -- closed in close()
            if options.tensorboard:
                self._trackers.append(TensorBoardTracker(run))
            if options.wandb != "off":
                self._trackers.append(WandbTracker(run, mode=options.wandb, name=name))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is on the file system when this returns."""
        if self._file is None:
            return
        # JSON has no NaN; a figure that is not a number is null.
        record = {name: _finite(value) for name, value in record.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(record)

    def close(self) -> None:
        """Close the file and the trackers."""
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(part) for part in value]
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
    # Also when no line is whole: the next one would be written behind the half of the killed run.
    if (run / METRICS_FILE).exists():
        part = run / f".{METRICS_FILE}.part"
        part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        part.replace(run / METRICS_FILE)
