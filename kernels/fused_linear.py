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
from potstill.kernels.loss_call import LinearInputs, LossCall
from potstill.kernels.types import LossSums


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
class Gradients:
    """Of a sum of losses, None where not wanted: hidden [N, D] in its own dtype, weight [V, D] and bias [V] in the
    accumulation dtype."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def run_chunks(
    call: LossCall, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Gradients]:
    """(sums [15] of losses and of the 14 figures, gradients of the first by those of hidden, weight, bias that `needs`
    names)."""
    dtype, device = call.weights.dtype, hidden.device
    vocab_size = weight.shape[0]
    table = call.table()
    all_rows = call.rows is None
    grads = Gradients(
        (torch.empty_like if all_rows else torch.zeros_like)(hidden) if needs[0] else None,
        torch.empty(weight.shape, dtype=dtype, device=device) if needs[1] else None,
        torch.zeros(vocab_size, dtype=dtype, device=device) if needs[2] else None,
    )
    buffer = call.backend.slab(min(call.chunk_rows, call.num_rows), vocab_size, weight.dtype, device)
    first = True
    for part, tokens in call.chunks():
        states = tokens.take(hidden)
        slab = products.logits(states, weight, bias, out=buffer[: tokens.count])
        call.backend.slab_pass(slab, tokens, out=table[:, part], with_gradient=any(needs))
        if grads.hidden is not None:
            product = products.hidden_gradient(slab, weight)
            if tokens.rows is None:
                grads.hidden[part] = product
            else:
                grads.hidden.index_copy_(0, tokens.rows, product)
        if grads.weight is not None:
            products.add_weight_gradient(grads.weight, slab, states, first=first)
        if grads.bias is not None:
            grads.bias += slab.sum(0, dtype=dtype)
        first = False
    if first and grads.weight is not None:
        grads.weight.zero_()
    return table.sum(1), grads


def take_gradients(ctx: Any) -> Any:
    """What forward left for backward, once: it is scaled in place, and handed on without a copy."""
    kept, ctx.gradients = ctx.gradients, None
    if kept is None:
        raise RuntimeError(
            "backward through the sparse loss a second time: its gradients are gone after the first"
            " (retain_graph does not keep them); compute the loss again"
        )
    return kept


class FusedLinearLoss(torch.autograd.Function):
    """(hidden, weight, bias, call, needs) -> (loss, sums); gradients are computed here, in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: LossCall, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor]:
        flags = (needs[0], needs[1], needs[2])
        sums, grads = run_chunks(call, hidden, weight, bias, needs=flags)
        # Neither inputs nor outputs, so they may be kept on ctx itself, where backward can let them go.
        ctx.gradients = (grads.hidden, grads.weight, grads.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.call = call
        loss, figures = sums[0] * call.inverse_normalizer, sums[1:]
        ctx.mark_non_differentiable(figures)
        return loss, figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Any, ...]:
        # 1 / normalizer comes in here and not in the forward: times q it would underflow in float16 slabs.
        factor = grad_loss * ctx.call.inverse_normalizer
        scale = ctx.call.backend.scale
        out = [
            None if grad is None else scale(grad, factor, dtype)
            for grad, dtype in zip(take_gradients(ctx), ctx.dtypes, strict=True)
        ]
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
    if direct and grad is not None:
        # A slab that is the gradient itself costs nothing: on a GPU all rows then go at once.
        chunk_rows = call.num_rows if logits.is_cuda else call.chunk_rows
        source = None if inplace else logits
        for part, tokens in call.parts(None, call.num_rows, chunk_rows):
            call.backend.slab_pass(
                grad[part], tokens, out=table[:, part], with_gradient=True, factor=factor, source=source
            )
        return table.sum(1), grad
    buffer = torch.empty(min(call.chunk_rows, call.num_rows), logits.shape[1], dtype=wanted, device=logits.device)
    for part, tokens in call.chunks():
        slab = buffer[: tokens.count]
        call.backend.slab_pass(
            slab, tokens, out=table[:, part], with_gradient=needs_grad, factor=factor, source=logits
        )
        if grad is not None:
            grad.index_copy_(0, tokens.index(), slab.to(grad.dtype))
    if grad is not None and call.rows is not None:
        unused = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        unused[call.rows] = False
        grad.masked_fill_(unused[:, None], 0)
    return table.sum(1), grad


class FusedLoss(torch.autograd.Function):
    """(logits, call, needs, inplace) -> (loss, sums); the gradient by the logits is computed here."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: LossCall, needs_grad: bool, inplace: bool) -> tuple[Tensor, Tensor]:
        # With 1 / normalizer in it already, the gradient needs no further pass when the upstream one is 1.
        # In float16 it would underflow times q, and is left for backward.
        late = logits.dtype == torch.float16
        factor = None if late else call.inverse_normalizer
        sums, ctx.gradients = run_logits(call, logits, needs_grad=needs_grad, inplace=inplace, factor=factor)
        ctx.call, ctx.late = call, late
        loss, figures = sums[0] * call.inverse_normalizer, sums[1:]
        ctx.mark_non_differentiable(figures)
        return loss, figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Any, ...]:
        grad = take_gradients(ctx)
        factor = grad_loss * ctx.call.inverse_normalizer if ctx.late else grad_loss
        return ctx.call.backend.scale(grad, factor, grad.dtype), None, None, None
