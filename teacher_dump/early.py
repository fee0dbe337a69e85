"""What `dump`, `score` and `rollout` can refuse within a second: paths, before torch and transformers are loaded."""

from __future__ import annotations

import os

from potstill.common.errors import UserError
from potstill.storage import StoreError, StoreReader, check_output
from potstill.teacher_dump.config import DumpConfig, ScoreConfig, WalkConfig
from potstill.teacher_dump.identity import located
from potstill.teacher_dump.rollouts.config import RolloutConfig, store_places
from potstill.teacher_dump.rollouts.questions import require_masks
from potstill.teacher_dump.series import series_configs
from potstill.teacher_dump.work import open_rows


def early_dump(config: DumpConfig) -> DumpConfig:
    """The settings, with models located; UserError or StoreError when rows, output or a teacher cannot be used."""
    members = series_configs(config) if config.teacher.checkpoints else [config]
    for member in members:
        _check_stores(member)
    places = [located(member.teacher) for member in members]
    if not config.teacher.checkpoints:
        return config.model_copy(update={"teacher": places[0]})
    options = {**config.teacher.load_options}
    options |= {"local_files_only": True} if any(one.load_options.get("local_files_only") for one in places) else {}
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"load_options": options})})


def early_score(config: ScoreConfig) -> ScoreConfig:
    """As `early_dump`, for the small model."""
    _check_stores(config)
    return config.model_copy(update={"model": located(config.model)})


def early_rollout(config: RolloutConfig) -> RolloutConfig:
    """As `early_score`, for a model's own answers."""
    require_masks(open_rows(config))
    for name, place in store_places(config).items():
        _check_stores(config.model_copy(update={"output": place}))
        if name != "scores":
            _check_answers(config, place)
    return config.model_copy(update={"model": located(config.model)})


def _check_answers(config: RolloutConfig, place: str) -> None:
    """Raise UserError where a tokens store that somebody else made stands in the way, of which no option may dispose.

    Answers are packed last: it would come out when everything is done.
    """
    try:
        info = StoreReader(place, allow_partial=True).spec.info
    except StoreError:
        return  # nothing there, or nothing that can be read: the writer has the words for it
    if "rollout" not in info:
        raise UserError(f"output {config.output}: {place} is a store that rollout did not write; name another folder")


def _check_stores(config: WalkConfig) -> None:
    open_rows(config)
    if _same_place(config.tokens, config.output):
        raise UserError(f"output {config.output} is the tokens store itself; name another folder to write to")
    check_output(config.output)


def _same_place(a: str, b: str) -> bool:
    if "://" in a or "://" in b:
        return a.rstrip("/") == b.rstrip("/")
    return os.path.realpath(a) == os.path.realpath(b)
