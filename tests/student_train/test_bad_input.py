"""What a person gets wrong, through the real command: exit code 1 before a model is built, and words that help.

A run writes its config.yaml before it builds the model, so a missing one proves that nothing was built. Mistakes of
stores are in test_stores.py, of values in test_config.py, of resuming in test_resume.py as well.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.common.exit_codes import ERROR
from potstill.launch.cli import main
from potstill.storage import StoreReader, StoreWriter
from potstill.student_train.run.checkpoint import checkpoints_folder
from potstill.student_train.run.metrics import METRICS_FILE, cut_metrics, read_metrics
from potstill.student_train.run.run_folder import CONFIG_FILE, PART_FILE, delete_run, prepare_run_folder
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers


def refused(
    capsys: pytest.CaptureFixture[str], folder: Path, tree: dict[str, Any] | str, *options: str, num_problems: int = 0
) -> str:
    """The words on standard error of a `potstill train` that must not get as far as a model."""
    text = tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False)
    (folder / "run.yaml").write_text(text)
    assert main(["train", "--config", str(folder / "run.yaml"), *options]) == ERROR
    errors = capsys.readouterr().err
    assert "Traceback" not in errors and "not foreseen" not in errors, errors
    assert not (folder / "run" / CONFIG_FILE).exists()
    if num_problems:
        assert f"{num_problems} problem(s)" in errors, errors
    return errors


@pytest.fixture(scope="module")
def bare(stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A targets store without side columns and without row statistics."""
    path, spec = tmp_path_factory.mktemp("bare") / "targets", replace(StoreReader(stores["teacher"]).spec, stats=())
    rows = []
    for row in tiny.token_rows(40, last_length=20):
        found = tiny.targets_row(row, tiny.transition(), temperatures=spec.temperatures)
        targets = replace(found.targets, label_logprob=None, label_rank=None, entropy=None)
        rows.append(replace(found, targets=targets, stats={}))
    tiny.write_store(path, spec, rows)
    return path


@pytest.mark.parametrize("source", ["student", "slm"])
def test_a_reference_without_losses(stores, bare, tmp_path: Path, capsys, source: str) -> None:
    tokens = {"policy": "excess_loss", "source": source, "reference": "bare", "share": 0.5}
    data = {"targets": {"bare": str(bare)}}
    tree = tiny.config_tree(stores, tmp_path / "run", data=data, curriculum=[{"targets": "bare", "tokens": tokens}])
    message = refused(capsys, tmp_path, tree)
    assert "curriculum.0.tokens.reference" in message and "'bare'" in message and "['loss']" in message


def test_a_source_without_ranks_and_statistics(stores, bare, tmp_path: Path, capsys) -> None:
    data = {"targets": {"bare": str(bare)}}
    tokens = {"policy": "label_rank", "source": "bare"}
    tree = tiny.config_tree(stores, tmp_path / "run", data=data, curriculum=[{"targets": "bare", "tokens": tokens}])
    message = refused(capsys, tmp_path, tree)
    assert "curriculum.0.tokens.source" in message and "['rank']" in message
    rows = {"score": {"of": [{"store": "bare"}]}, "share": 0.5}
    tree = tiny.config_tree(stores, tmp_path / "run", data=data, curriculum=[{"targets": "bare", "rows": rows}])
    message = refused(capsys, tmp_path, tree)
    assert "curriculum.0.rows" in message and "mean_loss" in message and "Score again" in message


def test_places_that_hold_no_store(stores, tmp_path: Path, capsys) -> None:
    for place, words in (
        (tmp_path / "nowhere", ("does not exist", "potstill dump")),
        (tmp_path / "run.yaml", ("is a file", "potstill dump")),
        (tmp_path, ("run.json",)),
        ("https://example.org/targets", ("unknown scheme", "s3://")),
    ):
        tree = tiny.config_tree(stores, tmp_path / "run", data={"targets": {"teacher": str(place)}})
        message = refused(capsys, tmp_path, tree)
        assert f"data.targets.teacher = {place}" in message
        assert all(word in message for word in words), message


def test_an_unsealed_store_says_how_to_finish_it(stores, tmp_path: Path, capsys) -> None:
    StoreWriter.create(tmp_path / "open", StoreReader(stores["teacher"]).spec)
    tree = tiny.config_tree(stores, tmp_path / "run", data={"targets": {"teacher": str(tmp_path / "open")}})
    message = refused(capsys, tmp_path, tree)
    assert "data.targets.teacher" in message and "not sealed" in message and "potstill status" in message


def test_held_out_rows_that_are_trained_on(stores, tmp_path: Path, capsys) -> None:
    data = {"heldout": str(stores["tokens"]), "heldout_targets": None}
    message = refused(capsys, tmp_path, tiny.config_tree(stores, tmp_path / "run", data=data))
    assert "data.heldout" in message and "data.tokens" in message and "held out" in message


@pytest.mark.parametrize(("group", "key"), [("run", "output_dir"), ("model", "config"), ("model", "path")])
def test_a_url_where_only_a_folder_will_do(stores, tmp_path: Path, capsys, group: str, key: str) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run")
    tree[group] = {**({} if group == "model" else tree[group]), key: "s3://bucket/here"}
    message = refused(capsys, tmp_path, tree, num_problems=1)
    assert f"{group}.{key}: s3://bucket/here is a URL" in message and "local path" in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layer": 12}, ("model.config.num_hidden_layer", "'num_hidden_layers'")),
        ({"hidden_size": "32"}, ("model.config", "hidden_size", "expected int")),
        ({"num_attention_heads": 3}, ("model.config", "32", "3")),
        ({"model_type": "t5"}, ("model.config", "'t5'", "causal")),
        ({"model_type": "lama"}, ("model.config.model_type", "'llama'")),
        ({"vocab_size": 47}, ("model.config", "vocab_size is 47", "below 48")),
        ({"max_position_embeddings": 16}, ("model.config", "max_position_embeddings is 16", "32 tokens")),
    ],
)
def test_an_inline_model_that_cannot_be_meant(stores, tmp_path: Path, capsys, config: dict[str, Any], words) -> None:
    values = config if config.get("model_type") == "t5" else {**tiny.STUDENT, **config}
    tree = tiny.config_tree(stores, tmp_path / "run", model={"config": values})
    message = refused(capsys, tmp_path, tree)
    assert all(word in message for word in words), message


def test_keys_that_transformers_renames_are_fine(stores, tmp_path: Path) -> None:
    """rope_theta lives in rope_parameters now, and is still read."""
    from potstill.student_train.model.hf_config import hf_config

    model = {"config": {**tiny.STUDENT, "rope_theta": 5e3, "torch_dtype": "float32", "head_dim": 16}}
    config = workers.config_of(tiny.config_tree(stores, tmp_path, model=model))
    assert hf_config(config.model, vocab_size=tiny.VOCAB).rope_parameters["rope_theta"] == 5e3


def test_keys_that_no_configuration_declares_are_named(
    stores, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """qwen3_moe reads head_dim, which its configuration does not declare."""
    from potstill.student_train.model.hf_config import hf_config

    values = {"model_type": "qwen3_moe", "hidden_size": 32, "head_dim": 16, "vocab_size": tiny.VOCAB}
    config = workers.config_of(tiny.config_tree(stores, tmp_path, model={"config": values}))
    assert hf_config(config.model, vocab_size=tiny.VOCAB).head_dim == 16
    assert "model.config.head_dim: Qwen3MoeConfig declares no such key" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "holds no readable model configuration"),
        ("{bad", "not a valid JSON"),
        ('{"model_type": "lama"}', "`lama`"),
    ],
)
def test_a_model_folder_that_cannot_be_read(stores, tmp_path: Path, capsys, text: str | None, words: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if text is not None:
        (folder / "config.json").write_text(text)
    message = refused(capsys, tmp_path, tiny.config_tree(stores, tmp_path / "run", model={"config": str(folder)}))
    assert f"model.config {folder}" in message and words in message
    tree = {**tiny.config_tree(stores, tmp_path / "run"), "model": {"path": str(folder)}}
    assert f"model.path {folder} holds no weights" in refused(capsys, tmp_path, tree)


def test_packages_that_are_not_there(stores, tmp_path: Path, capsys) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run", model={"attention": "flash_attention_2"})
    assert "model.attention is flash_attention_2" in refused(capsys, tmp_path, tree)


def test_one_mistake_is_one_line_without_the_whole_tree(stores, tmp_path: Path, capsys) -> None:
    rows = {"score": {"of": [{"store": "slm"}]}, "share": 0}
    for changes, words in (
        ({"curriculum": [{"until": 1.5}, {}]}, ("curriculum.0.until:", "1.5", "line ")),
        ({"curriculum": [{"until": 1}]}, ("curriculum.0.until is 1", "an int is a step")),
        ({"curriculum": [{"until": 0.6}, {"until": 0.9}]}, ("curriculum.1.until is 0.9", "without a stage")),
        ({"curriculum": [{"until": 0.6}, {"until": 0.5}, {}]}, ("[0.6, 0.5] must rise",)),
        ({"curriculum": [{"rows": rows}]}, ("curriculum.0.rows: rows.share takes the value 0.0", "line ")),
        ({"objective": {"alpha": {"kind": "linear", "start": 0}}}, ("objective.alpha.end: this key is needed",)),
        ({"objective": {"alpha": {"kind": "liner", "start": 0, "end": 1}}}, ("objective.alpha: ", "'liner'")),
        ({"data": {"tokens": None}}, ("data.tokens is needed and missing", "data.sources")),
        ({"run": {"max_steps": 0}}, ("run.max_steps: ", "greater than or equal to 1")),
    ):
        tree = tiny.config_tree(stores, tmp_path / "run", **changes)
        message = refused(capsys, tmp_path, tree, num_problems=1)
        assert all(word in message for word in words), message
        for noise in ("Value error", "constrained-", "tagged-union", "lax-or-strict", "num_attention_heads"):
            assert noise not in message, message
    stage = {"until": 20, "targets": "teacher"}
    message = refused(capsys, tmp_path, tiny.config_tree(stores, tmp_path / "run", curriculum=[stage, {}]))
    assert "curriculum.0.until = 20" in message and "raise run.max_steps" in message


def test_slips_on_the_command_line(stores, tmp_path: Path, capsys) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run")
    for override, words in (
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("optimzer.lr=1", "optimzer: unknown key; did you mean 'optimizer'?"),
        ("optimizer.lr", "expected key=value"),
        ("curriculum.3.targets=teacher", "expected an item number below 1"),
        ("curriculum.0.targets=techer", "curriculum.0.targets names 'techer'; data.targets has ['teacher']"),
    ):
        assert words in refused(capsys, tmp_path, tree, "--set", override)
    assert "data.global_batch_rows 5" in refused(capsys, tmp_path, tree, "--set", "data.global_batch_rows=5")
    assert "--num-ranks 0" in refused(capsys, tmp_path, tree, "--num-ranks", "0")
    assert "line 2" in refused(capsys, tmp_path, "run:\n\toutput_dir: x\n")
    assert "a second time" in refused(capsys, tmp_path, "run: {seed: 1}\nrun: {seed: 2}\n")
    assert main(["train", "--preset", "salts"]) == ERROR
    assert "did you mean 'salt'?" in capsys.readouterr().err


def test_deepspeed_keys_that_do_not_exist(stores, tmp_path: Path) -> None:
    passed = {"zero_optimization": {"reduce_bucket_sizes": 5}}
    tree = tiny.config_tree(stores, tmp_path / "run", deepspeed=passed)
    with pytest.raises(AssertionError, match=r"ConfigError.*deepspeed\.zero_optimization\.reduce_bucket_sizes"):
        run_ranks(workers.train_run, tree, world=1)
    assert not (tmp_path / "run" / CONFIG_FILE).exists()


def test_resuming_with_what_may_not_change_and_what_may(stores, tmp_path: Path, capfd) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    model.mkdir()
    config = {**tiny.STUDENT, "vocab_size": tiny.VOCAB}
    (model / "config.json").write_text(json.dumps(config))
    given = {"config": str(model)}

    def tree(**changes: Any) -> dict[str, Any]:
        return tiny.config_tree(stores, run, **{"model": given, "run": {"max_steps": 2}, **changes})

    run_ranks(workers.train_run, tree(), world=1)
    more = {"max_steps": 3}
    for changes, words in (
        ({"run": {**more, "seed": 9}}, ("run.seed", "3", "9")),
        ({"run": more, "model": {"config": dict(tiny.STUDENT)}}, ("model.config",)),
        ({"run": more, "data": {"global_batch_rows": 8}}, ("data.global_batch_rows", "4", "8")),
        ({"run": more, "zero_stage": 1}, ("zero_stage",)),
        ({"run": more, "data": {"targets": {"teacher": str(stores["early_teacher"])}}}, ("other data", "teacher")),
        ({"run": more, "checkpoint": {"resume": "allways"}}, ("checkpoint.resume = allways",)),
    ):
        with pytest.raises(AssertionError) as error:
            run_ranks(workers.train_run, tree(**changes), world=1)
        assert "ResumeError" in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(AssertionError, match=r"(?s)model\.config or model\.path has changed.*hidden_size.*32.*64"):
        run_ranks(workers.train_run, tree(run=more), world=1)
    (model / "config.json").write_text(json.dumps(config))
    changes = workers.changes_of(tree(run=more, objective={"alpha": 0.9}))
    assert any("objective.alpha was 0.5 in this run, from here on it is 0.9" in line for line in changes)
    assert run_ranks(workers.train_run, tree(run=more, objective={"alpha": 0.9}), world=1)[0]["steps"] == 3


def test_a_half_deleted_run_is_deleted_on(stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill inside run.force leaves a folder that is still a run, and no checkpoint to continue from."""
    run = tmp_path / "run"
    run_ranks(workers.train_run, tiny.config_tree(stores, run, run={"max_steps": 2}), world=1)
    (run / ".checkpoints.deleted").mkdir()
    (run / ".checkpoints.deleted" / "of an earlier kill").touch()
    removed: list[Path] = []
    unlink = Path.unlink

    def dies_at_the_third(path: Path, missing_ok: bool = False) -> None:
        removed.append(path)
        if len(removed) == 3:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            delete_run(run)
    assert (run / CONFIG_FILE).is_file() and not checkpoints_folder(run).exists()
    prepare_run_folder(workers.config_of(tiny.config_tree(stores, run, run={"force": True})))
    assert list(run.iterdir()) == []


def test_a_kill_during_the_very_first_writes(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / PART_FILE).write_text("run: {out")
    prepare_run_folder(workers.config_of(tiny.config_tree(stores, run)))
    (run / METRICS_FILE).write_text('{"kind": "train", "st')
    cut_metrics(run, 0)
    with open(run / METRICS_FILE, "a") as file:
        file.write('{"kind": "train", "step": 2}\n')
    assert [record["step"] for record in read_metrics(run)] == [2]
