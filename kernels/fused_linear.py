"""The loss of a whole batch by chunks of rows: logits, statistics and gradient of one chunk at a time.

The gradient is taken in the forward (Mahoney, efficient_cross_entropy), so that no [N, V] tensor is ever
kept and backward only scales what is there. The weight gradient adds up in float32: sums over chunks in
bf16 lose the small ones. A second function recomputes in backward, for losses that are wanted per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.kernels import products
from potstill.kernels.backends import Backend
from potstill.kernels.row_terms import RowTerms
from potstill.kernels.settings import LossSettings
from potstill.kernels.types import LossSums, SparseTargetTensors


@dataclass(frozen=True)
class Plan:
    """All of a call that is not differentiated. Tensors over all N tokens, on the device of the logits."""

    settings: LossSettings
    targets: SparseTargetTensors | None
    labels: Tensor  # int64 [N]
    factors: Tensor  # [3] alpha, ce_weight, z_loss
    weights: Tensor  # [N], accumulation dtype
    kd_weights: Tensor  # [N]
    inverse_normalizer: Tensor  # 0-d
    rows: Tensor | None  # int64 [M], the tokens with a weight; None is all of them
    chunk_rows: int
    backend: Backend
    width: int

    def chunks(self, num_tokens: int) -> Iterator[Tensor]:
        """Token indices of each chunk."""
        rows = self.rows
        if rows is None:
            rows = torch.arange(num_tokens, device=self.labels.device)
        yield from (part for part in rows.split(self.chunk_rows) if part.shape[0])


def chunk_terms(
    plan: Plan,
    slab: Tensor,
    rows: Tensor,
    weights: Tensor,
    *,
    with_gradient: bool,
    factor: Tensor | None = None,
) -> tuple[RowTerms, Tensor]:
    """Loss terms of one chunk; `slab` [B, V] holds its logits and then (if asked) their gradient, times the
    0-d `factor`."""
    fix = plan.backend.build_fix_set(
        plan.targets, plan.labels, rows, plan.settings, width=plan.width, dtype=plan.weights.dtype
    )
    stats, state = plan.backend.row_stats(slab, fix, plan.settings, keep_exp=with_gradient)
    terms = plan.backend.row_terms(
        stats, fix, plan.settings, factors=plan.factors, weights=weights, kd_weights=plan.kd_weights[rows]
    )
    if with_gradient:
        if factor is not None:
            parts = (terms.fix_grad * factor, terms.dense_t * factor, terms.dense_1 * factor)
            terms = RowTerms(terms.loss, terms.sums, *parts)
        slab = plan.backend.row_gradient(slab, state, stats, terms, fix, plan.settings)
    return terms, slab


@dataclass
class Gradients:
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def run_chunks(
    plan: Plan,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    weights: Tensor,
    needs: tuple[bool, bool, bool],
    losses: Tensor | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """(sum of losses, sums [14], gradients of that sum); `losses` [N] gets each token's loss if given."""
    dtype, device = plan.weights.dtype, hidden.device
    num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
    total = torch.zeros((), dtype=dtype, device=device)
    sums = torch.zeros(len(LossSums.names()), dtype=dtype, device=device)
    all_rows = plan.rows is None
    grads = Gradients(
        (torch.empty_like if all_rows else torch.zeros_like)(hidden) if needs[0] else None,
        torch.empty(weight.shape, dtype=dtype, device=device) if needs[1] else None,
        torch.zeros(vocab_size, dtype=dtype, device=device) if needs[2] else None,
    )
    num_rows = num_tokens if plan.rows is None else plan.rows.shape[0]
    buffer = plan.backend.slab(min(plan.chunk_rows, num_rows), vocab_size, weight.dtype, device)
    first = True
    for rows in plan.chunks(num_tokens):
        states = hidden.index_select(0, rows)
        slab = products.logits(states, weight, bias, out=buffer[: rows.shape[0]])
        terms, slab = chunk_terms(plan, slab, rows, weights[rows], with_gradient=any(needs))
        total += terms.loss.sum()
        sums += terms.sums.sum(1)
        if losses is not None:
            losses[rows] = terms.loss
        if grads.hidden is not None:
            grads.hidden[rows] = products.hidden_gradient(slab, weight)
        if grads.weight is not None:
            products.add_weight_gradient(grads.weight, slab, states, first=first)
        if grads.bias is not None:
            grads.bias += slab.sum(0, dtype=dtype)
        first = False
    if first and grads.weight is not None:
        grads.weight.zero_()
    return total, sums, grads


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
    """(hidden, weight, bias, plan, needs) -> (loss, sums); gradients are computed here, in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor]:
        flags = (needs[0], needs[1], needs[2])
        total, sums, grads = run_chunks(plan, hidden, weight, bias, weights=plan.weights, needs=flags)
        # Neither inputs nor outputs, so they may be kept on ctx itself, where backward can let them go.
        ctx.gradients = (grads.hidden, grads.weight, grads.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.plan = plan
        ctx.mark_non_differentiable(sums)
        return total * plan.inverse_normalizer, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Any, ...]:
        # 1 / normalizer comes in here and not in the forward: times q it would underflow in float16 slabs.
        factor = grad_loss * ctx.plan.inverse_normalizer
        scale = ctx.plan.backend.scale
        out = [
            None if grad is None else scale(grad, factor, dtype)
            for grad, dtype in zip(take_gradients(ctx), ctx.dtypes, strict=True)
        ]
        return (*out, None, None)


class LinearTokenLosses(torch.autograd.Function):
    """(hidden, weight, bias, plan) -> losses [N]; backward recomputes the logits chunk by chunk, because
    the upstream gradient of each token is known only then."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        losses = torch.zeros(hidden.shape[0], dtype=plan.weights.dtype, device=hidden.device)
        no_grads = (False, False, False)
        run_chunks(plan, hidden, weight, bias, weights=plan.weights, needs=no_grads, losses=losses)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.plan = plan
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        weights = ctx.plan.weights * grad_losses.to(ctx.plan.weights.dtype)
        _, _, grads = run_chunks(ctx.plan, hidden, weight, bias, weights=weights, needs=needs)
        pairs = zip((grads.hidden, grads.weight, grads.bias), (hidden, weight, bias), strict=True)
        return (*(None if grad is None else grad.to(of.dtype) for grad, of in pairs), None)


def run_logits(
    plan: Plan, logits: Tensor, *, needs_grad: bool, inplace: bool, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sum of losses, sums [14], the gradient of that sum times `factor` by the logits)."""
    dtype, num_tokens = plan.weights.dtype, logits.shape[0]
    total = torch.zeros((), dtype=dtype, device=logits.device)
    sums = torch.zeros(len(LossSums.names()), dtype=dtype, device=logits.device)
    # `.data`: the caller gave the buffer up, so its version counter need not guard it.
    grad = (logits.data if inplace else torch.empty_like(logits)) if needs_grad else None
    wanted = plan.backend.slab_dtype(logits.dtype)
    direct = plan.rows is None and grad is not None and grad.dtype == wanted and grad.is_contiguous()
    # A slab that is the gradient itself costs nothing: on a GPU all rows then go at once.
    chunk_rows = num_tokens if direct and logits.is_cuda else plan.chunk_rows
    every = torch.arange(num_tokens, device=logits.device) if plan.rows is None else plan.rows
    for start in range(0, every.shape[0], max(1, chunk_rows)):
        part = slice(start, start + chunk_rows)
        rows = every[part]
        if direct and grad is not None:
            slab = grad[part] if inplace else grad[part].copy_(logits[part])
        else:
            slab = logits.index_select(0, rows).to(wanted)
        terms, slab = chunk_terms(plan, slab, rows, plan.weights[rows], with_gradient=needs_grad, factor=factor)
        total += terms.loss.sum()
        sums += terms.sums.sum(1)
        if grad is not None and not direct:
            grad[rows] = slab.to(grad.dtype)
    if grad is not None and plan.rows is not None:
        unused = torch.ones(num_tokens, dtype=torch.bool, device=logits.device)
        unused[plan.rows] = False
        grad.masked_fill_(unused[:, None], 0)
    return total, sums, grad


class FusedLoss(torch.autograd.Function):
    """(logits, plan, needs, inplace) -> (loss, sums); the gradient by the logits is computed here."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, plan: Plan, needs_grad: bool, inplace: bool) -> tuple[Tensor, Tensor]:
        # With 1 / normalizer in it already, the gradient needs no further pass when the upstream one is 1.
        # In float16 it would underflow times q, and is left for backward.
        late = logits.dtype == torch.float16
        factor = None if late else plan.inverse_normalizer
        total, sums, ctx.gradients = run_logits(plan, logits, needs_grad=needs_grad, inplace=inplace, factor=factor)
        ctx.plan, ctx.late = plan, late
        ctx.mark_non_differentiable(sums)
        return total * plan.inverse_normalizer, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Any, ...]:
        grad = take_gradients(ctx)
        factor = grad_loss * ctx.plan.inverse_normalizer if ctx.late else grad_loss
        return ctx.plan.backend.scale(grad, factor, grad.dtype), None, None, None
