"""Before the first step: does the chosen path give what float64 gives, on a real batch?

The figures of a fused loss can be wrong in ways that training hides for a long time (a dropped dense term,
a temperature applied once). The check runs the call that training will make on some of its own tokens and
compares loss and gradients with the closed forms in float64 on the CPU.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from potstill.kernels.settings import validate_targets
from potstill.kernels.types import SelfCheckError, SparseTargetTensors

logger = logging.getLogger(__name__)

MAX_ROWS = 16
BLOCK_ROWS = 4096
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


def on_cpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """What of the call is not the head or the hidden states, for the reference: the torch path on the CPU."""
    out = dict(arguments, backend="torch", chunk_bytes=None)
    for name in ("hidden", "weight", "bias"):
        out.pop(name, None)
    for name in ("targets", "labels", "token_weights", "kd_weights"):
        if out.get(name) is not None:
            out[name] = out[name].to("cpu")
    return out


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in float64 on the CPU, some rows at a time: whole it would be four times its size."""
    for start in range(0, weight.shape[0], BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        yield block, weight[block].to("cpu", torch.float64)


@torch.no_grad()
def wide_logits(arguments: dict[str, Any]) -> Tensor:
    """Raw logits [R, V] in float64 on the CPU, a leaf that wants a gradient."""
    hidden, weight, bias = arguments["hidden"], arguments["weight"], arguments["bias"]
    wide = hidden.to("cpu", torch.float64)
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=torch.float64)
    for block, rows in _blocks(weight):
        logits[:, block] = wide @ rows.t()
    if bias is not None:
        logits += bias.to("cpu", torch.float64)
    return logits.requires_grad_()


def relative_errors(
    arguments: dict[str, Any], values: dict[str, Tensor], loss: Tensor, slope: Tensor
) -> dict[str, float]:
    """|value - truth| / |truth| (Euclidean) of the loss and of each gradient, from the reference's loss and
    its gradient by the logits, `slope` [R, V]; inf where a value is not finite."""
    hidden = arguments["hidden"].to("cpu", torch.float64)
    grad_hidden = torch.zeros_like(hidden)
    squares = torch.zeros(2, dtype=torch.float64)  # of the difference and of the truth, of the head's gradient
    for block, rows in _blocks(arguments["weight"]):
        grad_hidden += slope[:, block] @ rows
        truth = slope[:, block].t() @ hidden
        difference = values["weight gradient"][block].to("cpu", torch.float64) - truth
        squares += torch.stack([difference.square().sum(), truth.square().sum()])
    pairs = {"loss": loss, "hidden gradient": grad_hidden}
    if "bias gradient" in values:
        pairs["bias gradient"] = slope.sum(0)
    figures = {}
    for name, truth in pairs.items():
        difference = values[name].to("cpu", torch.float64) - truth
        figures[name] = _ratio(float(difference.norm()), float(truth.norm()))
    error, size = squares.sqrt().tolist()
    return figures | {"weight gradient": _ratio(error, size)}


def _ratio(error: float, size: float) -> float:
    if math.isnan(error):
        return math.inf
    return error / size if size > 0 else error


def judge(figures: dict[str, float], dtype: torch.dtype) -> None:
    """SelfCheckError when one relative error is above the tolerance of `dtype`."""
    limit = TOLERANCES[dtype]
    listed = ", ".join(f"{name} {figure:.2e}" for name, figure in figures.items())
    if not all(figure <= limit for figure in figures.values()):
        raise SelfCheckError(
            f"the loss path disagrees with float64 on a real batch: relative errors {listed}; the limit for"
            f" {str(dtype).removeprefix('torch.')} is {limit:g}. Training with it would be wrong: pass"
            " backend='torch', and report the versions of torch, triton and the driver"
        )
    logger.info("loss path agrees with float64: relative errors %s (limit %g)", listed, limit)


def check_values(targets: SparseTargetTensors | None, vocab_size: int) -> None:
    """All entries of the batch, once: a duplicate id would lose a gradient without a trace."""
    if targets is not None:
        validate_targets(targets, vocab_size=vocab_size)
