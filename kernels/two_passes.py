"""A slab by two streams over it: statistics, then the gradient, with all that has size k between them.

Two, because every entry of the gradient needs the row's normaliser, which is known once the whole row has been read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import checks
from potstill.kernels.backend import SlabTokens
from potstill.kernels.row_terms import FixSet, RowStats, RowTerms, build_fix_set, row_terms


def take_logits(slab: Tensor, source: Tensor, tokens: SlabTokens) -> None:
    """The tokens' rows of `source` [N, V] into the slab [B, V], whose dtype may be wider."""
    if tokens.rows is not None and source.dtype == slab.dtype:
        torch.index_select(source, 0, tokens.rows, out=slab)
    else:
        slab.copy_(tokens.take(source))


def clear_rows(slab: Tensor, unused: Tensor) -> None:
    """0 for the logits of the tokens `unused` (bool [B]): whatever they hold must reach neither loss nor gradient."""
    # A CPU may look; on a GPU the look would cost more than the pass.
    if not checks.reads_values(slab.device) or bool(unused.any()):
        slab.masked_fill_(unused[:, None], 0)


@dataclass(frozen=True)
class TwoPasses:
    """A SlabPass (backend.py) made of a backend's two streams and the functions between them.

    row_stats(slab, fix, settings, keep_exp=) -> (RowStats, what row_gradient needs besides).
    row_gradient(slab, that, stats, terms, fix, settings): the gradient, in the slab.
    build_fix_set, row_terms: those of row_terms.py, or these compiled.
    """

    row_stats: Callable[..., tuple[RowStats, Any]]
    row_gradient: Callable[..., Tensor]
    build_fix_set: Callable[..., FixSet] = build_fix_set
    row_terms: Callable[..., RowTerms] = row_terms

    def __call__(
        self,
        slab: Tensor,
        tokens: SlabTokens,
        *,
        out: Tensor,
        with_gradient: bool,
        factor: Tensor | None = None,
        source: Tensor | None = None,
    ) -> None:
        settings = tokens.settings
        weights = tokens.take(tokens.weights)
        unused = weights == 0
        if source is not None:
            take_logits(slab, source, tokens)
        clear_rows(slab, unused)
        fix = self.build_fix_set(
            tokens.targets,
            tokens.labels,
            tokens.index(),
            settings,
            width=tokens.width,
            vocab_size=slab.shape[1],
            dtype=weights.dtype,
        )
        stats, state = self.row_stats(slab, fix, settings, keep_exp=with_gradient)
        terms = self.row_terms(
            stats,
            fix,
            settings,
            factors=tokens.factors,
            weights=weights,
            kd_weights=tokens.take(tokens.kd_weights),
        )
        out[0].copy_(terms.loss)
        out[1:].copy_(terms.sums)
        out.masked_fill_(unused, 0)
        if with_gradient:
            if factor is not None:
                terms = replace(
                    terms,
                    fix_grad=terms.fix_grad * factor,
                    dense_t=terms.dense_t * factor,
                    dense_1=terms.dense_1 * factor,
                )
            self.row_gradient(slab, state, stats, terms, fix, settings)
