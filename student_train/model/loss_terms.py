"""The table of loss terms. A new term is one class (see term.py) and one entry here; docs/student.md shows how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from potstill.student_train.config.train import ModelConfig
from potstill.student_train.model.head import SparseLoss
from potstill.student_train.model.router import RouterBalance
from potstill.student_train.model.term import LossTerm

# In the order in which they are added up.
LOSS_TERMS: tuple[type[LossTerm], ...] = (SparseLoss, RouterBalance)


def build_terms(model: ModelConfig, config: Any) -> tuple[LossTerm, ...]:
    """The terms that are on for a student. Raises UserError where one does not fit the architecture."""
    built = (kind.build(model, config) for kind in LOSS_TERMS)
    return tuple(term for term in built if term is not None)


def term_stores(model: ModelConfig) -> frozenset[str]:
    """Names of the stores that terms read at every step."""
    return frozenset().union(*(kind.stores(model) for kind in LOSS_TERMS))


def sum_names(terms: Iterable[LossTerm]) -> tuple[str, ...]:
    """Names of the sums that a training forward gives, in order. Raises ValueError when two terms share a name."""
    names = tuple(name for term in terms for name in term.sum_names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two loss terms have sums named {twice}; names must differ")
    return names


def term_parts() -> Mapping[str, tuple[str, str]]:
    """Figures of metrics that are a mean of a term: name -> (sum, sum of weights); also of terms that are off."""
    return {name: part for kind in LOSS_TERMS for name, part in kind.parts.items()}
