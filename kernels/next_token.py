"""The choosing of a next token from logits: the most probable one, or a draw that only its own name decides.

A draw is named by (seed, unit, number, position): the same continuation of the same document draws alike in any
batch, on any rank, after any resume. Logits may differ in their last bits between batches; draws do not.
"""

import torch
from torch import Tensor

from potstill.kernels.counter_random import philox

_MASK = 0xFFFFFFFF


def draw_uniforms(*, seed: int, units: Tensor, numbers: Tensor, positions: Tensor) -> Tensor:
    """One uniform number in (0, 1) for each name, [B] float64.

    seed: any integer; units int64 [B] >= 0 (of a document, a row); numbers int64 [B], 0 .. 2^32 - 1 (which continuation
    of the unit); positions int64 [B], 0 .. 2^32 - 1 (of the token in the continuation).
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    first, second, *_ = philox((units & _MASK, units >> 32, numbers & _MASK, positions & _MASK), key)
    # 52 bits: with 32 alone ids of probability below 2^-32 could never come.
    return (((first << 20) | (second >> 12)).double() + 0.5) * 2.0**-52


def greedy_tokens(logits: Tensor) -> Tensor:
    """The most probable id of each row, the lowest of equal ones: logits [B, V] -> int64 [B]."""
    return logits.argmax(-1)


def drawn_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0) -> Tensor:
    """Ids int64 [B] drawn from softmax(logits / temperature), logits [B, V], by uniforms in (0, 1), [B].

    top_p: only the smallest set of most probable ids whose mass reaches it is drawn from (nucleus sampling, Holtzman et
    al. 2020, arXiv 1904.09751), of equal ids the lowest; 1: every id. Inverse of the distribution function in float64.
    """
    probabilities = (logits.double() / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the mass of what is more probable; 0 for the first, which always stays
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, ids, ordered)
    ends = probabilities.cumsum(-1)
    # Rounding can put a draw on the very end, behind the last id with any mass.
    at = torch.minimum(uniforms.to(ends.device)[:, None] * ends[:, -1:], ends[:, -1:] * (1.0 - 2.0**-52))
    return torch.searchsorted(ends, at, right=True)[:, 0]
