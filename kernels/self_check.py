"""Before the first step: does the chosen path give what float64 gives, on a real batch?

The figures of a fused loss can be wrong in ways that training hides for a long time (a dropped dense term,
a temperature applied once). The check runs the call that training will make on some of its own tokens and
compares loss and gradients with the closed forms in float64 on the CPU.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from potstill.kernels.checks import validate_targets
from potstill.kernels.fused_linear import linear_loss, logits_loss
from potstill.kernels.loss_call import CallOptions, LinearInputs, LossCall
from potstill.kernels.settings import LossSettings
from potstill.kernels.types import SelfCheckError, SparseTargetTensors

logger = logging.getLogger(__name__)

MAX_ROWS = 16
BLOCK_ROWS = 4096
# Nats. A divergence of two models that are nearly one, or the loss of a student that knows every label, is a small
# difference of larger numbers: below this an error is judged as one of this loss. A gradient by the logits below that
# of such a loss likewise: q - 1 keeps none of its digits in float32 where the loss is 1e-7.
SMALL_LOSS = 0.01
ROUNDINGS = 4  # of the largest logit, that a logit less the log of the sum of all may be off by
# Error of a whole gradient over its norm. One rounding of each factor of the products, then sums.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def compare(
    inputs: LinearInputs,
    settings: LossSettings,
    options: CallOptions,
    *,
    targets: SparseTargetTensors | None,
    labels: Tensor,
) -> dict[str, float]:
    """Relative errors of the loss and of each gradient on some tokens of the call; {} where no token has a weight.

    Raises KernelInputError for targets that hold nonsense, SelfCheckError for an error above the tolerance.
    """
    if targets is not None:
        # All entries of the batch, once: a duplicate id would lose a gradient without a trace.
        validate_targets(targets, vocab_size=inputs.sizes[1])
    rows = pick_rows(options.token_weights, inputs.sizes[0], inputs.hidden.device)
    if rows.shape[0] == 0:
        return {}
    few = None if targets is None else targets.select(rows)
    labels = labels[rows]
    options = _of_rows(options, rows)
    # Cut off from the graph that led to the call. Autocast would round the reference's float64 too.
    with torch.enable_grad(), torch.autocast(inputs.hidden.device.type, enabled=False):
        found = {"hidden": inputs.hidden[rows], "weight": inputs.weight, "bias": inputs.bias}
        leaves = {name: value.detach().requires_grad_() for name, value in found.items() if value is not None}
        sample = LinearInputs(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        call = LossCall.make(settings, options, targets=few, labels=labels, sizes=sample.sizes, like=sample.hidden)
        loss, _ = linear_loss(sample, call)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        values = {f"{name} gradient": grad for name, grad in zip(leaves, grads, strict=True)}
        logits = wide_logits(sample)
        reference = LossCall.make(
            settings,
            _on_cpu(options),
            targets=None if few is None else few.to("cpu"),
            labels=labels.to("cpu"),
            sizes=sample.sizes,
            like=logits,
        )
        truth, _ = logits_loss(logits, reference, inplace=False)
        (slope,) = torch.autograd.grad(truth, logits)
    with torch.no_grad():
        small = small_loss(float(logits.abs().max()) * settings.logit_scale, sample.hidden.dtype)
        least = small, small * _weight_norm(options.token_weights, rows.shape[0])
        figures = relative_errors(sample, {**values, "loss": loss}, truth, slope, least=least)
    judge(figures, inputs.hidden.dtype)
    return figures


def pick_rows(weights: Tensor | None, num_tokens: int, device: torch.device) -> Tensor:
    """At most MAX_ROWS tokens, spread evenly over those with a weight (int64 [R])."""
    rows = torch.arange(num_tokens, device=device) if weights is None else weights.nonzero()[:, 0]
    step = max(1, rows.shape[0] // MAX_ROWS)
    return rows[::step][:MAX_ROWS]


def _of_rows(options: CallOptions, rows: Tensor) -> CallOptions:
    """The options of the call on the tokens `rows` alone, divided by the sum of their own weights."""
    weights, kd_weights = (None if w is None else w[rows] for w in (options.token_weights, options.kd_weights))
    return replace(options, token_weights=weights, kd_weights=kd_weights, num_active=None, normalizer=None)


def small_loss(largest_logit: float, dtype: torch.dtype) -> float:
    """SMALL_LOSS, or more where the logits are so large that their rounding alone would pass for an error of it."""
    inner = dtype if dtype == torch.float64 else torch.float32
    return max(SMALL_LOSS, ROUNDINGS * torch.finfo(inner).eps * largest_logit / TOLERANCES[dtype])


def _weight_norm(weights: Tensor | None, num_rows: int) -> float:
    """Euclidean norm of the rows' weights, divided by their sum: the size of a gradient in which each row is wrong."""
    if weights is None:
        return num_rows**-0.5
    wide = weights.to("cpu", torch.float64)
    return float(wide.norm() / wide.sum().abs())


def _on_cpu(options: CallOptions) -> CallOptions:
    """The same for the reference: the torch path on the CPU."""
    weights, kd_weights = (None if w is None else w.to("cpu") for w in (options.token_weights, options.kd_weights))
    return replace(options, token_weights=weights, kd_weights=kd_weights, backend="torch", chunk_bytes=None)


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in float64 on the CPU, some rows at a time: whole it would be four times its size."""
    for start in range(0, weight.shape[0], BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        yield block, weight[block].to("cpu", torch.float64)


@torch.no_grad()
def wide_logits(inputs: LinearInputs) -> Tensor:
    """Raw logits [R, V] in float64 on the CPU, a leaf that wants a gradient."""
    wide = inputs.hidden.to("cpu", torch.float64)
    logits = torch.empty(*inputs.sizes, dtype=torch.float64)
    for block, rows in _blocks(inputs.weight):
        logits[:, block] = wide @ rows.t()
    if inputs.bias is not None:
        logits += inputs.bias.to("cpu", torch.float64)
    return logits.requires_grad_()


def relative_errors(
    inputs: LinearInputs, values: Mapping[str, Tensor], loss: Tensor, slope: Tensor, *, least: tuple[float, float]
) -> dict[str, float]:
    """|value - truth| / |truth| (Euclidean) of the loss and of each gradient, from the reference's loss and its
    gradient by the logits, `slope` [R, V]; inf where a value is not finite. A loss below the first of `least`
    counts as that, and gradients whose slope is below the second as those of one as large."""
    hidden = inputs.hidden.to("cpu", torch.float64)
    grad_hidden = torch.zeros_like(hidden)
    squares = torch.zeros(2, dtype=torch.float64)  # of the difference and of the truth, of the head's gradient
    for block, rows in _blocks(inputs.weight):
        grad_hidden += slope[:, block] @ rows
        truth = slope[:, block].t() @ hidden
        difference = values["weight gradient"][block].to("cpu", torch.float64) - truth
        squares += torch.stack([difference.square().sum(), truth.square().sum()])
    pairs = {"hidden gradient": grad_hidden}
    if "bias gradient" in values:
        pairs["bias gradient"] = slope.sum(0)
    size_of_slope = float(slope.norm())
    grow = max(1.0, least[1] / size_of_slope) if size_of_slope > 0 else 1.0
    figures = {"loss": _ratio(abs(float(values["loss"]) - float(loss)), max(abs(float(loss)), least[0]))}
    for name, truth in pairs.items():
        difference = values[name].to("cpu", torch.float64) - truth
        figures[name] = _ratio(float(difference.norm()), grow * float(truth.norm()))
    error, size = squares.sqrt().tolist()
    return figures | {"weight gradient": _ratio(error, grow * size)}


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
