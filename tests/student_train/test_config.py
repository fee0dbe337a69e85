"""Bad configurations: refused before anything is opened, with the key, what was found, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.common.config import build_config, dump_config, load_config
from potstill.common.errors import ConfigError
from potstill.kernels.backends import BACKENDS
from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.settings import OFF_KD, TEMPERATURE_SIDES
from potstill.kernels.types import MISSING_MASS_MODES
from potstill.student_train.config.stages import Divergence, MissingMass, OffKd, TemperatureSide
from potstill.student_train.config.train import (
    OWNED_DEEPSPEED_KEYS,
    REFUSED_DEEPSPEED_KEYS,
    EvalConfig,
    ExportConfig,
    LossBackend,
    TrainConfig,
)
from tests.student_train import tiny, workers

PRESETS = sorted((Path(__file__).resolve().parents[2] / "launch" / "presets").glob("*.yaml"))
STORES = {name: Path(name) for name in ("tokens", "teacher", "scores", "heldout", "heldout_teacher")}


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        workers.config_of(tiny.config_tree(STORES, Path("run"), **changes))
    return str(error.value)


def test_the_names_are_those_of_the_kernels() -> None:
    assert set(Divergence.__args__) == set(DIVERGENCES)
    assert set(MissingMass.__args__) == set(MISSING_MASS_MODES)
    assert TemperatureSide.__args__ == TEMPERATURE_SIDES
    assert OffKd.__args__ == OFF_KD
    assert set(LossBackend.__args__) == {"auto", *BACKENDS}


def test_a_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = workers.config_of(
        tiny.config_tree(
            STORES,
            Path("run"),
            curriculum=[
                {
                    "until": 0.5,
                    "targets": "teacher",
                    "alpha": {"kind": "wsd", "peak": 0.9},
                    "rows": {"score": {"of": [{"store": "slm"}]}, "share": {"kind": "cosine", "start": 0.1, "end": 1}},
                },
                {"tokens": {"policy": "paced", "source": "slm"}},
            ],
        )
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(TrainConfig, path) == config


def test_every_key_is_described() -> None:
    def walk(schema: dict[str, Any], where: str) -> list[str]:
        missing = []
        for name, definition in {**schema.get("$defs", {}), where: schema}.items():
            for key, field in definition.get("properties", {}).items():
                if "description" not in field and "$ref" not in field:
                    missing.append(f"{name}.{key}")
        return missing

    for model in (TrainConfig, EvalConfig, ExportConfig):
        assert set(walk(model.model_json_schema(), model.__name__)) <= {
            "TrainConfig.run",
            "TrainConfig.model",
            "TrainConfig.data",
        }


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_a_whole_configuration(path: Path) -> None:
    config = load_config(TrainConfig, path)
    assert config.run.name == path.stem
    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# {path.stem}: "), "the first line says in a sentence what the preset is"


@pytest.mark.parametrize("key", sorted(OWNED_DEEPSPEED_KEYS))
def test_deepspeed_keys_that_the_trainer_owns(key: str) -> None:
    first, *rest = key.split(".")
    message = refused(deepspeed={first: {rest[0]: 2} if rest else 1})
    assert f"deepspeed.{key}" in message and OWNED_DEEPSPEED_KEYS[key] in message


@pytest.mark.parametrize("key", sorted(REFUSED_DEEPSPEED_KEYS))
def test_deepspeed_keys_that_would_cut_rows_over_ranks(key: str) -> None:
    message = refused(deepspeed={key: 2})
    assert f"deepspeed.{key}" in message and "packed documents" in message


def test_a_misspelt_key_names_the_nearest() -> None:
    message = refused(optimizer={"learning_rat": 1.0, "weight_decai": 0.1})
    assert "optimizer.weight_decai" in message and "weight_decay" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": {"max_tokens": 100}}, ("run.max_steps", "run.max_tokens")),
        ({"model": {"path": "x"}}, ("model.config", "model.path")),
        ({"optimizer": {"lr": 0}}, ("optimizer.lr", "greater than 0")),
        ({"objective": {"alpha": 1.5}}, ("alpha", "1.5")),
        ({"objective": {"temperature": {"kind": "linear", "start": 0, "end": 2}}}, ("temperature", "0.0")),
        ({"objective": {"temperature_side": "student"}}, ("objective.temperature_side", "both", "teacher")),
        ({"curriculum": [{"temperature_side": "none"}]}, ("curriculum.0.temperature_side", "both", "teacher")),
        ({"objective": {"alpha": {"kind": "periodic", "start": 0, "end": 1.2}}}, ("alpha", "1.2")),
        ({"objective": {"alpha": {"kind": "periodic", "start": 0, "end": 1, "periods": 0}}}, ("alpha", "periods")),
        ({"curriculum": []}, ("curriculum",)),
        ({"curriculum": [{"until": 0.5}]}, ("curriculum.0.until", "last stage")),
        ({"curriculum": [{}, {}]}, ("curriculum.0.until", "missing")),
        ({"curriculum": [{"until": 0.5}, {"until": 0.4}, {}]}, ("must rise", "overlap")),
        ({"curriculum": [{"targets": "teachr"}]}, ("curriculum.0.targets", "teachr", "teacher")),
        (
            {"curriculum": [{"rows": {"score": {"of": [{"store": "sml"}]}, "share": 0.5}}]},
            ("curriculum.0.rows.score", "sml"),
        ),
        ({"curriculum": [{"rows": {"score": {"of": [{"store": "slm"}]}, "share": 0}}]}, ("rows.share", "(0.0, 1.0]")),
        ({"curriculum": [{"rows": {"score": {"of": [{"store": "slm"}]}, "share": 1.1}}]}, ("rows.share", "1.1")),
        ({"curriculum": [{"tokens": {"policy": "top_entropy", "share": 0}}]}, ("tokens.share", "0.0")),
        ({"curriculum": [{"tokens": {"policy": "label_rank"}}]}, ("label_rank", "tokens.source")),
        ({"curriculum": [{"tokens": {"policy": "label_rank", "source": "lm"}}]}, ("curriculum.0.tokens", "'lm'")),
        ({"curriculum": [{"tokens": {"policy": "excess_loss"}}]}, ("excess_loss", "tokens.reference")),
        ({"curriculum": [{"tokens": {"policy": "entropy_band", "low": 1}}]}, ("entropy_band", "applies_to: kd")),
        ({"curriculum": [{"tokens": {"policy": "paced", "applies_to": "kd"}}]}, ("applies_to kd", "without targets")),
        ({"nan_policy": "skip", "zero_stage": 3}, ("nan_policy", "zero_stage", "3")),
        ({"data": {"scores": {"teacher": "x"}}}, ("teacher", "names must differ")),
        ({"data": {"scores": {"student": "x"}}}, ("student",)),
        ({"checkpoint": {"every_steps": 4, "permanent_every_steps": 6}}, ("permanent_every_steps", "multiple")),
    ],
)
def test_values_that_cannot_be_meant(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    message = refused(**changes)
    assert all(word in message for word in words), message


def test_a_plain_off_of_yaml_is_the_word() -> None:
    tree = tiny.config_tree(STORES, Path("run"), **yaml.safe_load("{spike_policy: off, logging: {wandb: off}}"))
    assert tree["spike_policy"] is False
    config = build_config(TrainConfig, tree, source="x")
    assert (config.spike_policy, config.logging.wandb) == ("off", "off")
    assert "warn" in refused(spike_policy=True)


def test_scalars_on_the_command_line() -> None:
    tree = yaml.safe_dump(tiny.config_tree(STORES, Path("run")))
    config = build_config(TrainConfig, yaml.safe_load(tree), source="x")
    assert config.objective.alpha == 0.5
