"""Per-token figures of a student without gradients, for the rules that choose tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.kernels import products
from potstill.kernels.loss_call import LinearInputs, LossCall
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
def run_statistics(inputs: LinearInputs, call: LossCall) -> TokenStatistics:
    """The figures of every token, chunk by chunk. The call's weights must be 1: its sums are taken as they are."""
    num_tokens, vocab_size = inputs.sizes
    device, head = inputs.hidden.device, inputs.weight
    names = LossSums.names()
    table = torch.zeros(len(names), num_tokens, dtype=call.weights.dtype, device=device)
    for rows in call.chunks(num_tokens):
        slab = call.backend.slab(rows.shape[0], vocab_size, head.dtype, device)
        slab = products.logits(inputs.hidden.index_select(0, rows), head, inputs.bias, out=slab)
        _, sums = call.backend.slab_pass(slab, call.tokens(rows), with_gradient=False)
        table[:, rows] = sums
    column = dict(zip(names, table.unbind(0), strict=True))
    return TokenStatistics(-column["ce"], column["entropy"], column["kd"], column["student_mass"])
