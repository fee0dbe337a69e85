"""The loss of a whole batch by chunks of rows: logits, statistics and gradient of one chunk at a time.

The gradient is taken in the forward (Mahoney, efficient_cross_entropy), so that no [N, V] tensor is ever
kept and backward only scales what is there. The weight gradient adds up in float32: sums over chunks in
bf16 lose the small ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.kernels import products
from potstill.kernels.backend import SlabTokens
from potstill.kernels.chunks import ChunkPlan
from potstill.kernels.loss_call import LinearInputs, LossCall
from potstill.kernels.types import LossSums

# Whether the last chunk's part of a 16-bit head's gradient waits for backward, where one kernel adds it, scales and
# rounds (Backend.weight_gradient), or is added in the forward, and a pass of its own scales and rounds.
KEEPS_LAST_CHUNK = False


def linear_loss(inputs: LinearInputs, call: LossCall) -> tuple[Tensor, LossSums]:
    """The loss (0-d) from hidden states and a head, differentiable in all three, and its detached parts."""
    leaves = (inputs.hidden, inputs.weight, inputs.bias)
    record = torch.is_grad_enabled()
    needs = tuple(record and value is not None and value.requires_grad for value in leaves)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        loss, sums = FusedLinearLoss.apply(*leaves, call, needs)
    return loss, LossSums.unstack(sums)


def logits_loss(logits: Tensor, call: LossCall, *, inplace: bool) -> tuple[Tensor, LossSums]:
    """The loss (0-d) from raw logits [N, V]; with `inplace` their gradient overwrites them."""
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    loss, sums = FusedLoss.apply(logits, call, needs_grad, inplace)
    return loss, LossSums.unstack(sums)


@dataclass
class LastChunk:
    """What is left of a weight gradient to be added up: slab [B, V] transposed times the tokens' rows of the hidden
    states; rows int64 [B], None: first .. first + B - 1."""

    slab: Tensor
    rows: Tensor | None
    first: int

    def states(self, hidden: Tensor) -> Tensor:
        """The tokens' rows [B, D] of the hidden states [N, D]."""
        if self.rows is not None:
            return hidden.index_select(0, self.rows)
        return hidden.narrow(0, self.first, self.slab.shape[0])


@dataclass
class Gradients:
    """Of a sum of losses, None where not wanted: hidden [N, D] in its own dtype, weight [V, D] and bias [V] in the
    accumulation dtype, or the weight's in its own where one chunk is all of it. With `last`, the weight's lacks that
    chunk, and is None where there is no other."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    last: LastChunk | None = None


def plan_chunks(call: LossCall, weight: Tensor, *, needs_weight: bool) -> ChunkPlan:
    """The rows of each chunk, and whether the last one's part of the weight gradient is left for backward."""
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    if not (KEEPS_LAST_CHUNK and needs_weight and narrow and call.backend.weight_gradient is not None):
        return ChunkPlan.even(call.num_rows, call.chunk_rows)
    row_bytes = call.backend.row_stride(weight.shape[0]) * call.backend.slab_dtype(weight.dtype).itemsize
    beside = weight.numel() * weight.element_size()
    return ChunkPlan.keeping(call.num_rows, call.chunk_rows, row_bytes=row_bytes, beside=beside)


def empty_gradients(
    call: LossCall, hidden: Tensor, weight: Tensor, plan: ChunkPlan, *, needs: tuple[bool, bool, bool]
) -> Gradients:
    """Memory for the gradients that `needs` names; 0 where no chunk will write."""
    dtype, device = call.weights.dtype, hidden.device
    make = torch.empty if plan.sizes else torch.zeros
    alone = plan.kept and len(plan.sizes) == 1
    # Nothing is added to a single chunk's product, and its factor is in already: it can be rounded at once.
    direct = len(plan.sizes) == 1 and early_factor(call, weight.dtype) is not None
    narrow = weight.dtype if direct and call.backend.slab_dtype(weight.dtype) == weight.dtype else dtype
    return Gradients(
        (torch.empty_like if call.rows is None else torch.zeros_like)(hidden) if needs[0] else None,
        make(weight.shape, dtype=narrow, device=device) if needs[1] and not alone else None,
        make(weight.shape[0], dtype=dtype, device=device) if needs[2] else None,
    )


def run_chunks(
    call: LossCall,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
    factor: Tensor | None,
) -> tuple[Tensor, Gradients]:
    """(sums [15] of losses and of the 14 figures, gradients of the first times `factor` by those of hidden, weight,
    bias that `needs` names)."""
    plan = plan_chunks(call, weight, needs_weight=needs[1])
    table = call.table()
    grads = empty_gradients(call, hidden, weight, plan, needs=needs)
    buffer = None
    for number, (part, tokens) in enumerate(call.chunks(plan.sizes)):
        first, kept = number == 0, plan.kept and number == len(plan.sizes) - 1
        if buffer is None or kept:
            buffer = slab = None  # the old one goes first: both would be there at the peak
            buffer = call.backend.slab(tokens.count, weight.shape[0], weight.dtype, hidden.device)
        states = tokens.take(hidden)
        slab = products.logits(states, weight, bias, out=buffer[: tokens.count])
        call.backend.slab_pass(slab, tokens, out=table[:, part], with_gradient=any(needs), factor=factor)
        if grads.hidden is not None:
            add_hidden_gradient(grads.hidden, slab, weight, tokens)
        if kept:
            grads.last = LastChunk(slab, tokens.rows, tokens.first)
        elif grads.weight is not None:
            products.add_weight_gradient(grads.weight, slab, states, first=first)
        if grads.bias is not None:
            products.add_bias_gradient(grads.bias, slab, first=first)
    return call.sums(table), grads


def add_hidden_gradient(grad: Tensor, slab: Tensor, weight: Tensor, tokens: SlabTokens) -> None:
    """The tokens' rows of the hidden gradient [N, D]: written to their place where they are neighbours."""
    if tokens.rows is None:
        products.hidden_gradient(slab, weight, out=tokens.take(grad))
    else:
        rows = torch.empty(tokens.count, weight.shape[1], dtype=grad.dtype, device=grad.device)
        grad.index_copy_(0, tokens.rows, products.hidden_gradient(slab, weight, out=rows))


def take_gradients(ctx: Any) -> Any:
    """What forward left for backward, once: it is scaled in place, and handed on without a copy."""
    kept, ctx.gradients = ctx.gradients, None
    if kept is None:
        raise RuntimeError(
            "backward through the sparse loss a second time: its gradients are gone after the first"
            " (retain_graph does not keep them); compute the loss again"
        )
    return kept


def early_factor(call: LossCall, dtype: torch.dtype) -> Tensor | None:
    """1 / normalizer where the gradient may hold it from the start: nothing is left to do then when the upstream
    gradient is 1. In float16 it would underflow times q, and is left for backward."""
    return None if dtype == torch.float16 else call.inverse_normalizer


def late_factor(call: LossCall, dtype: torch.dtype, upstream: Tensor) -> Tensor:
    """What early_factor left, times the upstream gradient (0-d)."""
    return upstream * call.inverse_normalizer if dtype == torch.float16 else upstream


class FusedLinearLoss(torch.autograd.Function):
    """(hidden, weight, bias, call, needs) -> (loss, sums); gradients are computed here, in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LossCall, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor]:
        flags = (needs[0], needs[1], needs[2])
        sums, grads = run_chunks(
            call, hidden, weight, bias, needs=flags, factor=early_factor(call, hidden.dtype) if any(flags) else None
        )
        # Neither inputs nor outputs, so they may be kept on ctx itself, where backward can let them go. The hidden
        # states are an input: autograd sees to it that nobody writes to them before the last chunk is added.
        ctx.gradients = grads
        if grads.last is not None:
            ctx.save_for_backward(hidden)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.call = call
        loss, figures = sums[0] * call.inverse_normalizer, sums[1:]
        ctx.mark_non_differentiable(figures)
        ctx.set_materialize_grads(False)  # the figures' gradient would be zeros, made for nobody
        return loss, figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: None) -> tuple[Any, ...]:
        grads: Gradients = take_gradients(ctx)
        call: LossCall = ctx.call
        factor = late_factor(call, ctx.dtypes[0], grad_loss)
        scale = call.backend.scale
        wide = (grads.hidden, None if grads.last else grads.weight, grads.bias)
        out = [
            None if grad is None else scale(grad, factor, dtype) for grad, dtype in zip(wide, ctx.dtypes, strict=True)
        ]
        if grads.last is not None:
            assert call.backend.weight_gradient is not None
            states = grads.last.states(ctx.saved_tensors[0])
            out[1] = call.backend.weight_gradient(grads.weight, grads.last.slab, states, factor, ctx.dtypes[1])
        return (*out, None, None)


def run_logits(
    call: LossCall, logits: Tensor, *, needs_grad: bool, inplace: bool, factor: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(sums [15] of losses and of the 14 figures, the gradient of the first times `factor` by the logits)."""
    table = call.table()
    # `.data`: the caller gave the buffer up, so its version counter need not guard it.
    grad = (logits.data if inplace else torch.empty_like(logits)) if needs_grad else None
    wanted = call.backend.slab_dtype(logits.dtype)
    direct = call.rows is None and grad is not None and grad.dtype == wanted and grad.is_contiguous()
    source = logits if logits.stride(1) == 1 else logits.contiguous()
    if direct and grad is not None:
        # A slab that is the gradient itself costs nothing: on a GPU all rows then go at once.
        sizes = [call.num_rows] if logits.is_cuda and call.num_rows else None
        for part, tokens in call.chunks(sizes):
            call.backend.slab_pass(
                grad[part],
                tokens,
                out=table[:, part],
                with_gradient=True,
                factor=factor,
                source=None if inplace else source,
            )
        return call.sums(table), grad
    buffer = torch.empty(call.largest_chunk, logits.shape[1], dtype=wanted, device=logits.device)
    for part, tokens in call.chunks():
        slab = buffer[: tokens.count]
        call.backend.slab_pass(slab, tokens, out=table[:, part], with_gradient=needs_grad, factor=factor, source=source)
        if grad is not None:
            grad.index_copy_(0, tokens.index(), slab.to(grad.dtype))
    if grad is not None and call.rows is not None:
        unused = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        unused[call.rows] = False
        grad.masked_fill_(unused[:, None], 0)
    return call.sums(table), grad


class FusedLoss(torch.autograd.Function):
    """(logits, call, needs, inplace) -> (loss, sums); the gradient by the logits is computed here."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: LossCall, needs_grad: bool, inplace: bool) -> tuple[Tensor, Tensor]:
        factor = early_factor(call, logits.dtype) if needs_grad else None
        sums, ctx.gradients = run_logits(call, logits, needs_grad=needs_grad, inplace=inplace, factor=factor)
        ctx.call, ctx.dtype = call, logits.dtype
        loss, figures = sums[0] * call.inverse_normalizer, sums[1:]
        ctx.mark_non_differentiable(figures)
        ctx.set_materialize_grads(False)  # the figures' gradient would be zeros, made for nobody
        return loss, figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: None) -> tuple[Any, ...]:
        grad = take_gradients(ctx)
        factor = late_factor(ctx.call, ctx.dtype, grad_loss)
        return ctx.call.backend.scale(grad, factor, ctx.dtype), None, None, None
