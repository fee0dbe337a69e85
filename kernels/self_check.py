"""Before the first step: does the chosen path give what float64 gives, on a real batch?

The figures of a fused loss can be wrong in ways that training hides for a long time (a dropped dense term,
a temperature applied once). The check runs the call that training will make on some of its own tokens and
compares loss and gradients with the closed forms in float64 on the CPU.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from potstill.kernels.settings import validate_targets
from potstill.kernels.types import SelfCheckError, SparseTargetTensors

logger = logging.getLogger(__name__)

MAX_ROWS = 16
# Error of a whole gradient over its norm. One rounding of each factor of the products, then sums.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def pick_rows(weights: Tensor | None, num_tokens: int, device: torch.device) -> Tensor:
    """At most MAX_ROWS tokens, spread evenly over those with a weight."""
    rows = torch.arange(num_tokens, device=device) if weights is None else weights.nonzero()[:, 0]
    step = max(1, rows.shape[0] // MAX_ROWS)
    return rows[::step][:MAX_ROWS]


def subset(arguments: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The call on the tokens `rows` alone, cut off from the graph that led to it."""
    out = dict(arguments)
    for name in ("hidden", "labels", "token_weights", "kd_weights"):
        if out.get(name) is not None:
            out[name] = out[name].detach()[rows]
    for name in ("weight", "bias"):
        if out.get(name) is not None:
            out[name] = out[name].detach()
    targets: SparseTargetTensors | None = out["targets"]
    out["targets"] = None if targets is None else targets.select(rows)
    out.pop("num_active", None)
    out["normalizer"] = None
    return out


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call for the reference: float64 on the CPU, the torch path."""
    out = dict(arguments, backend="torch", chunk_bytes=None)
    for name in ("hidden", "weight", "bias"):
        if out.get(name) is not None:
            out[name] = out[name].to("cpu", torch.float64)
    for name in ("labels", "token_weights", "kd_weights"):
        if out.get(name) is not None:
            out[name] = out[name].to("cpu")
    if out["targets"] is not None:
        out["targets"] = out["targets"].to("cpu")
    return out


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Euclidean norm; inf where value is not finite."""
    difference = float((value.to("cpu", torch.float64) - truth).norm())
    scale = float(truth.norm())
    if difference != difference:
        return float("inf")
    return difference / scale if scale > 0 else difference


def compare(values: dict[str, Tensor], truths: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Relative errors by name; SelfCheckError when one is above the tolerance of `dtype`."""
    figures = {name: relative_error(values[name], truth) for name, truth in truths.items()}
    limit = TOLERANCES[dtype]
    listed = ", ".join(f"{name} {figure:.2e}" for name, figure in figures.items())
    if not all(figure <= limit for figure in figures.values()):
        raise SelfCheckError(
            f"the loss path disagrees with float64 on a real batch: relative errors {listed}; the limit for"
            f" {str(dtype).removeprefix('torch.')} is {limit:g}. Training with it would be wrong: pass"
            " backend='torch', and report the versions of torch, triton and the driver"
        )
    logger.info("loss path agrees with float64: relative errors %s (limit %g)", listed, limit)
    return figures


def check_values(targets: SparseTargetTensors | None, vocab_size: int) -> None:
    """All entries of the batch, once: a duplicate id would lose a gradient without a trace."""
    if targets is not None:
        validate_targets(targets, vocab_size=vocab_size)
