"""Whole runs: learning, figures, export with equal logits, evaluation, ways to stop."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.common.config import build_config
from potstill.common.errors import UserError
from potstill.common.exit_codes import ERROR, PREEMPTED
from potstill.common.processes import free_port
from potstill.student_train import evaluate, export
from potstill.student_train.config.train import EvalConfig, ExportConfig, TrainConfig
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.run_folder import prepare_run_folder
from potstill.student_train.run.stop import StoppedByFileError
from tests.dist_harness import Ranks, run_ranks
from tests.student_train import tiny, workers


def eval_config(**values: Any) -> EvalConfig:
    return build_config(EvalConfig, {"num_threads": 1, **values}, source="test")


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == kind]


@pytest.fixture(scope="module")
def distilled(stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished two-rank run."""
    run = tmp_path_factory.mktemp("distilled") / "run"
    tree = tiny.config_tree(stores, run, run={"max_steps": 60}, optimizer={"lr": 1e-2}, zero_stage=2)
    run_ranks(workers.train_run, tree, world=2)
    return run


def test_it_learns_and_reports(distilled: Path) -> None:
    records = lines(distilled)
    first, last = records[0], records[-1]
    assert last["loss"] < first["loss"] - 0.3
    assert last["agreement"] > 0.3 > first["agreement"]
    assert last["step"] == 60 and first["step"] == 2
    assert first["stage"] == "stage_0" and first["mfu"] is None and first["selected_share"] == 1.0
    assert len(first["step_losses"]) == len(first["row_digests"]) == 2
    assert first["loss"] == pytest.approx(sum(first["step_losses"]) / 2)
    assert first["loss"] == pytest.approx(0.5 * first["kd"] + 0.5 * first["ce"], rel=1e-3)
    assert 0 < first["kept_mass"] < 1 and first["tokens_per_second"] > 0 and first["peak_memory_bytes"] > 0
    for name in ("config.yaml", "deepspeed.json", "versions.json", "plan.json", "student/config.json", "done.json"):
        assert (distilled / name).is_file()
    assert json.loads((distilled / "done.json").read_text())["step"] == 60
    heldout = lines(distilled, "eval")[-1]
    assert heldout["perplexity"] == pytest.approx(math.exp(heldout["heldout_loss"]))
    assert heldout["rows"] == 11 and heldout["teacher_kl"] > 0


def test_export_loads_in_a_fresh_process_with_equal_logits(distilled: Path, stores, tmp_path: Path) -> None:
    config = {"run": str(distilled), "output_dir": str(tmp_path / "hf"), "tokenizer": None}
    summary = export(build_config(ExportConfig, config, source="test"))
    assert summary.logits_difference is not None and summary.logits_difference <= 1e-5
    assert summary.step == 60 and "tokenizer: not known" in summary.format()
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*")), "the working folder is gone"

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with pytest.raises(UserError, match="exists"):
        export(build_config(ExportConfig, config, source="test"))

    common = {"heldout": str(stores["heldout"]), "targets": str(stores["heldout_teacher"]), "batch_rows": 3}
    from_run = evaluate(eval_config(model=str(distilled), **common))
    from_folder = evaluate(eval_config(model=str(tmp_path / "hf"), output=str(tmp_path / "e.json"), **common))
    during = lines(distilled, "eval")[-1]
    for name, value in from_run.figures.items():
        assert from_folder.figures[name] == pytest.approx(value, rel=1e-6)
        assert during[name] == pytest.approx(value, rel=1e-5)
    assert json.loads((tmp_path / "e.json").read_text())["heldout_loss"] == from_folder.figures["heldout_loss"]
    with pytest.raises(UserError, match=r"e\.json exists"):
        evaluate(eval_config(model=str(tmp_path / "hf"), output=str(tmp_path / "e.json"), **common))


def calibration_by_hand(model: Any, reader: Any) -> float:
    """Expected calibration error with 15 bins, document by document."""
    found = []
    for number in range(reader.num_rows):
        row, start = reader.row(number), 0
        for size in row.doc_lens:
            ids = torch.from_numpy(row.tokens[start : start + size].astype("int64"))
            start += size
            with torch.no_grad():
                confidence, choice = model(input_ids=ids.unsqueeze(0)).logits[0].softmax(-1).max(-1)
            found += [(float(c), bool(k == y)) for c, k, y in zip(confidence, choice, ids[1:], strict=False)]
    error = 0.0
    for low in range(15):
        mine = [(c, right) for c, right in found if low / 15 <= c < (low + 1) / 15]
        error += abs(sum(c for c, _ in mine) - sum(right for _, right in mine)) / len(found)
    return error


def test_the_perplexity_is_that_of_transformers(distilled: Path, stores) -> None:
    """The held-out loss against a loop over documents with the Hugging Face loss."""
    from potstill.storage import StoreReader
    from potstill.student_train.hf_export.weights import find_source, load_model

    model = load_model(find_source(distilled), dtype="float32")
    reader = StoreReader(stores["heldout"])
    total, count = 0.0, 0
    for number in range(reader.num_rows):
        row, start = reader.row(number), 0
        for size in row.doc_lens:
            ids = torch.from_numpy(row.tokens[start : start + size].astype("int64")).unsqueeze(0)
            start += size
            if size > 1:
                with torch.no_grad():
                    total += float(model(input_ids=ids, labels=ids).loss) * (size - 1)
                count += size - 1
    found = evaluate(eval_config(model=str(distilled), heldout=str(stores["heldout"])))
    assert found.figures["calibration_error"] == pytest.approx(calibration_by_hand(model, reader), abs=1e-5)
    assert found.figures["heldout_loss"] == pytest.approx(total / count, rel=1e-5)
    assert found.figures["positions"] == count
    assert found.figures["agreement"] is None


def test_a_seed_means_the_same_weights_for_every_stage(stores, tmp_path: Path) -> None:
    losses = {}
    for stage, world in ((0, 1), (2, 2), (3, 2)):
        run = tmp_path / f"stage{stage}"
        tree = tiny.config_tree(stores, run, run={"max_steps": 2}, zero_stage=stage, logging={"every_steps": 1})
        run_ranks(workers.train_run, tree, world=world)
        losses[stage] = lines(run)[0]["loss"]
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert losses[3] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
def test_export_of_zero_three_in_bfloat16(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny.config_tree(stores, run, run={"max_steps": 3}, zero_stage=3)
    tree["model"]["dtype"] = "bfloat16"
    run_ranks(workers.train_run, tree, world=2)
    config = {"run": str(run), "output_dir": str(tmp_path / "hf")}
    summary = export(build_config(ExportConfig, config, source="test"))
    assert summary.logits_difference is not None and summary.logits_difference <= 1e-5
    during = lines(run, "eval")[-1]
    found = evaluate(eval_config(model=str(tmp_path / "hf"), heldout=str(stores["heldout"]), dtype="bfloat16"))
    assert found.figures["heldout_loss"] == pytest.approx(during["heldout_loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_export_in_several_files_of_a_head_of_its_own(stores, tmp_path: Path, stage: int) -> None:
    run = tmp_path / "run"
    tree = tiny.config_tree(stores, run, run={"max_steps": 2}, zero_stage=stage)
    tree["model"]["config"] |= {"tie_word_embeddings": False, "initializer_range": 0.1}
    run_ranks(workers.train_run, tree, world=1 if stage == 0 else 2)
    values = {"run": str(run), "output_dir": str(tmp_path / "hf"), "max_shard_bytes": 16384}
    summary = export(build_config(ExportConfig, values, source="test"))
    assert summary.logits_difference is not None and summary.logits_difference <= 1e-5
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    found = evaluate(eval_config(model=str(tmp_path / "hf"), heldout=str(stores["heldout"])))
    assert found.figures["heldout_loss"] == pytest.approx(lines(run, "eval")[-1]["heldout_loss"], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny.config_tree(stores, run, checkpoint={"every_steps": 2})
    with pytest.raises(AssertionError) as error:
        run_ranks(workers.train_with_bad_weights, tree, 5, world=2)
    message = str(error.value)
    plan = workers.build_plan(workers.config_of(tree), workers.open_stores(workers.config_of(tree)))
    assert "the loss of step 5 is not finite" in message
    assert ", ".join(str(row) for row in plan.rows(5)) in message
    assert "step_00000004" in message
    # Nothing was saved from the broken state, and starting again simply continues from step 4.
    assert run_ranks(workers.train_run, tree, world=2)[0]["steps"] == 8
    assert all(math.isfinite(record["loss"]) for record in lines(run))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_is_skipped_if_asked(stores, tmp_path: Path, dtype: str) -> None:
    run = tmp_path / "run"
    tree = tiny.config_tree(stores, run, nan_policy="skip", zero_stage=1, logging={"every_steps": 1})
    tree["model"]["dtype"] = dtype
    assert run_ranks(workers.train_with_a_bad_batch, tree, 3, world=2)[0] == {"status": "done", "skipped": 1}
    losses = [record["loss"] for record in lines(run)]
    assert losses[3] is None and all(loss is not None and loss < 4 for loss in losses[:3] + losses[4:])
    assert [record["skipped_steps"] for record in lines(run)] == [0, 0, 0, 1, 1, 1, 1, 1]


def test_a_stop_file_saves_and_stops_all_ranks(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny.config_tree(stores, run, run={"max_steps": 100000})
    with Ranks(workers.train_run, world=2, args=(tree,)) as ranks:
        end = time.monotonic() + 60
        while not lines(run) and time.monotonic() < end:
            time.sleep(0.02)
        (run / "stop").touch()
        results = ranks.results(timeout_seconds=60)
    # A rank that had not seen the file yet when the others had stops with them.
    statuses = {result["status"] for result in results}
    assert statuses <= {f"stop file {run / 'stop'}", "another rank's request"}
    assert any(status.startswith("stop file") for status in statuses)
    steps = results[0]["steps"]
    assert steps == results[1]["steps"] < 100000
    assert (run / "checkpoints" / f"step_{steps:08d}" / "potstill.json").is_file()
    assert not (run / "done.json").exists()
    # No start overrules the file, so that a scheduler's next turn does not either; a person takes it away.
    config = build_config(TrainConfig, tiny.config_tree(stores, run), source="test")
    for forced in (False, True):
        with pytest.raises(StoppedByFileError, match=re.escape(f"delete the file to continue: rm {run / 'stop'}")):
            prepare_run_folder(config.model_copy(update={"run": config.run.model_copy(update={"force": forced})}))
    (run / "stop").unlink()
    shorter = tiny.config_tree(stores, run, run={"max_steps": steps + 2})
    result = run_ranks(workers.train_run, shorter, world=2)[0]
    assert (result["status"], result["steps"]) == ("done", steps + 2)


def test_a_deadline_saves_and_stops(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny.config_tree(stores, run, run={"max_steps": 4})
    run_ranks(workers.train_run, tree, world=1)
    longer = tiny.config_tree(stores, run, run={"max_steps": 4000, "max_runtime_minutes": 0.02})
    result = run_ranks(workers.train_run, longer, world=1)[0]
    assert result["status"] == "run.max_runtime_minutes" and 4 < result["steps"] < 4000
    assert not (run / "done.json").exists()


def start(tree: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """One rank as a launcher-less command."""
    import yaml

    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "potstill.student_train", "--config", str(folder / "run.yaml"), "--local_rank=0"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_with_a_code_that_says_so(stores, tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    process = start(tiny.config_tree(stores, run, run={"max_steps": 100000}), tmp_path)
    try:
        end = time.monotonic() + 90
        while not lines(run) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == PREEMPTED, errors
    assert f"signal {signal.Signals(number).name}" in errors
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert json.loads((newest / "potstill.json").read_text())["loop"]["step"] == lines(run)[-1]["step"]


def test_a_mistake_exits_with_one_and_one_line(stores, tmp_path: Path) -> None:
    tree = tiny.config_tree({**stores, "tokens": stores["scores"]}, tmp_path / "run")
    process = start(tree, tmp_path)
    try:
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == ERROR
    assert "data.tokens" in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_cpu_offload_changes_nothing(stores, tmp_path: Path, stage: int) -> None:
    losses = []
    for name, zero in (("plain", {}), ("offload", {"offload_optimizer": {"device": "cpu"}})):
        run = tmp_path / name
        passed = {"zero_optimization": zero} if zero else {}
        tree = tiny.config_tree(stores, run, zero_stage=stage, deepspeed=passed, model={"dtype": "bfloat16"})
        run_ranks(workers.train_run, tree, world=2)
        losses.append([loss for record in lines(run) for loss in record["step_losses"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_tokens_make_steps(stores, tmp_path: Path) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run")
    tree["run"] = {"output_dir": str(tmp_path / "run"), "max_tokens": 1000}
    config = workers.config_of(tree)
    plan = workers.build_plan(config, workers.open_stores(config))
    assert plan.total_steps == 8, "1000 tokens are 7.8 global batches of 4 rows of 32"


@pytest.mark.slow
def test_the_deepspeed_launcher(stores, tmp_path: Path) -> None:
    import yaml

    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.config_tree(stores, run)))
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_accelerators", "2", "--master_port", str(free_port()), "--module"]
    command += ["potstill.student_train", "--config", str(tmp_path / "run.yaml"), "--set", "run.max_steps=6"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=150)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode == 0, errors
    assert json.loads((run / "done.json").read_text())["step"] == 6
