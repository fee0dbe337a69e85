"""Open the stores of a run and check everything that can be checked before a model exists."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from potstill.common.errors import UserError
from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.settings import check_temperature
from potstill.kernels.types import KernelInputError
from potstill.storage import StoreError, StoreReader, TargetsRow, UnsealedError, check_alignment
from potstill.student_train.config.curves import Scalar
from potstill.student_train.config.token_policies import TokenSelector
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.plan import CurriculumPlan, total_steps
from potstill.student_train.curriculum.row_selector import needed_stats
from potstill.student_train.curriculum.schedules import scalar_bounds
from potstill.student_train.curriculum.step_objective import StepObjective, step_objective

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


def open_store(path: Path | str, kind: str, key: str) -> StoreReader:
    """Open a sealed store of the given kind. Raises UserError naming the configuration key."""
    if isinstance(path, Path) and not path.is_dir():
        state = "is a file, not a store" if path.exists() else "does not exist"
        raise UserError(f"{key} = {path} {state}; give the folder of a {kind} store (potstill {_MAKERS[kind]})")
    try:
        reader = StoreReader(path)
    except UnsealedError as error:
        raise UserError(
            f"{key} = {path} is not sealed: units are missing; finish and seal it (potstill status, potstill seal)"
        ) from error
    except StoreError as error:
        raise UserError(f"{key} = {path}: {error}") from error
    if reader.spec.kind != kind:
        raise UserError(f"{key} = {path} is a {reader.spec.kind} store; expected a {kind} store")
    return reader


def check_joined(reader: StoreReader, tokens: StoreReader, *, key: str, tokens_key: str) -> None:
    """Refuse a store that was not made from these tokens. Raises UserError naming field, found and expected."""
    pairs = {
        "input_digest (the tokens store it was made from)": (reader.spec.input_digest, tokens.digest),
        "row_length": (reader.spec.row_length, tokens.spec.row_length),
        "number of rows": (reader.num_rows, tokens.num_rows),
        "tokenizer_digest": (reader.spec.tokenizer_digest, tokens.spec.tokenizer_digest),
        "vocab_size": (reader.spec.vocab_size, tokens.spec.vocab_size),
    }
    for field, (found, expected) in pairs.items():
        if found != expected:
            raise UserError(
                f"{key} does not belong to {tokens_key}: its {field} is {found}, expected {expected}; "
                "dump or score the tokens store that you train on, or name the other tokens store"
            )


def check_targets(targets: StoreReader, tokens: StoreReader, *, key: str) -> None:
    """See on some rows that the targets stand at the tokens they are for. Raises UserError; a shift by one trains.

    Stores of draws, or without the label column, hold nothing to compare with, which is said.
    """
    first = targets.row(0)
    assert isinstance(first, TargetsRow)
    if first.targets.logprobs is None or first.targets.label_logprob is None:
        log.info("%s holds no log-probabilities of labels: its alignment with the tokens cannot be checked", key)
        return
    try:
        check_alignment(tokens, targets)
    except StoreError as error:
        raise UserError(f"{key}: {error}; dump it again from the tokens store that you train on") from error


def unused_columns(config: TrainConfig, name: str) -> frozenset[str]:
    """Columns of targets store `name` that no stage looks at, so that they need not be decoded."""
    selecting = any(name in stage.tokens.stores() for stage in config.curriculum if stage.tokens is not None)
    temperatures = [config.objective.temperature, *(stage.temperature for stage in config.curriculum)]
    is_plain = all(value is None or set(scalar_bounds(value)) == {1.0} for value in temperatures)
    side = frozenset() if selecting else frozenset({"entropy", "label", "label_rank"})
    return side | (frozenset({"tail_at"}) if is_plain else frozenset())


def open_stores(config: TrainConfig) -> Stores:
    """Open and cross-check every store of a run. Raises UserError."""
    data = config.data
    tokens = open_store(data.tokens, "tokens", "data.tokens")
    joined: dict[str, StoreReader] = {}
    for kind, group in (("targets", data.targets), ("scores", data.scores)):
        for name, path in group.items():
            key = f"data.{kind}.{name}"
            joined[name] = open_store(path, kind, key)
            check_joined(joined[name], tokens, key=key, tokens_key="data.tokens")
            if kind == "targets":
                check_targets(joined[name], tokens, key=key)
                joined[name] = StoreReader(path, skip=unused_columns(config, name))
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
        check_joined(heldout_targets, heldout, key="data.heldout_targets", tokens_key="data.heldout")
        check_targets(heldout_targets, heldout, key="data.heldout_targets")
    return Stores(tokens, joined, heldout, heldout_targets)


def _check_temperature(value: Scalar, targets: StoreReader, name: str, key: str) -> None:
    stored = (1.0, *targets.spec.temperatures)
    for bound in set(scalar_bounds(value)):
        if not any(math.isclose(bound, known, rel_tol=1e-6) for known in stored):
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
        settings: StepObjective = step_objective(config.objective, stage, 0.0)
        if stage.tokens is not None:
            _check_token_stores(stores, stage.tokens, key)
        if stage.targets is None:
            continue
        entry = DIVERGENCES[settings.divergence]
        if settings.missing_mass not in entry.modes:
            raise UserError(
                f"{key}: divergence {settings.divergence} has no sensible value with missing_mass "
                f"{settings.missing_mass}; use one of {list(entry.modes)}"
            )
        targets = stores.joined[stage.targets]
        mode = str((targets.spec.selection or {}).get("mode"))
        if entry.needs_counts != (mode == "sample"):
            raise UserError(
                f"{key}.divergence is {settings.divergence}, but store {stage.targets!r} was dumped with selection "
                f"{mode}; use divergence sampled with selection sample, and any other divergence with top_k or top_p_k"
            )
        temperature = config.objective.temperature if stage.temperature is None else stage.temperature
        if entry.needs_counts and set(scalar_bounds(temperature)) != {1.0}:
            raise UserError(
                f"{key}.temperature takes the values {sorted(set(scalar_bounds(temperature)))}, but store "
                f"{stage.targets!r} holds draws, and draws hold at temperature 1 only; use temperature 1"
            )
        try:
            check_temperature(min(scalar_bounds(temperature)), settings.temperature_side, settings.divergence)
        except KernelInputError as error:
            raise UserError(f"{key}: {error}") from error
        # Whichever side is tempered, the teacher is: the tails that are needed are the same.
        if settings.missing_mass in ("tail", "label", "raw"):
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
    return CurriculumPlan(
        config,
        total_steps=steps,
        num_rows=stores.tokens.num_rows,
        stats={name: stores.joined[name].row_stats for name in names},
    )
