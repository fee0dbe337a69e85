"""Initial weights by width: what is drawn for which configuration, in which architectures, and what it is for."""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from potstill.common.errors import UserError
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.initial_weights import initial_rule, initial_weights, residual_projections
from potstill.student_train.model.parameters import check_initial_std, draw_weights
from potstill.student_train.model.student import build_student
from potstill.student_train.run.checkpoint import Checkpoint, ResumeError, check_pinned
from potstill.student_train.run.run_folder import pinned_values
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

SHAPE = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 96}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "gemma2": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, "num_experts": 4, "moe_intermediate_size": 64},
    "phi3": {**SHAPE, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": SHAPE,
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
}


def model_of(config: dict[str, Any] | str, **values: Any) -> ModelConfig:
    return ModelConfig.model_validate({"config": config, **values})


def inline(kind: str, **values: Any) -> dict[str, Any]:
    return {"model_type": kind, **FAMILIES[kind], **values}


def test_the_width_decides_unless_the_configuration_does(tmp_path: Path) -> None:
    assert hf_config(model_of(inline("llama")), vocab_size=96).initializer_range == 64**-0.5
    named = inline("llama", initializer_range=0.02)  # transformers' own default, but said
    assert hf_config(model_of(named), vocab_size=96).initializer_range == 0.02
    assert hf_config(model_of(named, init="width"), vocab_size=96).initializer_range == 64**-0.5
    assert hf_config(model_of(inline("llama"), init="config"), vocab_size=96).initializer_range == 0.02
    assert hf_config(model_of(inline("llama"), init_std=0.3), vocab_size=96).initializer_range == 0.3
    for values, expected in (({}, 64**-0.5), ({"initializer_range": 0.05}, 0.05)):
        path = tmp_path / f"{len(values)}" / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps({**inline("llama"), "vocab_size": 96, **values}), encoding="utf-8")
        for source in (path, path.parent):  # the file, and its folder
            assert hf_config(model_of(str(source)), vocab_size=96).initializer_range == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "width", "init_std": 0.1}, "both set the std"),
        ({"init": "deep"}, "width_residual"),
    ],
)
def test_settings_that_contradict_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(inline("llama"), **values)


def test_weights_from_a_folder_take_no_rule() -> None:
    with pytest.raises(ValueError, match="random weights"):
        ModelConfig.model_validate({"path": "x", "init": "width"})
    assert initial_rule(ModelConfig.model_validate({"path": "x"})) == "config"


def test_an_architecture_without_the_setting_says_so() -> None:
    values = {"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96}
    config = AutoConfig.for_model("opt", hidden_size=64)
    assert "has no initializer_range" in initial_weights(model_of(values), config).describe()
    with pytest.raises(UserError, match="has no initializer_range"):
        hf_config(model_of(values, init="width"), vocab_size=96)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_matrix_of_every_family_has_its_std(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Residual projections are two to a layer; GPT-2 scales its own by sqrt(2 x layers) under every rule."""
    for init, factor in (("width", 6**-0.5 if kind == "gpt2" else 1.0), ("auto", 6**-0.5)):
        model = model_of(inline(kind), init=init).model_copy(update={"attention": "eager"})
        with caplog.at_level(logging.INFO, logger="potstill"):
            student = build_student(model, hf_config(model, vocab_size=384), seed=3)
        assert "initial weights: std 0.125" in caplog.text
        into_residual = dict(residual_projections(student.hf))
        assert len(into_residual) == 6
        for name, weight in student.hf.named_parameters():
            if weight.dim() >= 2 and weight.numel() >= 4000:  # a router's few numbers scatter
                expected = 0.125 * (factor if name in into_residual else 1.0)
                assert float(weight.detach().std()) == pytest.approx(expected, rel=0.08), name


def test_a_wrong_std_of_the_residual_projections_is_refused() -> None:
    model = model_of(inline("llama"), init="width_residual")
    config = hf_config(model, vocab_size=96)
    student = build_student(model, config, seed=0)
    std = initial_weights(model, config).residual_std
    check_initial_std(student.hf, config, residual_std=std)
    draw_weights(student.hf, seed=0)  # as if the rule had been forgotten
    with pytest.raises(RuntimeError, match=r"o_proj.weight has std 0\.12"):
        check_initial_std(student.hf, config, residual_std=std)


def test_a_small_matrix_may_scatter_and_a_wrong_std_of_it_is_refused() -> None:
    """48 numbers have a standard deviation of their own, off by a fifth once in a while; a tenth of it is no chance."""
    model = model_of(
        inline("llama", hidden_size=16, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1), init="width"
    )
    config = hf_config(model, vocab_size=3)
    found = []
    for seed in range(40):
        student = build_student(model, config, seed=seed)
        found.append(float(student.hf.get_input_embeddings().weight.detach().std()))
    assert not all(0.2 < std < 0.3 for std in found), "none of the seeds shows what the test is for"
    with torch.no_grad():
        student.hf.get_input_embeddings().weight.mul_(0.1)
    with pytest.raises(RuntimeError, match="embedding has std"):
        check_initial_std(student.hf, config)


@pytest.mark.parametrize("init", ["width", "width_residual"])
def test_the_rule_means_the_same_weights_under_every_stage(stores: Any, tmp_path: Path, init: str) -> None:
    """The first loss, by rule: stages 0 and 3 agree, and differ from the other rule's."""
    losses = {}
    for stage, world in ((0, 1), (3, 2)):
        run = tmp_path / f"stage{stage}"
        changes = {"run": {"max_steps": 1}, "zero_stage": stage, "logging": {"every_steps": 1}}
        tree = tiny.config_tree(stores, run, **changes)
        tree["model"]["init"] = init
        run_ranks(workers.train_run, tree, world=world)
        record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        losses[stage] = record["loss"]
        width = tree["model"]["config"]["hidden_size"]
        assert json.loads((run / "student" / "config.json").read_text())["initializer_range"] == width**-0.5
    assert losses[3] == pytest.approx(losses[0], rel=1e-6)


def checkpoint_of(pinned: dict[str, Any]) -> Checkpoint:
    return Checkpoint(Path("step_1"), {"pinned": pinned, "loop": {"step": 1}})


def test_the_checkpoint_pins_the_rule(stores: Any, tmp_path: Path) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run")
    before = pinned_values(workers.config_of(tree))
    assert before["model.init"] == "width_residual"
    check_pinned(checkpoint_of(before), before)
    tree["model"]["init"] = "width"
    with pytest.raises(
        ResumeError, match=r"model\.init: the checkpoint has 'width_residual', the configuration 'width'"
    ):
        check_pinned(checkpoint_of(before), pinned_values(workers.config_of(tree)))
    # A checkpoint from before there was a rule began with the configuration's std, and continues with that rule.
    older = {key: value for key, value in before.items() if key != "model.init"}
    with pytest.raises(
        ResumeError, match=r"model\.init: the checkpoint has 'config', the configuration 'width_residual'"
    ):
        check_pinned(checkpoint_of(older), before)
    tree["model"]["init"] = "config"
    check_pinned(checkpoint_of(older), pinned_values(workers.config_of(tree)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_it_is_for_the_spread_over_seeds_falls(tmp_path: Path) -> None:
    """The label arm of the demo's first student, five seeds: by width the spread is less than a third."""
    from benchmarks.claims.runs import run_jobs
    from benchmarks.init_rules import SIZES, Grid

    torch.set_num_threads(1)
    size = next(size for size in SIZES if size.hidden == 96)
    grid = Grid(tmp_path, (size,), (1, 2, 3, 4, 5), rules=("config", "width_residual"))
    grid.prepare()
    run_jobs(grid.jobs(), tmp_path, 2)
    spread = {rule: statistics.stdev(grid.losses(size, rule)) for rule in grid.rules}
    mean = {rule: statistics.mean(grid.losses(size, rule)) for rule in grid.rules}
    assert spread["width_residual"] < spread["config"] / 3, (spread, mean)
    assert mean["width_residual"] <= mean["config"]
