"""Per-token figures of a student without gradients, for the rules that choose tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.kernels import products
from potstill.kernels.fused_linear import Plan, chunk_terms
from potstill.kernels.types import LossSums


@dataclass(frozen=True)
class TokenStatistics:
    """Of N tokens, in nats: label_logprob [N] (0 without a label), entropy [N] at T = 1, divergence [N] (at
    the temperature asked for, on the side asked for, without T^2; 0 without a target), student_mass [N] on the kept
    ids at the student's temperature."""

    label_logprob: Tensor
    entropy: Tensor
    divergence: Tensor
    student_mass: Tensor


@torch.no_grad()
def run_statistics(plan: Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStatistics:
    names = LossSums.names()
    table = torch.zeros(len(names), hidden.shape[0], dtype=plan.weights.dtype, device=hidden.device)
    for rows in plan.chunks(hidden.shape[0]):
        slab = plan.backend.slab(rows.shape[0], weight.shape[0], weight.dtype, hidden.device)
        slab = products.logits(hidden.index_select(0, rows), weight, bias, out=slab)
        terms, _ = chunk_terms(plan, slab, rows, plan.weights[rows], with_gradient=False)
        table[:, rows] = terms.sums
    column = dict(zip(names, table.unbind(0), strict=True))
    return TokenStatistics(-column["ce"], column["entropy"], column["kd"], column["student_mass"])
