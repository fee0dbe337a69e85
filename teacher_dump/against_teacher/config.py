"""Settings of `potstill verify STORE --teacher MODEL`, and those that run.json of the store gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from potstill.common.config import StrictModel, build_config
from potstill.common.errors import UserError
from potstill.storage import RunSpec
from potstill.teacher_dump.config import DumpConfig, PlaceText, ScoreConfig, TeacherConfig
from potstill.teacher_dump.engines.table import ENGINES
from potstill.teacher_dump.selection import OF_ENTROPY


class AgainstTeacherConfig(StrictModel):
    """Which teacher runs over which rows. What is not set of `teacher` is as run.json of the store says."""

    teacher: TeacherConfig
    tokens: PlaceText | None = Field(
        default=None, description="Tokens store that STORE was made of; None: a folder beside STORE with its digest"
    )
    rows: int = Field(default=64, ge=2, le=1 << 20, description="Rows that the teacher is run over, spread evenly")
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Chooses the rows, and their order in the control")
    other_machine: bool = Field(
        default=False,
        description="STORE was dumped on other hardware or by other versions: allow for what its dtype rounds there",
    )

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.teacher.checkpoints:
            raise ValueError("a store is of one checkpoint: name its folder as the teacher, and leave checkpoints out")
        return self


def job_config(config: AgainstTeacherConfig, spec: RunSpec, *, store: str, tokens: str) -> DumpConfig | ScoreConfig:
    """What `dump` or `score` would be told to make this store again, by the teacher that is asked for.

    Raises UserError for a store that neither has made, ConfigError where the teacher cannot run with its settings.
    """
    teacher = teacher_settings(config.teacher, spec, store=store)
    paths = {"tokens": tokens, "output": store}
    source = f"run.json of {store}, and the options"
    if spec.kind == "scores":
        salt = {"salt_rank": spec.info["salt_rank"]} if "salt_rank" in spec.info else {}
        return build_config(ScoreConfig, {**paths, **salt, "model": teacher}, source=source)
    selection = dict(spec.selection or {})
    if selection["mode"] == "sample":
        if "seed" not in spec.info:
            raise UserError(f"{store}: run.json names no seed of the draws, so that none of them can be drawn again")
        selection["seed"] = spec.info["seed"]
    tree: dict[str, Any] = {**paths, "teacher": teacher, "selection": selection}
    tree["temperatures"] = list(spec.temperatures)
    engine = ENGINES[teacher["engine"]]
    tree["entropy"] = OF_ENTROPY in spec.stats and not engine.only_logprobs
    return build_config(DumpConfig, tree, source=source)


def teacher_settings(asked: TeacherConfig, spec: RunSpec, *, store: str) -> dict[str, Any]:
    """The settings of the teacher that were given, over those that run.json tells. Raises UserError."""
    told: Mapping[str, Any] = spec.teacher or {}
    if spec.kind not in ("targets", "scores"):
        raise UserError(f"{store} is a store of {spec.kind}, which no teacher has made; expected targets or scores")
    if "weights_digest" not in told:
        raise UserError(
            f"{store} was not made by dump or score (engine {told.get('engine')!r}): run.json does not say how its "
            "teacher was run, so that a live one cannot be held against it"
        )
    if told.get("ensemble") and not asked.ensemble:
        listed = ", ".join(f"{{model: {one['id']}, weight: {one['weight']}}}" for one in told["ensemble"])
        raise UserError(
            f"{store} is of a mixture of {1 + len(told['ensemble'])} teachers ({told['id']} and others); name the "
            f"others, too: --set 'teacher.ensemble=[{listed}]', each model by its folder or hub id"
        )
    given = {key: value for key, value in asked.model_dump().items() if key in asked.model_fields_set}
    found: dict[str, Any] = {**({} if "engine" in given else {"engine": _engine_of(told, store=store)}), **given}
    found |= {key: told[key] for key in ("dtype", "documents", "weight") if key in told and key not in given}
    if found["engine"] == told["engine"]:
        # In the words of one engine, which another does not know.
        attention = {} if told.get("attention", "default") == "default" else {"attention": told["attention"]}
        of_engine = {**attention, **({"head": told["head"]} if "head" in told else {})}
        found |= {key: value for key, value in of_engine.items() if key not in given}
        found["load_options"] = {**told.get("load_options", {}), **given.get("load_options", {})}
    return found


def _engine_of(told: Mapping[str, Any], *, store: str) -> str:
    """The engine that made the store, or `hf` in the place of one that needs a group of ranks."""
    name = str(told.get("engine"))
    if name not in ENGINES:
        raise UserError(f"{store} was made by engine {name!r}, which is not here; name another one with --engine")
    return "hf" if ENGINES[name].is_group else name
