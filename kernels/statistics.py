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
    ids at the student's temperature; correct [N]: 1 where the label is the most probable token (a tie counts), else
    0."""

    label_logprob: Tensor
    entropy: Tensor
    divergence: Tensor
    student_mass: Tensor
    correct: Tensor


@torch.no_grad()
def run_statistics(inputs: LinearInputs, call: LossCall) -> TokenStatistics:
    """The figures of every token, chunk by chunk. The call's weights must be 1: its sums are taken as they are."""
    vocab_size = inputs.sizes[1]
    device, head = inputs.hidden.device, inputs.weight
    table = call.table()
    buffer = call.backend.slab(call.largest_chunk, vocab_size, head.dtype, device)
    for part, tokens in call.chunks():
        slab = products.logits(tokens.take(inputs.hidden), head, inputs.bias, out=buffer[: tokens.count])
        call.backend.slab_pass(slab, tokens, out=table[:, part], with_gradient=False)
    column = dict(zip(LossSums.names(), table[1:].unbind(0), strict=True))
    figures = (column[name] for name in ("entropy", "kd", "student_mass", "correct"))
    return TokenStatistics(-column["ce"], *figures)
