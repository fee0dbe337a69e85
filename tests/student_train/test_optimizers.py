"""The optimizers: the table, Muon's step against torch's own, its flat parts on two ranks, and whole runs with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from potstill.common.errors import ConfigError
from potstill.student_train.config.optimizers import OPTIMIZERS, OptimizerConfig
from potstill.student_train.hf_export.weights import checkpoint_state, find_source, load_model
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import StudentModel, build_student
from potstill.student_train.run.checkpoint import list_checkpoints
from potstill.student_train.run.engine import set_learning_rate
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.muon import MuonWithAdamW
from potstill.student_train.run.parameter_groups import adamw_options, tell_layout
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_moe import KINDS
from tests.student_train.test_resume import kill_after, steps_of
from tests.student_train.test_resume import tree_of as resumed_tree

CPU = torch.device("cpu")


def student_of(model: dict[str, Any]) -> StudentModel:
    tree = {"run": {"output_dir": "x", "max_steps": 1}, "data": {"tokens": "x", "global_batch_rows": 1}}
    config = workers.config_of({**tree, "model": {"config": model}}).model
    return build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0)


@pytest.mark.parametrize("kind", ["llama", "untied", "gpt2", "mixtral"])
def test_muon_has_the_matrices_of_the_backbone(kind: str) -> None:
    model = {
        "llama": tiny.STUDENT,
        "untied": {**tiny.STUDENT, "tie_word_embeddings": False},
        "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
        "mixtral": {**tiny.STUDENT, "model_type": "mixtral", **KINDS["mixtral"]},
    }[kind]
    student = student_of(model)
    names = {id(p): name for name, p in student.named_parameters()}
    groups = OPTIMIZERS["muon"](student, OptimizerConfig(kind="muon"), CPU).param_groups
    by_kind: dict[str, set[str]] = {"muon": set(), "adamw": set()}
    for group in groups:
        by_kind[group["kind"]] |= {names[id(p)] for p in group["params"]}
    assert by_kind["muon"] | by_kind["adamw"] == set(names.values()) and not by_kind["muon"] & by_kind["adamw"]
    table_or_vector = ("norm", "ln_", "embed", "wte", "wpe", "lm_head", "bias")
    assert [n for n in by_kind["adamw"] if not any(word in n for word in table_or_vector)] == []
    assert len(by_kind["muon"]) == {"llama": 14, "untied": 14, "gpt2": 8, "mixtral": 14}[kind]
    decays = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert {decay for name, decay in decays.items() if "norm" in name or "bias" in name} == {0.0}


def pair_of_students() -> tuple[StudentModel, StudentModel]:
    return student_of(tiny.STUDENT), student_of(tiny.STUDENT)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_whole_matrices_take_the_step_of_torch() -> None:
    ours, theirs = pair_of_students()
    options = OptimizerConfig(kind="muon", lr=3e-3, muon_lr=0.02)
    optimizer = OPTIMIZERS["muon"](ours, options, CPU)
    assert isinstance(optimizer, MuonWithAdamW)
    names = {id(p): name for name, p in ours.named_parameters()}
    others = dict(theirs.named_parameters())
    same = [[others[names[id(p)]] for p in group["params"]] for group in optimizer.param_groups]
    muon = torch.optim.Muon(same[0], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [{"params": same[1], "weight_decay": 0.1}, {"params": same[2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, **adamw_options(options, CPU))
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        for name, parameter in ours.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            others[name].grad = parameter.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, others[name]), name


@pytest.mark.parametrize("world", [1, 2, 3])
def test_flat_parts_take_the_step_of_whole_matrices(world: int) -> None:
    shapes = [[5, 3], [2, 4, 6], [7, 7], [1, 4]]
    parts = run_ranks(workers.muon_on_flat_parts, shapes, world=world)
    [whole] = run_ranks(workers.muon_on_matrices, shapes, world=1)
    found = [value for part in parts for value in part]
    assert found[: len(whole)] == whole
    assert all(value == 0.0 for value in found[len(whole) :])


def test_each_group_has_its_share_of_the_learning_rate() -> None:
    optimizer = OPTIMIZERS["muon"](student_of(tiny.STUDENT), OptimizerConfig(kind="muon", lr=1e-3, muon_lr=0.02), CPU)
    engine = type("Engine", (), {"optimizer": optimizer})
    set_learning_rate(engine, 5e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.01), 5e-4, 5e-4]


def muon_tree(stores: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    return tiny.config_tree(stores, output, optimizer={"kind": "muon"}, logging={"every_steps": 1}, **changes)


def test_every_zero_stage_takes_the_same_steps(stores: dict[str, Path], tmp_path: Path) -> None:
    losses = {}
    for stage, world in ((0, 1), (1, 1), (1, 2), (2, 2)):
        run = tmp_path / f"{stage}-{world}"
        run_ranks(workers.train_run, muon_tree(stores, run, zero_stage=stage), world=world)
        losses[stage, world] = steps_of(run)[0]
    plain = tmp_path / "adamw"
    run_ranks(workers.train_run, tiny.config_tree(stores, plain, logging={"every_steps": 1}), world=1)
    expected = losses[0, 1]
    # Newton-Schulz rounds to bfloat16, so the last bits of a gradient may change an update by some thousandths.
    for key, found in losses.items():
        assert found == pytest.approx(expected, rel=1e-4), key
    assert steps_of(plain)[0] != pytest.approx(expected, rel=1e-2)
    assert expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(0, "float32", marks=pytest.mark.slow),
        (1, "bfloat16"),
        (2, "float32"),
        pytest.param(0, "bfloat16", marks=pytest.mark.slow),
        pytest.param(1, "float32", marks=pytest.mark.slow),
        pytest.param(2, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(stores: dict[str, Path], tmp_path: Path, stage: int, dtype: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"stage": stage, "model": {"dtype": dtype}, "optimizer": {"kind": "muon", "muon_lr": 0.01}}
    run_ranks(workers.train_run, resumed_tree(stores, whole, **options), world=2)
    kill_after(resumed_tree(stores, killed, **options), killed, step=9, world=2)
    run_ranks(workers.train_run, resumed_tree(stores, killed, **options), world=2)
    assert steps_of(killed) == steps_of(whole)
    model = load_model(find_source(killed), dtype="float32")
    state = checkpoint_state(list_checkpoints(killed)[-1])
    assert isinstance(model, nn.Module) and all(torch.equal(state[n], p) for n, p in model.named_parameters())
    if stage > 0:
        with pytest.raises(AssertionError, match=r"saved by 2 ranks with optimizer\.kind muon.*Resume with 2 ranks"):
            run_ranks(workers.train_run, resumed_tree(stores, killed, **options), world=1)


def test_another_optimizer_is_another_run(stores: dict[str, Path], tmp_path: Path) -> None:
    run_ranks(workers.train_run, muon_tree(stores, tmp_path / "run", run={"max_steps": 2}), world=1)
    with pytest.raises(AssertionError, match=r"optimizer\.kind: the checkpoint has 'muon', the configuration 'adamw'"):
        run_ranks(workers.train_run, tiny.config_tree(stores, tmp_path / "run", run={"max_steps": 4}), world=1)
    assert [record["step"] for record in read_metrics(tmp_path / "run") if record["kind"] == "train"] == [1, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_stage": 3}, r"muon works with zero_stage 0, 1 and 2, found 3.*adamw"),
        ({"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, r"offload_optimizer does not"),
        ({"deepspeed": {"zero_optimization": {"round_robin_gradients": True}}}, r"round_robin_gradients does not"),
        ({"optimizer": {"kind": "adamw", "muon_lr": 0.1}}, r"muon_lr is for optimizer\.kind muon"),
        ({"optimizer": {"kind": "sgd"}}, r"optimizer\.kind"),
    ],
)
def test_what_does_not_fit_is_refused(stores: dict[str, Path], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        workers.config_of(tiny.config_tree(stores, Path("x"), **{"optimizer": {"kind": "muon"}, **changes}))


def test_another_layout_of_flat_parts_is_refused() -> None:
    student = student_of(tiny.STUDENT)
    optimizer = OPTIMIZERS["muon"](student, OptimizerConfig(kind="muon"), CPU)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    flat = torch.cat([p.detach().reshape(-1) for p in groups[0]])
    optimizer.param_groups[0]["params"] = [nn.Parameter(flat.clone())]
    tell_layout(optimizer, groups, rank=0, cut=False)
    optimizer.param_groups[0]["params"] = [nn.Parameter(flat.roll(1))]
    with pytest.raises(RuntimeError, match="lays out the flat parameters otherwise"):
        tell_layout(optimizer, groups, rank=0, cut=False)
