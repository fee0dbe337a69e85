"""Open the stores of a run and check everything that can be checked before a model exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.kernels.checks import check_draws
from potstill.kernels.settings import LossSettings, stored_temperature
from potstill.kernels.types import KernelInputError
from potstill.storage import RunSpec, Source, StoreError, StoreReader
from potstill.storage.loading.sources import tokens_difference
from potstill.student_train.config.curves import Scalar
from potstill.student_train.config.sources import NamedSource, stage_sources, target_names
from potstill.student_train.config.stages import Stage
from potstill.student_train.config.token_policies import TokenSelector
from potstill.student_train.config.train import DataConfig, TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan, total_steps
from potstill.student_train.curriculum.row_pools import PlanSource
from potstill.student_train.curriculum.row_selector import needed_stats
from potstill.student_train.curriculum.schedules import scalar_bounds
from potstill.student_train.curriculum.step_objective import distillation_settings, stage_value
from potstill.student_train.data.clocks import stage_clocks
from potstill.student_train.data.heldout_stores import HeldoutStores, open_heldout
from potstill.student_train.data.node import expect_statistics, reader_options
from potstill.student_train.data.opening import check_belongs, check_targets, open_store
from potstill.student_train.data.store_tokenizer import tokenizers_beside
from potstill.student_train.data.vocabulary import Vocabulary, vocabulary_of
from potstill.student_train.data.weights import check_weights
from potstill.student_train.model.loss_terms import term_stores

VOCABULARY = "data.vocabulary"  # its name among the digests of a checkpoint; no store is called so


@dataclass(frozen=True)
class Stores:
    """The readers of one run: its sources in the order of their row ids (at least one), and the held-out stores.

    With a `vocabulary` their rows are in the student's ids.
    """

    sources: tuple[Source, ...]
    heldout: StoreReader | None
    heldout_targets: StoreReader | None
    vocabulary: Vocabulary | None = None
    source_heldout: Mapping[str, HeldoutStores] = field(default_factory=dict)  # of sources that name some

    @property
    def vocab_size(self) -> int:
        """Ids that a student of this run needs."""
        return self.sources[0].tokens.vocab_size

    @property
    def spec(self) -> RunSpec:
        """What the tokens stores of all sources have in common: row length, tokenizer, vocabulary."""
        return self.sources[0].tokens.spec

    @property
    def num_rows(self) -> int:
        return sum(source.tokens.num_rows for source in self.sources)

    @property
    def num_tokens(self) -> int:
        return sum(source.tokens.num_tokens for source in self.sources)

    @property
    def tokens(self) -> StoreReader:
        """The tokens store of a run with one source; ValueError of others."""
        return self._only.tokens

    @property
    def joined(self) -> Mapping[str, StoreReader]:
        """The targets and scores of a run with one source; ValueError of others."""
        return self._only.joined

    @property
    def _only(self) -> Source:
        if len(self.sources) > 1:
            raise ValueError(f"the run has the sources {[source.name for source in self.sources]}; take one of them")
        return self.sources[0]

    def digests(self) -> dict[str, str]:
        """Digest of each training store, for the checkpoint; with several sources by SOURCE.NAME.

        Of the vocabulary map too, if there is one.
        """
        found: dict[str, str] = {}
        for source in self.sources:
            before = "" if len(self.sources) == 1 else f"{source.name}."
            found[f"{before}tokens"] = source.tokens.digest
            found |= {f"{before}{name}": reader.digest for name, reader in source.joined.items()}
        return found if self.vocabulary is None else {**found, VOCABULARY: self.vocabulary.mapping.digest}

    def targets(self) -> dict[str, StoreReader]:
        """The targets stores among the joined ones; with several sources by SOURCE.NAME."""
        return {
            name if len(self.sources) == 1 else f"{source.name}.{name}": reader
            for source in self.sources
            for name, reader in source.joined.items()
            if reader.spec.kind == "targets"
        }


def unused_columns(config: TrainConfig, name: str) -> frozenset[str]:
    """Columns of targets store `name` that no stage looks at, so that they need not be decoded."""
    selecting = any(
        (stage.tokens is not None and name in stage.tokens.stores())
        or (stage.weights is not None and stage.weights.of == "document" and stage.weights.store == name)
        for stage in config.curriculum
    )
    temperatures = [config.objective.temperature, *(stage.temperature for stage in config.curriculum)]
    is_plain = all(value is None or set(scalar_bounds(value)) == {1.0} for value in temperatures)
    # The label column stays: by it each row is seen to stand at its tokens.
    side = frozenset() if selecting else frozenset({"entropy", "label_rank"})
    return side | (frozenset({"tail_at"}) if is_plain else frozenset())


def open_stores(config: TrainConfig) -> Stores:
    """Open and cross-check every store of a run. Raises UserError."""
    data = config.data
    sources: list[Source] = []
    for named in data.named_sources():
        source = open_source(config, named)
        if sources:
            _check_alike(source, named, sources[0], data.named_sources()[0])
        sources.append(source)
    heldout = None if data.heldout is None else open_heldout(data, "data", data, sources)
    by_source = {
        named.name: open_heldout(named.config, named.key, data, sources)
        for named in data.named_sources()
        if data.sources and named.config.heldout is not None
    }
    stores = Stores(
        tuple(sources),
        None if heldout is None else heldout.tokens,
        None if heldout is None else heldout.targets,
        source_heldout=by_source,
    )
    return stores if data.vocabulary is None else in_vocabulary(stores, data)


def in_vocabulary(stores: Stores, data: DataConfig) -> Stores:
    """The stores with rows in the ids of data.vocabulary. Raises UserError."""
    assert data.vocabulary is not None
    texts = [source.tokens for source in stores.sources] + ([] if stores.heldout is None else [stores.heldout])
    texts += [held.tokens for held in stores.source_heldout.values()]
    beside = [
        folder for named in data.named_sources() for folder in tokenizers_beside(named.config.tokens, stores.spec.info)
    ]
    vocabulary = vocabulary_of(data.vocabulary, texts, beside)

    def mapped(reader: StoreReader) -> StoreReader:
        try:
            return reader.with_vocabulary(vocabulary.mapping)
        except StoreError as error:
            raise UserError(f"data.vocabulary: {error}") from error

    sources = tuple(
        Source(source.name, mapped(source.tokens), {name: mapped(store) for name, store in source.joined.items()})
        for source in stores.sources
    )
    heldout = None if stores.heldout is None else mapped(stores.heldout)
    targets = None if stores.heldout_targets is None else mapped(stores.heldout_targets)
    by_source = {name: held.each(mapped) for name, held in stores.source_heldout.items()}
    return Stores(sources, heldout, targets, vocabulary, by_source)


def open_source(config: TrainConfig, named: NamedSource) -> Source:
    """Open the stores of one source and check them against each other. Raises UserError that names the key."""
    data, place = config.data, named.config.tokens
    tokens = open_store(place, "tokens", f"{named.key}.tokens", **reader_options(data, place))
    joined: dict[str, StoreReader] = {}
    for kind, group in (("targets", named.config.targets), ("scores", named.config.scores)):
        for name, path in group.items():
            key = f"{named.key}.{kind}.{name}"
            joined[name] = open_store(path, kind, key, **reader_options(data, path))
            expect_statistics(config, name, joined[name])
            check_belongs(joined[name], tokens, key=key, tokens_key=f"{named.key}.tokens")
            if kind == "targets":
                check_targets(joined[name], tokens, key=key)
                joined[name] = joined[name].skipping(unused_columns(config, name))
    return Source(named.name, tokens, joined)


def _check_alike(source: Source, named: NamedSource, first: Source, first_named: NamedSource) -> None:
    difference = tokens_difference(source.tokens, first.tokens)
    if difference is not None:
        field, found, expected = difference
        raise UserError(
            f"{named.key}.tokens has {field} {found}, {first_named.key}.tokens {expected}; prepare all sources with "
            "one tokenizer and one row length"
        )


def _check_has_tail(targets: StoreReader, name: str, key: str, settings: LossSettings) -> None:
    if targets.spec.normaliser == "kept":
        raise UserError(
            f"{key} is {settings.missing_mass}, which needs the mass outside of the kept entries; store {name} "
            f"({targets.url}) holds log-probabilities relative to the kept entries alone (normaliser kept): use "
            "missing_mass renorm or support"
        )


def _check_temperature(value: Scalar, targets: StoreReader, name: str, key: str) -> None:
    stored = (1.0, *targets.spec.temperatures)
    for bound in set(scalar_bounds(value)):
        if stored_temperature(bound, stored) is None:
            raise UserError(
                f"{key}.temperature takes the value {bound}, but store {name} holds tails for {sorted(stored)} only; "
                "dump with dump temperatures that include it, or use missing_mass renorm or support"
            )
    if len(set(scalar_bounds(value))) > 1:
        raise UserError(
            f"{key}.temperature is a schedule; with missing_mass tail, label or raw only the stored temperatures "
            f"{sorted(stored)} can be used: make one stage per temperature, or use missing_mass renorm or support"
        )


def check_objectives(config: TrainConfig, stores: Stores) -> None:
    """Check each stage's loss settings against the targets stores of its sources. Raises UserError naming the key."""
    for number, stage in enumerate(config.curriculum):
        key = f"curriculum.{number}"
        sources = _stage_sources(config, stores, stage, key)
        if stage.tokens is not None:
            for source in sources:
                _check_token_stores(source, stage.tokens, key, _of(source, stores))
        if stage.weights is not None and (config.rescoring is None or config.rescoring.name != stage.weights.store):
            for source in sources:
                store = source.joined[stage.weights.store]
                check_weights(stage.weights, store, key=f"{key}.weights", of=_of(source, stores))
        if not stage.distils:
            continue
        names = target_names(stage, config.data.named_sources(), key=key)
        _check_one_kind(names, sources, key)
        temperature = stage_value(config.objective, stage, "temperature")
        try:
            for bound in scalar_bounds(temperature):
                settings = distillation_settings(config.objective, stage, temperature=bound)
        except KernelInputError as error:
            raise UserError(f"{key}: {error}") from error
        of_all = [(source, name) for name in names for source in sources if name in source.joined]
        for source, target in of_all:  # a source that lacks one was allowed to by the configuration
            targets = source.joined[target]
            mode = _selection(targets)["mode"]
            name = f"{target!r}{_of(source, stores)}"
            try:
                check_draws(settings.divergence, holds_draws=mode == "sample")
            except KernelInputError as error:
                raise UserError(f"{key}.divergence, store {name} of selection {mode}: {error}") from error
            # Whichever side is tempered, the teacher is: the tails that are needed are the same.
            if settings.needs_tail:
                _check_has_tail(targets, name, f"{key if stage.missing_mass else 'objective'}.missing_mass", settings)
                _check_temperature(temperature, targets, name, key)


def _stage_sources(config: TrainConfig, stores: Stores, stage: Stage, key: str) -> list[Source]:
    names = {named.name for named in stage_sources(stage, config.data.named_sources(), key=key)}
    return [source for source in stores.sources if source.name in names]


def _of(source: Source, stores: Stores) -> str:
    """Which source's store is spoken of; nothing where there is one."""
    return "" if len(stores.sources) == 1 else f" of data.sources.{source.name}"


def _selection(targets: StoreReader) -> dict[str, Any]:
    """What two targets stores must have in common to be read in one stage: mode, and of draws number and power."""
    chosen = targets.spec.selection or {}
    mode = str(chosen.get("mode"))
    if mode != "sample":
        return {"mode": mode}
    return {"mode": mode, "num_draws": chosen.get("num_draws"), "power": chosen.get("power", 1.0)}


def _check_one_kind(names: Sequence[str], sources: Sequence[Source], key: str) -> None:
    """The targets of a stage go into one batch, and its settings into one loss: log-probabilities, or draws of one
    number and power."""
    kinds: list[tuple[str, str, str]] = []
    for source, name in ((source, name) for name in names for source in sources if name in source.joined):
        chosen, kind = _selection(source.joined[name]), "log-probabilities"
        if chosen["mode"] == "sample":
            kind = f"{chosen['num_draws']} draws a token at power {chosen['power']}"
        kinds.append((name, source.name, kind))
    for name, where, kind in kinds[1:]:
        first_name, first, expected = kinds[0]
        if kind != expected:
            other = "that" if name == first_name else f"store {first_name!r}"
            raise UserError(
                f"{key}.targets: store {name!r} of data.sources.{where} holds {kind}, {other} of data.sources.{first} "
                f"{expected}; one stage reads one kind: dump both alike, or draw from them in stages of their own (mix)"
            )


def _check_token_stores(source: Source, selector: TokenSelector, key: str, of: str) -> None:
    """A targets store may lack a side column; look at the first row of the source and of the reference."""
    from potstill.student_train.data.batch import JoinedRow, store_columns

    needs = set(selector.entry.needs)
    wanted = {"source": (selector.source, needs & {"loss", "rank", "entropy"})}
    if selector.reference is not None:
        wanted["reference"] = (selector.reference, {"loss"} if "reference_loss" in needs else set())
    for part, (name, columns) in wanted.items():
        if name not in source.joined:  # the student itself
            continue
        held = store_columns([cast(JoinedRow, source.joined[name].row(0))])
        missing = sorted(columns - set(held))
        if missing:
            raise UserError(
                f"{key}.tokens.{part} is store {name!r}{of}, but policy {selector.policy} needs {missing} of it, "
                f"which it does not hold (it has {sorted(held)}); dump or score it with that column, or name another "
                "store"
            )


def build_plan(config: TrainConfig, stores: Stores) -> CurriculumPlan:
    """The run's plan: which rows, stores and loss settings each global batch has. Raises UserError."""
    names = frozenset().union(*(needed_stats(stage.rows) for stage in config.curriculum))
    wanted = term_stores(config.model)
    for source, named in zip(stores.sources, config.data.named_sources(), strict=True):
        if not wanted <= set(source.joined):
            raise UserError(
                f"loss terms of the model read the stores {sorted(wanted)}; {named.key}.targets and {named.key}.scores "
                f"name {sorted(source.joined)}: add the missing ones there"
            )
    return CurriculumPlan(
        config,
        total_steps=total_steps(config, row_length=stores.spec.row_length),
        sources=[
            PlanSource(
                source.name,
                source.tokens.num_rows,
                {name: source.joined[name].row_stats for name in names if name in source.joined}
                | unscored(config, source.tokens.num_rows),
                node=source.tokens.shared_by,
                digests=index_digests(source.joined),
            )
            for source in stores.sources
        ],
        term_stores=wanted,
        clocks=stage_clocks(config, stores.sources),
    )


def index_digests(joined: Mapping[str, StoreReader]) -> dict[str, str]:
    """What pins the statistics of rows of each sealed store, by its name."""
    found = {name: reader.index_digest for name, reader in joined.items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def unscored(config: TrainConfig, num_rows: int) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Row statistics of what the run scores itself, before the first time: any figures, of which no two are alike."""
    if config.rescoring is None:
        return {}
    figures = {
        name: 1 + np.random.Generator(np.random.Philox(number)).random(num_rows, np.float32)
        for number, name in enumerate(config.rescoring.row_statistics)
    }
    return {config.rescoring.name: figures}
