"""A slab by two streams over it: statistics, then the gradient, with all that has size k between them.

Two, because every entry of the gradient needs the row's normaliser, which is known once the whole row has been read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from potstill.kernels.backend import SlabTokens
from potstill.kernels.row_terms import FixSet, RowStats, RowTerms, build_fix_set, row_terms


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
        self, slab: Tensor, tokens: SlabTokens, *, with_gradient: bool, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        settings = tokens.settings
        fix = self.build_fix_set(
            tokens.targets, tokens.labels, tokens.rows, settings, width=tokens.width, dtype=tokens.weights.dtype
        )
        stats, state = self.row_stats(slab, fix, settings, keep_exp=with_gradient)
        terms = self.row_terms(
            stats, fix, settings, factors=tokens.factors, weights=tokens.weights, kd_weights=tokens.kd_weights
        )
        if with_gradient:
            scaled = terms
            if factor is not None:
                scaled = replace(
                    terms,
                    fix_grad=terms.fix_grad * factor,
                    dense_t=terms.dense_t * factor,
                    dense_1=terms.dense_1 * factor,
                )
            self.row_gradient(slab, state, stats, scaled, fix, settings)
        return terms.loss, terms.sums
