"""Configuration of the sources of rows: one corpus, or several under names, each with stores of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from potstill.common.config import StorePlace, StrictModel

if TYPE_CHECKING:
    from potstill.student_train.config.stages import Objective, Stage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of a source: a part of names of metrics and of keys
PLAIN_NAME = "tokens"  # the only source of a run that names none


class SourceConfig(StrictModel):
    """A tokens store to draw rows from, and the stores over it."""

    tokens: StorePlace = Field(description="Sealed tokens store: folder or URL")
    targets: dict[str, StorePlace] = Field(default_factory=dict, description="Name -> targets store over its tokens")
    scores: dict[str, StorePlace] = Field(default_factory=dict, description="Name -> scores store over its tokens")
    heldout: StorePlace | None = Field(default=None, description="Tokens store for evaluation of this source alone")
    heldout_targets: StorePlace | None = Field(default=None, description="Targets store over its heldout")

    @model_validator(mode="after")
    def _names(self) -> SourceConfig:
        check_store_names(self.targets, self.scores)
        if self.heldout_targets is not None and self.heldout is None:
            raise ValueError("heldout_targets needs heldout")
        return self


@dataclass(frozen=True)
class NamedSource:
    """A source as the configuration has it. key: what stands before its `tokens` and `targets`, such as `data`."""

    name: str
    key: str
    config: SourceConfig

    @property
    def store_names(self) -> frozenset[str]:
        """Names of its targets and scores."""
        return frozenset({*self.config.targets, *self.config.scores})


def named_sources(
    tokens: Any, targets: Mapping[str, Any], scores: Mapping[str, Any], sources: Mapping[str, SourceConfig]
) -> tuple[NamedSource, ...]:
    """The sources in the order of their row ids: those of data.sources, or the one of data.tokens."""
    if sources:
        return tuple(NamedSource(name, f"data.sources.{name}", config) for name, config in sources.items())
    config = SourceConfig.model_construct(tokens=tokens, targets=dict(targets), scores=dict(scores))
    return (NamedSource(PLAIN_NAME, "data", config),)


def check_store_names(targets: Mapping[str, Any], scores: Mapping[str, Any], *, key: str = "") -> None:
    """Refuse names of joined stores that would be taken for something else. Raises ValueError."""
    twice = sorted(set(targets) & set(scores))
    if twice:
        raise ValueError(f"{key}targets and {key}scores both name {twice}; names must differ")
    if "student" in {*targets, *scores}:
        raise ValueError("'student' cannot name a store: token selectors use it for the student itself")


def check_sources(sources: Mapping[str, SourceConfig]) -> None:
    """Refuse names that cannot stand in metrics, and one name for two kinds of stores. Raises ValueError."""
    for name in sources:
        if not NAME.fullmatch(name):
            raise ValueError(f"data.sources: {name!r} is no name; take letters, digits, _ and -")
    kinds: dict[str, tuple[str, str]] = {}
    for name, source in sources.items():
        for kind in ("targets", "scores"):
            for store in getattr(source, kind):
                other, where = kinds.setdefault(store, (kind, name))
                if other != kind:
                    raise ValueError(
                        f"data.sources.{name}.{kind} names {store!r}, which is one of the {other} of "
                        f"data.sources.{where}; a name must be of one kind in all sources"
                    )


def check_mix(mix: Mapping[str, float]) -> None:
    """Refuse shares that say nothing. Raises ValueError that names the source."""
    for name, share in mix.items():
        if not math.isfinite(share) or share < 0:
            raise ValueError(f"mix.{name} is {share}; expected a share of the rows, a number from 0 on")
    if not any(share > 0 for share in mix.values()):
        raise ValueError("mix gives no source a share above 0; name at least one")


def trains_without_targets(stage: Stage, objective: Objective) -> bool:
    """Whether rows that have no targets are trained on all the same: on their labels (off_kd ce)."""
    return (objective.off_kd if stage.off_kd is None else stage.off_kd) == "ce"


def stage_sources(stage: Stage, sources: Sequence[NamedSource], *, key: str) -> tuple[NamedSource, ...]:
    """The sources that a stage draws from, in the order of their row ids. Raises ValueError that names the key."""
    if stage.mix is None:
        return tuple(sources)
    names = [source.name for source in sources]
    if sources[0].key == "data":
        raise ValueError(f"{key}.mix names sources, but the run has one tokens store, data.tokens; use data.sources")
    for name in stage.mix:
        if name not in names:
            raise ValueError(f"{key}.mix names {name!r}; data.sources has {names}")
    return tuple(source for source in sources if stage.mix.get(source.name, 0.0) > 0)


def check_stage_stores(
    stage: Stage, objective: Objective, sources: Sequence[NamedSource], *, key: str, scored: str | None = None
) -> None:
    """Every store that a stage reads must be one of each source that it draws from. Raises ValueError naming both.

    scored: name of what the run scores itself, of every source.
    """
    sources = stage_sources(stage, sources, key=key)
    _check_targets(stage, objective, sources, key)
    wanted = {ref.store: f"{key}.rows.score" for ref in (stage.rows.score.of if stage.rows else ())}
    if stage.tokens is not None:
        wanted |= dict.fromkeys(stage.tokens.stores(), f"{key}.tokens")
    if stage.weights is not None:
        wanted[stage.weights.store] = f"{key}.weights.store"
    for source in sources:
        for name, where in wanted.items():
            if name not in source.store_names and name != scored:
                of = "" if source.key == "data" else f", which {source.key} has not"
                raise ValueError(f"{where} names store {name!r}{of}; known: {sorted(source.store_names)}")


def target_names(stage: Stage, sources: Sequence[NamedSource], *, key: str) -> tuple[str, ...]:
    """The targets stores that a stage learns from, at one step or another. Raises ValueError that names the key."""
    try:
        return stage.target_names(dict.fromkeys(name for source in sources for name in source.config.targets))
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from error


def _check_targets(stage: Stage, objective: Objective, sources: Sequence[NamedSource], key: str) -> None:
    """Each source of a stage names its own stores under the stage's targets, or its rows can do without."""
    where = f"{key}.targets" if stage.targets_clock is None else f"{key}.targets_clock"
    for name in target_names(stage, sources, key=key):
        _check_target(name, stage, objective, sources, where)


def _check_target(name: str, stage: Stage, objective: Objective, sources: Sequence[NamedSource], where: str) -> None:
    lacking = [source for source in sources if name not in source.config.targets]
    if not lacking:
        return
    first = lacking[0]
    message = f"{where} names {name!r}; {first.key}.targets has {sorted(first.config.targets)}"
    if len(lacking) == len(sources):
        raise ValueError(message)
    if not trains_without_targets(stage, objective):
        raise ValueError(
            f"{message}: give that source a store of this name, leave it out of the mix, or let its rows be trained on "
            "their labels alone (off_kd: ce)"
        )
    if stage.tokens is not None and stage.tokens.entry.needs_targets:
        raise ValueError(f"{message}, but tokens.policy {stage.tokens.policy} needs the targets of every row")
