"""What a misspelt or foreign key means: by spelling, by initials, by what the key is described as; else nothing."""

from __future__ import annotations

import pytest
from pydantic import Field

from potstill.common.config import ConfigError, StrictModel, load_config
from potstill.common.nearest import nearest_keys
from potstill.student_train.config.optimizers import OptimizerConfig
from potstill.student_train.config.train import TrainConfig

OPTIMIZER = {name: field.description or "" for name, field in OptimizerConfig.model_fields.items()}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("learning_rate", "lr"),
        ("learning-rate", "lr"),
        ("lrr", "lr"),
        ("wd", "weight_decay"),
        ("weigth_decay", "weight_decay"),
        ("beta", "betas"),
        ("epsilon", "eps"),
    ],
)
def test_names_of_other_trainers_and_slips(name: str, key: str) -> None:
    assert nearest_keys(name, OPTIMIZER)[0] == key


@pytest.mark.parametrize("name", ["momentum", "temperature", "x", ""])
def test_what_is_near_to_nothing_gets_no_hint(name: str) -> None:
    assert nearest_keys(name, OPTIMIZER) == []


def problem(override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, None, ["run.output_dir=x", "run.max_steps=1", "data.tokens=t", override])
    return next(line for line in str(caught.value).splitlines() if "unknown key" in line)


def test_learning_rate_is_not_taken_for_weight_decay() -> None:
    assert problem("optimizer.learning_rate=1e-3").endswith("unknown key; did you mean 'lr'?")


def test_a_key_of_another_group_is_named_in_full() -> None:
    assert problem("optimizer.temperature=2").endswith("did you mean 'objective.temperature'?")


def test_no_hint_lists_what_is_known() -> None:
    class Group(StrictModel):
        rows: int = Field(default=1, description="Rows.")

    with pytest.raises(ConfigError, match="known keys: rows"):
        load_config(Group, None, ["zzz=1"])
