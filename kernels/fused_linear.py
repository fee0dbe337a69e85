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
from potstill.kernels.objective import RowTerms
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
    plan: Plan, slab: Tensor, rows: Tensor, weights: Tensor, *, with_gradient: bool
) -> tuple[RowTerms, Tensor]:
    """Loss terms of one chunk; `slab` [B, V] holds its logits and then (if asked) their gradient."""
    fix = plan.backend.build_fix_set(
        plan.targets, plan.labels, rows, plan.settings, width=plan.width, dtype=plan.weights.dtype
    )
    stats, state = plan.backend.row_stats(slab, fix, plan.settings, keep_exp=with_gradient)
    terms = plan.backend.row_terms(
        stats, fix, plan.settings, factors=plan.factors, weights=weights, kd_weights=plan.kd_weights[rows]
    )
    if with_gradient:
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


class FusedLinearLoss(torch.autograd.Function):
    """(hidden, weight, bias, plan, needs) -> (loss, sums); gradients are computed here, in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor]:
        flags = (needs[0], needs[1], needs[2])
        total, sums, grads = run_chunks(plan, hidden, weight, bias, weights=plan.weights, needs=flags)
        ctx.save_for_backward(plan.inverse_normalizer, grads.hidden, grads.weight, grads.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums)
        return total * plan.inverse_normalizer, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Any, ...]:
        inverse, *grads = ctx.saved_tensors
        factor = grad_loss * inverse
        out = [
            None if grad is None else products.scaled(grad, factor, dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
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


def run_logits(plan: Plan, logits: Tensor, *, needs_grad: bool, inplace: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(sum of losses, sums [14], its gradient by the logits)."""
    dtype = plan.weights.dtype
    total = torch.zeros((), dtype=dtype, device=logits.device)
    sums = torch.zeros(len(LossSums.names()), dtype=dtype, device=logits.device)
    # `.data`: the caller gave the buffer up, so its version counter need not guard it.
    grad = (logits.data if inplace else torch.empty_like(logits)) if needs_grad else None
    wanted = plan.backend.slab_dtype(logits.dtype)
    for rows in plan.chunks(logits.shape[0]):
        slab = logits.index_select(0, rows).to(wanted)
        terms, slab = chunk_terms(plan, slab, rows, plan.weights[rows], with_gradient=needs_grad)
        total += terms.loss.sum()
        sums += terms.sums.sum(1)
        if grad is not None:
            grad[rows] = slab.to(grad.dtype)
    if grad is not None and plan.rows is not None:
        unused = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        unused[plan.rows] = False
        grad.masked_fill_(unused[:, None], 0)
    return total, sums, grad


def run_whole_logits(plan: Plan, logits: Tensor, *, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As run_logits with a gradient, for all rows at once and a slab that is the gradient: no copies."""
    slab = logits.data if inplace else logits.detach().clone(memory_format=torch.contiguous_format)
    rows = torch.arange(logits.shape[0], device=logits.device)
    terms, slab = chunk_terms(plan, slab, rows, plan.weights, with_gradient=True)
    return terms.loss.sum(), terms.sums.sum(1), slab


class FusedLoss(torch.autograd.Function):
    """(logits, plan, needs, inplace) -> (loss, sums); the gradient by the logits is computed here."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, plan: Plan, needs_grad: bool, inplace: bool) -> tuple[Tensor, Tensor]:
        same = plan.backend.slab_dtype(logits.dtype) == logits.dtype and logits.is_contiguous()
        # The torch passes make copies per row block anyway and run in chunks for the cache's sake.
        whole = plan.backend.name == "triton" and same and plan.rows is None and logits.shape[0] > 0
        grad: Tensor | None
        if whole and needs_grad:
            total, sums, grad = run_whole_logits(plan, logits, inplace=inplace)
        else:
            total, sums, grad = run_logits(plan, logits, needs_grad=needs_grad, inplace=inplace)
        ctx.save_for_backward(plan.inverse_normalizer, grad)
        ctx.mark_non_differentiable(sums)
        return total * plan.inverse_normalizer, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Any, ...]:
        inverse, grad = ctx.saved_tensors
        return products.scaled(grad, grad_loss * inverse, grad.dtype), None, None, None
