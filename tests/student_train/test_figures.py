"""Figures of a run, each made again by hand in float64; which rows are read, and which positions reach the head."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.common.config import build_config
from potstill.storage import LoadedBatch, StoreReader
from potstill.student_train import evaluate
from potstill.student_train.config.train import EvalConfig
from potstill.student_train.data.batch import MicroBatch, collate
from potstill.student_train.evaluation.heldout import TARGETS, measuring_objective
from potstill.student_train.hf_export.weights import find_source, load_model
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import build_student
from potstill.student_train.run.engine import Topology
from potstill.student_train.run.metrics import PEAK_FLOPS, Meter, ModelCost, attention_spans, read_metrics
from potstill.student_train.run.trainer import model_cost
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

TEMPERATURE = 2.0
SELECTED = {"policy": "label_rank", "source": "slm", "max_rank": 5, "floor": 0.25}


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == kind]


def watch(tree: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = pickle.loads(run_ranks(workers.watched_run, tree, world=1)[0])
    return seen


def hand_figures(hf: Any, micro: MicroBatch, temperature: float = TEMPERATURE) -> dict[str, Tensor]:
    """Per position [N] in float64, plainly from the dense logits; NaN where there is nothing to measure."""
    out = hf.model(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False).last_hidden_state
    hidden = out.flatten(0, 1) if micro.token_index is None else out.flatten(0, 1)[micro.token_index]
    logits = hidden @ hf.lm_head.weight.t()
    count = len(micro.labels)
    names = ("ce", "correct", "entropy", "kd", "kept", "student", "agreement")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    nothing = torch.tensor(float("nan"), dtype=torch.float64)
    for n in range(count):
        log_q, label = logits[n].log_softmax(0), int(micro.labels[n])
        found["ce"].append(-log_q[label] if label >= 0 else nothing)
        found["correct"].append((logits[n].argmax() == label).double() if label >= 0 else nothing)
        found["entropy"].append(-(log_q.exp() * log_q).sum())
        entries = slice(int(micro.targets.offsets[n]), int(micro.targets.offsets[n + 1]))
        ids = micro.targets.ids[entries].long()
        if not len(ids):
            for name in ("kd", "kept", "student", "agreement"):
                found[name].append(nothing)
            continue
        tails = micro.targets.log_tail if temperature == 1.0 else micro.targets.log_tail_at[temperature]
        tail = tails[n].double()
        kept = 1 - tail.exp()
        p = kept * (micro.targets.logprobs[entries].double() / temperature).softmax(0)
        log_s = (logits[n] / temperature).log_softmax(0)[ids]
        found["kd"].append((p * (p.log() - log_s)).sum() + tail.exp() * (tail - (1 - log_s.exp().sum()).log()))
        found["kept"].append(kept)
        found["student"].append(log_s.exp().sum())
        found["agreement"].append((logits[n].argmax() == ids[0]).double())
    return {name: torch.stack(values) for name, values in found.items()}


def mean(values: Tensor, weights: Tensor) -> float:
    there = ~values.isnan() & (weights > 0)
    return float((values * weights)[there].sum() / weights[there].sum())


@pytest.fixture(scope="module")
def watched(stores, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A run of four steps with a row selector, weights below one, and a temperature; a stage on labels at its end."""
    run = tmp_path_factory.mktemp("watched") / "run"
    rows = {"score": {"of": [{"store": "slm"}]}, "share": 0.3, "segments": 1}
    curriculum = [
        {"until": 3, "targets": "teacher", "temperature": TEMPERATURE, "rows": rows, "tokens": SELECTED},
        {"tokens": {"policy": "top_entropy", "share": 0.3}},
    ]
    tree = tiny.config_tree(
        stores, run, curriculum=curriculum, run={"max_steps": 5}, logging={"every_steps": 3}, objective={"alpha": 0.7}
    )
    tree["optimizer"] = {"lr": 1e-2, "grad_clip": 100.0}
    return run, tree, watch(tree)


def test_a_line_of_metrics_is_what_the_batches_say(watched) -> None:
    run, tree, seen = watched
    config = workers.config_of(tree)
    student = build_student(config.model, hf_config(config.model, vocab_size=tiny.VOCAB), seed=0).double()
    parts: list[dict[str, Tensor]] = []
    losses: list[float] = []
    for state, micros, objective in seen["steps"][:3]:
        student.load_state_dict({name: value.double() for name, value in state.items()})
        student.zero_grad()
        total, weight = torch.zeros((), dtype=torch.float64), 0.0
        for micro in micros:
            found = hand_figures(student.hf, micro)
            w = micro.token_weights.double()
            kd, ce = found["kd"].nan_to_num(), found["ce"].nan_to_num()
            total = (
                total
                + (w * (objective.settings.alpha * TEMPERATURE**2 * kd + (1 - objective.settings.alpha) * ce)).sum()
            )
            weight += float(w.sum())
            parts.append({**{name: value.detach() for name, value in found.items()}, "w": w, "labels": micro.labels})
        (total / weight).backward()
        losses.append(float(total.detach()) / weight)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    w, labelled = whole["w"], whole["labels"] >= 0
    record = lines(run)[0]
    assert record["step"] == 3 and record["step_losses"] == pytest.approx(losses, rel=1e-5)
    names = {"kd": "kd", "ce": "ce", "kept_mass": "kept", "student_mass": "student", "agreement": "agreement"}
    for name, mine in {**names, "accuracy": "correct", "entropy": "entropy"}.items():
        assert record[name] == pytest.approx(mean(whole[mine], w), rel=1e-5), name
    assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert record["selected_share"] == float((w > 0).sum()) / float(labelled.sum()) == 1.0
    assert record["effective_positions"] == pytest.approx(float(w.sum() ** 2 / (w**2).sum()), rel=1e-6)
    assert record["effective_positions"] < 0.9 * float(labelled.sum())
    assert record["tokens"] == len(w)
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_held_out_figures_are_those_of_the_logits(watched, stores) -> None:
    run, _, _ = watched
    config = build_config(
        EvalConfig,
        {
            "model": str(run),
            "heldout": str(stores["heldout"]),
            "targets": str(stores["heldout_teacher"]),
            "batch_rows": 3,
        },
        source="test",
    )
    figures = evaluate(config).figures
    hf = load_model(find_source(run), dtype="float32").double()
    tokens, targets = StoreReader(stores["heldout"]), StoreReader(stores["heldout_teacher"])
    rows = list(range(tokens.num_rows))
    batch = LoadedBatch(0, np.array(rows), tokens.rows(rows), {TARGETS: targets.rows(rows)})
    parts = [
        hand_figures(hf, micro, 1.0)
        for micro in collate(batch, measuring_objective(with_targets=True), micro_batch_rows=1, row_length=32)
    ]
    whole = {name: torch.cat([part[name] for part in parts]).detach() for name in parts[0]}
    ones = torch.ones_like(whole["ce"])
    for name, mine in (("heldout_loss", "ce"), ("accuracy", "correct"), ("agreement", "agreement")):
        assert figures[name] == pytest.approx(mean(whole[mine], ones), rel=1e-5), name
    # The kept entries and the tail are stored on a grid; the loss scales the buckets to sum to 1.
    assert figures["teacher_kl"] == pytest.approx(mean(whole["kd"], ones), rel=2e-3)
    labelled = ~whole["ce"].isnan()
    assert figures["entropy"] == pytest.approx(float(whole["entropy"][labelled].mean()), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(float(whole["ce"].nanmean().exp()), rel=1e-5)


def test_only_selected_rows_are_read(watched) -> None:
    _, tree, seen = watched
    config = workers.config_of(tree)
    plan = workers.build_plan(config, workers.open_stores(config))
    ahead = range(5 + config.data.prefetch_batches + 1)
    distilled = [row for batch in range(3) for row in plan.rows(batch).tolist()]
    assert len(set(distilled)) == 12 and plan.segments[0].pool_size == 12
    assert sorted(seen["read"]["teacher"]) == sorted(distilled)
    assert sorted(seen["read"]["scores"]) == sorted(distilled), "the token selector's figures, of the same rows alone"
    every = [row for batch in ahead for row in plan.rows(batch).tolist()]
    assert set(seen["read"]["tokens"]) <= set(every)


def test_only_selected_positions_reach_the_head(watched, stores, tmp_path: Path) -> None:
    _, _, seen = watched
    forwards = [micro for _, micros, _ in seen["steps"] for micro in micros]
    assert len(seen["head"]) == len(forwards)
    checked = {0, 6}  # the first of each stage also goes through the self-check
    for number, (micro, found) in enumerate(zip(forwards, seen["head"], strict=True)):
        # The second stage asks the student: all tokens are measured once, then the chosen ones train.
        measured = 0 if number < 6 else len(micro.labels)
        assert micro.num_active is not None
        if number not in checked:
            assert found == micro.num_active + measured
    # Without a floor the positions that are not chosen never come to the head.
    hard = {"policy": "label_rank", "source": "slm", "max_rank": 5}
    curriculum = [{"targets": "teacher", "tokens": hard}]
    tree = tiny.config_tree(stores, tmp_path / "run", curriculum=curriculum, run={"max_steps": 2, "self_check": False})
    seen = watch(tree)
    micros = [micro for _, micros, _ in seen["steps"] for micro in micros]
    assert seen["head"] == [int((micro.token_weights > 0).sum()) for micro in micros]
    assert sum(seen["head"]) < 0.8 * sum(int((micro.labels >= 0).sum()) for micro in micros)


def test_saved_flops_are_what_the_head_did_not_do(watched) -> None:
    run, tree, seen = watched
    config = workers.config_of(tree)
    student_config = hf_config(config.model, vocab_size=tiny.VOCAB)
    student = build_student(config.model, student_config, seed=0)
    cost = model_cost(student, student_config, tiny.ROW_LENGTH, Topology(0, 1, torch.device("cpu")))
    assert cost.peak is None and cost.utilisation({"tokens": 1.0}, seconds=1.0, world_size=1) is None
    width, layers = 32, 2
    # q and o, k and v of one head of 16, three matrices of the MLP, norms.
    backbone = layers * (2 * width * width + 2 * width * 16 + 3 * width * 48 + 2 * width) + width
    assert cost.per_token == 6 * backbone + 6 * layers * width * tiny.ROW_LENGTH
    micros = [micro for _, micros, _ in seen["steps"][3:] for micro in micros]
    tokens, labelled = sum(len(m.labels) for m in micros), sum(int((m.labels >= 0).sum()) for m in micros)
    chosen = sum(int(m.num_active) for m in micros)
    head = 2 * width * tiny.VOCAB
    saved = 3 * head * (labelled - chosen) - head * tokens
    whole = cost.per_token * tokens + 3 * head * labelled
    record = lines(run)[-1]
    assert record["step"] == 5 and record["selected_share"] == pytest.approx(chosen / labelled)
    assert record["flops_saved_share"] == pytest.approx(saved / whole, rel=1e-6)
    assert lines(run)[0]["flops_saved_share"] == 0.0


def test_mfu_by_hand() -> None:
    cost = ModelCost(per_token=100.0, per_position=30.0, peak=1e3)
    sums = {"tokens": 50.0, "positions": 20.0, "labelled": 40.0, "measured": 0.0}
    assert cost.utilisation(sums, seconds=2.0, world_size=4) == (100 * 50 + 30 * 20) / (2 * 1e3 * 4)
    assert cost.saved_share(sums) == 30 * 20 / (100 * 50 + 30 * 40)
    assert cost.saved_share({**sums, "measured": 50.0}) == pytest.approx((30 * 20 - 10 * 50) / (100 * 50 + 30 * 40))
    assert PEAK_FLOPS.get("cpu") is None and PEAK_FLOPS.get("NVIDIA GeForce RTX 4090") is None


def test_attention_is_counted_by_its_span_and_its_own_width() -> None:
    from transformers import Gemma2Config, MambaConfig, MistralConfig, Qwen2Config, Qwen3Config

    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32}
    assert attention_spans(Qwen3Config(**small), 100) == [50.0, 50.0]
    assert attention_spans(Qwen2Config(**small, sliding_window=10), 100) == [50.0, 50.0], "the window is off"
    # Token t of a row looks at min(t, 20) tokens: 20 of them but for the first 20.
    assert attention_spans(MistralConfig(**small, sliding_window=20), 100) == [18.0, 18.0]
    assert attention_spans(MistralConfig(**small, sliding_window=4096), 100) == [50.0, 50.0]
    assert attention_spans(Gemma2Config(**small, sliding_window=20), 100) == [18.0, 50.0]
    other = SimpleNamespace(layer_types=["linear_attention", "full_attention"], sliding_window=None)
    assert attention_spans(other, 100) is None, "unknown layers have no count, so no MFU"
    assert MambaConfig is not None
    wide = {**tiny.STUDENT, "model_type": "qwen3", "head_dim": 64}
    config = workers.config_of(
        {
            "run": {"output_dir": "x", "max_steps": 1},
            "model": {"config": wide},
            "data": {"tokens": "x", "global_batch_rows": 1},
        }
    )
    student_config = hf_config(config.model, vocab_size=tiny.VOCAB)
    student = build_student(config.model, student_config, seed=0)
    cost = model_cost(student, student_config, 100, Topology(0, 1, torch.device("cpu")))
    backbone = sum(p.numel() for p in student.hf.model.parameters()) - tiny.VOCAB * 32
    assert cost.per_token == 6 * backbone + 12 * (2 * 64) * (50 + 50)


def test_a_meter_leaves_out_what_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("potstill.student_train.run.metrics.time.monotonic", lambda: now[0])
    meter = Meter(torch.device("cpu"), ())
    now[0] += 2.0
    with meter.paused():
        now[0] += 30.0
    assert meter.seconds() == 2.0
    now[0] += 0.5
    assert meter.seconds() == 2.5


def test_evaluations_between_two_lines_keep_tokens_and_time_right(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny.config_tree(
        stores, run, run={"max_steps": 9}, logging={"every_steps": 4}, checkpoint={"every_steps": 6}
    )
    tree["eval"] = {"every_steps": 3}
    config = workers.config_of(tree)
    stores_opened = workers.open_stores(config)
    lengths, plan = stores_opened.tokens.row_lengths, workers.build_plan(config, stores_opened)
    tokens = np.cumsum([int(lengths[plan.rows(batch)].sum()) for batch in range(9)])
    run_ranks(workers.train_run, tree, world=1)
    assert [record["step"] for record in lines(run)] == [3, 4, 6, 8, 9]
    for kind in ("train", "eval"):
        for record in lines(run, kind):
            assert record["tokens"] == tokens[record["step"] - 1], (kind, record["step"])
    seconds = {record["step"]: record["runtime_seconds"] for record in lines(run)}
    for record in lines(run, "eval"):
        assert record["runtime_seconds"] == seconds[record["step"]]
    before, spent = 0, 0.0
    for record in lines(run):
        spent += record["step_seconds"] * (record["step"] - before)
        assert record["runtime_seconds"] == pytest.approx(spent)
        number = record["tokens"] - (tokens[before - 1] if before else 0)
        assert record["tokens_per_second"] == pytest.approx(
            number / (record["step_seconds"] * (record["step"] - before))
        )
        before = record["step"]


def test_tokens_go_on_after_a_resume(stores, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    save = {"every_steps": 3}
    run_ranks(workers.train_run, tiny.config_tree(stores, whole, run={"max_steps": 9}, checkpoint=save), world=1)
    for steps in (3, 6, 9):
        tree = tiny.config_tree(stores, parts, run={"max_steps": steps}, checkpoint=save)
        result = run_ranks(workers.train_run, tree, world=1)[0]
    expected, found = lines(whole), lines(parts)
    assert [(r["step"], r["tokens"]) for r in found] == [(r["step"], r["tokens"]) for r in expected]
    assert result["tokens"] == expected[-1]["tokens"]
    times = [record["runtime_seconds"] for record in found]
    assert times == sorted(times) and times[0] > 0


def test_every_zero_stage_tells_the_same_gradient_norm(stores, tmp_path: Path) -> None:
    norms = {}
    for stage, world in ((0, 1), (0, 2), (2, 2)):
        run = tmp_path / f"{stage}{world}"
        tree = tiny.config_tree(stores, run, run={"max_steps": 2}, zero_stage=stage, logging={"every_steps": 1})
        tree["data"]["micro_batch_rows"] = 1
        run_ranks(workers.train_run, tree, world=world)
        norms[stage, world] = [record["grad_norm"] for record in lines(run)]
    assert norms[0, 1][0] > 0
    assert norms[0, 2] == pytest.approx(norms[0, 1], rel=1e-4)
    assert norms[2, 2] == pytest.approx(norms[0, 1], rel=1e-4)
