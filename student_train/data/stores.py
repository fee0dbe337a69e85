"""Open the stores of a run and check everything that can be checked before a model exists."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from potstill.common.errors import UserError
from potstill.kernels.checks import check_draws
from potstill.kernels.settings import LossSettings, stored_temperature
from potstill.kernels.types import KernelInputError
from potstill.storage import StoreError, StoreReader, TargetsRow, UnsealedError, check_alignment, check_places
from potstill.storage.loading.joining import first_difference
from potstill.student_train.config.curves import Scalar
from potstill.student_train.config.token_policies import TokenSelector
from potstill.student_train.config.train import DataConfig, TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan, total_steps
from potstill.student_train.curriculum.row_selector import needed_stats
from potstill.student_train.curriculum.schedules import scalar_bounds
from potstill.student_train.curriculum.step_objective import distillation_settings, stage_value
from potstill.student_train.model.loss_terms import term_stores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stores:
    """The readers of one run, by name."""

    tokens: StoreReader
    joined: Mapping[str, StoreReader]
    heldout: StoreReader | None
    heldout_targets: StoreReader | None

    def digests(self) -> dict[str, str]:
        """Digest of each training store, for the checkpoint."""
        return {"tokens": self.tokens.digest, **{name: reader.digest for name, reader in self.joined.items()}}


_MAKERS = {"tokens": "prepare", "targets": "dump", "scores": "score"}  # the command that writes each kind


def open_store(path: Path | str, kind: str, key: str, **options: Any) -> StoreReader:
    """Open a sealed store of the given kind with these options of the reader. Raises UserError naming the key."""
    if isinstance(path, Path) and not path.is_dir():
        state = "is a file, not a store" if path.exists() else "does not exist"
        raise UserError(f"{key} = {path} {state}; give the folder of a {kind} store (potstill {_MAKERS[kind]})")
    try:
        reader = StoreReader(path, **options)
    except UnsealedError as error:
        raise UserError(
            f"{key} = {path} is not sealed: units are missing; finish and seal it (potstill status, potstill seal)"
        ) from error
    except StoreError as error:
        raise UserError(f"{key} = {path}: {error}") from error
    if reader.spec.kind != kind:
        raise UserError(f"{key} = {path} is a {reader.spec.kind} store; expected a {kind} store")
    return reader


FIELD_NAMES = {"input_digest": "input_digest (the tokens store it was made from)", "num_rows": "number of rows"}


def check_belongs(reader: StoreReader, tokens: StoreReader, *, key: str, tokens_key: str) -> None:
    """Refuse a store that was not made from these tokens. Raises UserError naming field, found and expected."""
    difference = first_difference(reader, tokens)
    if difference is not None:
        field, found, expected = difference
        raise UserError(
            f"{key} does not belong to {tokens_key}: its {FIELD_NAMES.get(field, field)} is {found}, expected "
            f"{expected}; dump or score the tokens store that you train on, or name the other tokens store"
        )


def check_targets(targets: StoreReader, tokens: StoreReader, *, key: str) -> None:
    """See on some rows that the targets stand at the tokens they are for. Raises UserError; a shift by one trains.

    None may stand where no token is trained on. Whether they are the right ones cannot be seen in stores of draws, or
    without the label column, which is said.
    """
    first = targets.row(0)
    assert isinstance(first, TargetsRow)
    has_labels = first.targets.logprobs is not None and first.targets.label_logprob is not None
    if not has_labels:
        log.info("%s holds no log-probabilities of labels: its alignment with the tokens cannot be checked", key)
    try:
        check = check_alignment if has_labels else check_places
        check(tokens, targets)
    except StoreError as error:
        raise UserError(f"{key}: {error}; dump it again from the tokens store that you train on") from error


def unused_columns(config: TrainConfig, name: str) -> frozenset[str]:
    """Columns of targets store `name` that no stage looks at, so that they need not be decoded."""
    selecting = any(name in stage.tokens.stores() for stage in config.curriculum if stage.tokens is not None)
    temperatures = [config.objective.temperature, *(stage.temperature for stage in config.curriculum)]
    is_plain = all(value is None or set(scalar_bounds(value)) == {1.0} for value in temperatures)
    side = frozenset() if selecting else frozenset({"entropy", "label", "label_rank"})
    return side | (frozenset({"tail_at"}) if is_plain else frozenset())


def cache_options(data: DataConfig, place: Path | str) -> dict[str, Any]:
    """The reader's options for the node cache: for stores on object storage, where data.cache_dir asks for one."""
    if data.cache_dir is None or isinstance(place, Path):
        return {}
    return {"cache_dir": data.cache_dir, "cache_bytes": int(data.cache_gib * 2**30)}


def open_stores(config: TrainConfig) -> Stores:
    """Open and cross-check every store of a run. Raises UserError."""
    data = config.data
    tokens = open_store(data.tokens, "tokens", "data.tokens", **cache_options(data, data.tokens))
    joined: dict[str, StoreReader] = {}
    for kind, group in (("targets", data.targets), ("scores", data.scores)):
        for name, path in group.items():
            key = f"data.{kind}.{name}"
            cached = cache_options(data, path)
            joined[name] = open_store(path, kind, key, **cached)
            check_belongs(joined[name], tokens, key=key, tokens_key="data.tokens")
            if kind == "targets":
                check_targets(joined[name], tokens, key=key)
                joined[name] = StoreReader(path, skip=unused_columns(config, name), **cached)
    heldout = heldout_targets = None
    if data.heldout is not None:
        heldout = open_store(data.heldout, "tokens", "data.heldout")
        if heldout.digest == tokens.digest:
            raise UserError(
                f"data.heldout = {data.heldout} holds the same rows of data.tokens (digest {tokens.digest[:16]}...), "
                "so nothing would be held out; name the heldout store that prepare wrote beside it, or remove the key"
            )
        for field in ("tokenizer_digest", "vocab_size"):
            found, expected = getattr(heldout.spec, field), getattr(tokens.spec, field)
            if found != expected:
                raise UserError(f"data.heldout has {field} {found}, data.tokens {expected}; prepare both alike")
    if data.heldout_targets is not None and heldout is not None:
        heldout_targets = open_store(data.heldout_targets, "targets", "data.heldout_targets")
        check_belongs(heldout_targets, heldout, key="data.heldout_targets", tokens_key="data.heldout")
        check_targets(heldout_targets, heldout, key="data.heldout_targets")
    return Stores(tokens, joined, heldout, heldout_targets)


def _check_has_tail(targets: StoreReader, name: str, key: str, settings: LossSettings) -> None:
    if targets.spec.normaliser == "kept":
        raise UserError(
            f"{key} is {settings.missing_mass}, which needs the mass outside of the kept entries; store {name!r} "
            f"({targets.url}) holds log-probabilities relative to the kept entries alone (normaliser kept): use "
            "missing_mass renorm or support"
        )


def _check_temperature(value: Scalar, targets: StoreReader, name: str, key: str) -> None:
    stored = (1.0, *targets.spec.temperatures)
    for bound in set(scalar_bounds(value)):
        if stored_temperature(bound, stored) is None:
            raise UserError(
                f"{key}.temperature takes the value {bound}, but store {name!r} holds tails for {sorted(stored)} only; "
                "dump with dump temperatures that include it, or use missing_mass renorm or support"
            )
    if len(set(scalar_bounds(value))) > 1:
        raise UserError(
            f"{key}.temperature is a schedule; with missing_mass tail, label or raw only the stored temperatures "
            f"{sorted(stored)} can be used: make one stage per temperature, or use missing_mass renorm or support"
        )


def check_objectives(config: TrainConfig, stores: Stores) -> None:
    """Check each stage's loss settings against its targets store. Raises UserError naming the key."""
    for number, stage in enumerate(config.curriculum):
        key = f"curriculum.{number}"
        if stage.tokens is not None:
            _check_token_stores(stores, stage.tokens, key)
        if stage.targets is None:
            continue
        targets = stores.joined[stage.targets]
        mode = str((targets.spec.selection or {}).get("mode"))
        temperature = stage_value(config.objective, stage, "temperature")
        try:
            for bound in scalar_bounds(temperature):
                settings = distillation_settings(config.objective, stage, temperature=bound)
        except KernelInputError as error:
            raise UserError(f"{key}: {error}") from error
        try:
            check_draws(settings.divergence, holds_draws=mode == "sample")
        except KernelInputError as error:
            raise UserError(f"{key}.divergence, store {stage.targets!r} of selection {mode}: {error}") from error
        # Whichever side is tempered, the teacher is: the tails that are needed are the same.
        if settings.needs_tail:
            _check_has_tail(
                targets, stage.targets, f"{key if stage.missing_mass else 'objective'}.missing_mass", settings
            )
            _check_temperature(temperature, targets, stage.targets, key)


def _check_token_stores(stores: Stores, selector: TokenSelector, key: str) -> None:
    """A targets store may lack a side column; look at the first row of the source and of the reference."""
    from potstill.student_train.data.batch import JoinedRow, store_columns

    needs = set(selector.entry.needs)
    wanted = {"source": (selector.source, needs & {"loss", "rank", "entropy"})}
    if selector.reference is not None:
        wanted["reference"] = (selector.reference, {"loss"} if "reference_loss" in needs else set())
    for field, (name, columns) in wanted.items():
        if name not in stores.joined:  # the student itself
            continue
        held = store_columns([cast(JoinedRow, stores.joined[name].row(0))])
        missing = sorted(columns - set(held))
        if missing:
            raise UserError(
                f"{key}.tokens.{field} is store {name!r}, but policy {selector.policy} needs {missing} of it, which it "
                f"does not hold (it has {sorted(held)}); dump or score it with that column, or name another store"
            )


def build_plan(config: TrainConfig, stores: Stores) -> CurriculumPlan:
    """The run's plan: which rows, stores and loss settings each global batch has. Raises UserError."""
    names = frozenset().union(*(needed_stats(stage.rows) for stage in config.curriculum))
    steps = total_steps(config, row_length=stores.tokens.spec.row_length)
    wanted = term_stores(config.model)
    if not wanted <= set(stores.joined):
        raise UserError(
            f"loss terms of the model read the stores {sorted(wanted)}; data.targets and data.scores name "
            f"{sorted(stores.joined)}: add the missing ones there"
        )
    return CurriculumPlan(
        config,
        total_steps=steps,
        num_rows=stores.tokens.num_rows,
        stats={name: stores.joined[name].row_stats for name in names},
        term_stores=wanted,
    )
