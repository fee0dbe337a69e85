"""Which rows of a targets store a run will read, from its plan: before the teacher has run, and before the run starts.

A stage of a curriculum reads few rows of a store that only it names; a series of checkpoints, one store each, would
otherwise cost as many whole dumps (`potstill dump --only-rows-of`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.storage import StoreReader, held_rows, missing_text
from potstill.student_train.config.sources import NamedSource
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan, total_steps
from potstill.student_train.curriculum.row_pools import PlanSource
from potstill.student_train.curriculum.row_selector import needed_stats
from potstill.student_train.data.clocks import configured_clocks
from potstill.student_train.data.node import expect_statistics, reader_options
from potstill.student_train.data.opening import open_store
from potstill.student_train.data.stores import Stores, index_digests, unscored
from potstill.student_train.model.loss_terms import term_stores

Int64 = NDArray[np.int64]
ROWS_AT_ONCE = 1 << 17  # of which the order is worked out: less overhead than batch by batch


@dataclass(frozen=True)
class NamedStore:
    """A targets store of a source, as the configuration names it."""

    source: NamedSource
    name: str

    @property
    def key(self) -> str:
        """Its key in the configuration."""
        return f"{self.source.key}.targets.{self.name}"


def rows_read(plan: CurriculumPlan, name: str) -> Int64:
    """Global ids of the rows that the steps of the run may read of the stores called `name`, ascending.

    Raises UserError where the run chooses them by scores that it makes itself.
    """
    mask = np.zeros(plan.num_rows, np.bool_)
    for first, end in _reading_spans(plan, name):
        if not plan.rows_are_decided(first):
            raise UserError(
                f"which rows the run reads of store {name!r} is decided while it trains (step {first} is of stage "
                f"{plan.segment(first).span.name!r}, which ranks rows by rescoring); dump all rows of that store"
            )
        mask[plan.rows_of(first, end)] = True
    return np.flatnonzero(mask)


def _reading_spans(plan: CurriculumPlan, name: str) -> Iterator[tuple[int, int]]:
    """Steps [first, end) of one segment, and at most so many at once, that may read the stores of that name."""
    most = max(1, ROWS_AT_ONCE // plan.global_batch)
    first: int | None = None
    for step in range(plan.total_steps + 1):
        reads = step < plan.total_steps and name in plan.may_join(step)
        if first is not None:
            if reads and step - first < most and plan.segment(step) is plan.segment(first):
                continue
            yield first, step
        first = step if reads else None


def rows_to_dump(config: TrainConfig, *, output: str, tokens: str, name: str | None = None) -> Int64:
    """Rows of the tokens store `tokens` that the run of `config` reads of the targets store that `output` will be.

    `name`: of the store in data.targets; None finds the one at that place. Row ids are of that tokens store, ascending.
    The stores that rows are selected by must be there; no targets store need be otherwise. Raises UserError.
    """
    wanted = _named_store(config, output, name)
    named = config.data.named_sources()
    plan = _plan(config, wanted)
    place = open_store(wanted.source.config.tokens, "tokens", f"{wanted.source.key}.tokens")
    if StoreReader(tokens).digest != place.digest:
        raise UserError(
            f"tokens {tokens} is not the store {wanted.source.config.tokens} that {wanted.key} is over in the run; "
            "dump the tokens that the run trains on"
        )
    number = named.index(wanted.source)
    rows = rows_read(plan, wanted.name)
    first, end = plan.source_bounds(number)
    found = rows[(rows >= first) & (rows < end)] - first
    if not len(found):
        raise UserError(f"no step of the run reads {wanted.key}; see its stages (targets, tokens, weights)")
    return found


def check_rows_held(plan: CurriculumPlan, stores: Stores) -> None:
    """Refuse a targets store that was dumped for fewer rows than the run reads of it. Raises UserError naming one."""
    for number, source in enumerate(stores.sources):
        first, end = plan.source_bounds(number)
        for name, reader in source.joined.items():
            held = held_rows(reader)
            if held is None:
                continue
            rows = rows_read(plan, name)
            missing = np.setdiff1d(rows[(rows >= first) & (rows < end)] - first, held)
            if len(missing):
                raise UserError(
                    f"store {name!r}: the run reads {len(missing)} rows that it lacks. "
                    f"{missing_text(reader, int(missing[0]))}"
                )


def _named_store(config: TrainConfig, output: str, name: str | None) -> NamedStore:
    every = [(NamedStore(source, own), place) for source in config.data.named_sources()
             for own, place in source.config.targets.items()]  # fmt: skip
    found = [store for store, place in every if (_same_place(place, output) if name is None else store.name == name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{store.key} = {place}" for store, place in every) or "none"
    if not found:
        what = f"at {output}" if name is None else f"called {name!r}"
        raise UserError(f"the run names no targets store {what}; it names {known}: write to such a place, or say which")
    keys = ", ".join(store.key for store in found)
    raise UserError(f"the run names {len(found)} targets stores so ({keys}); name one at a place of its own")


def _plan(config: TrainConfig, wanted: NamedStore) -> CurriculumPlan:
    """The run's plan from its tokens stores and the stores that rows are selected by, and no others."""
    names = frozenset().union(*(needed_stats(stage.rows) for stage in config.curriculum))
    if wanted.name in names:
        raise UserError(
            f"the rows of the run are selected by {wanted.key} itself, which is to be dumped; dump all rows, or select "
            "by another store (potstill score)"
        )
    sources, row_length = [], 0
    for named in config.data.named_sources():
        options = reader_options(config.data, named.config.tokens)
        tokens = open_store(named.config.tokens, "tokens", f"{named.key}.tokens", **options)
        row_length = tokens.spec.row_length
        readers: dict[str, StoreReader] = {}
        for kind, group in (("targets", named.config.targets), ("scores", named.config.scores)):
            for name in sorted(names & group.keys()):
                options = reader_options(config.data, group[name])
                readers[name] = open_store(group[name], kind, f"{named.key}.{kind}.{name}", **options)
                expect_statistics(config, name, readers[name])
        sources.append(
            PlanSource(
                named.name,
                tokens.num_rows,
                {name: reader.row_stats for name, reader in readers.items()} | unscored(config, tokens.num_rows),
                node=tokens.shared_by,
                digests=index_digests(readers),
            )
        )
    steps = total_steps(config, row_length=row_length)
    return CurriculumPlan(
        config,
        total_steps=steps,
        sources=sources,
        term_stores=term_stores(config.model),
        clocks=configured_clocks(config),
    )


def _same_place(one: Path | str, other: str) -> bool:
    if isinstance(one, str) or "://" in other:
        return str(one).rstrip("/") == other.rstrip("/")
    return os.path.realpath(one) == os.path.realpath(other)
