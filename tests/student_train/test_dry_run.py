"""A dry run says what a start would do: its figures are compared with what is really built, read and held."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from potstill.common.exit_codes import DONE
from potstill.kernels.backend import Backend
from potstill.kernels.loss import linear_sparse_loss, logits_chunk_bytes
from potstill.launch.cli import main
from potstill.storage import Loader, StoreReader
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.parameters import count_parameters
from potstill.student_train.model.student import build_student
from potstill.student_train.run.checkpoint import Checkpoint
from potstill.student_train.run.dry_run import DryRun, dry_run
from potstill.student_train.run.dry_run_text import format_dry_run
from potstill.student_train.run.preflight import check_start
from tests.student_train import tiny, workers


def figures(tree: dict[str, Any], *, num_ranks: int = 2) -> DryRun:
    return dry_run(check_start(workers.config_of(tree), num_ranks=num_ranks, planning=True))


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_weights_are_those_of_a_built_model(stores, tmp_path: Path, tied: bool) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run", model={"config": {**tiny.STUDENT, "tie_word_embeddings": tied}})
    found, config = figures(tree), workers.config_of(tree)
    built = build_student(config.model, hf_config(config.model, vocab_size=tiny.VOCAB), seed=0)
    assert found.num_parameters == count_parameters(built) == sum(p.numel() for p in built.parameters())
    assert found.memory_bytes["weights"] == sum(p.numel() * p.element_size() for p in built.parameters())
    head = built.hf.lm_head.weight
    assert found.memory_bytes["head gradient of the loss (float32)"] == head.numel() * 4


def test_a_mixture_of_experts_is_counted_whole(stores, tmp_path: Path) -> None:
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    tree = tiny.config_tree(stores, tmp_path / "run", model={"config": {**tiny.STUDENT, **mixture}})
    config = workers.config_of(tree)
    built = build_student(config.model, hf_config(config.model, vocab_size=tiny.VOCAB), seed=0)
    assert figures(tree).num_parameters == count_parameters(built)


@pytest.mark.parametrize("num_tokens", [3, 400, 2000])
def test_the_logits_chunk_is_what_the_loss_allocates(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    """20,000 words: the budget of a CPU holds 384 rows of them."""
    vocab_size, hidden = 20_000, 4
    made: list[torch.Tensor] = []
    slab = Backend.slab

    def noting(self: Backend, *args: Any) -> torch.Tensor:
        made.append(slab(self, *args))
        return made[-1]

    monkeypatch.setattr(Backend, "slab", noting)
    torch.manual_seed(0)
    weight = torch.randn(vocab_size, hidden, requires_grad=True)
    states, labels = torch.randn(num_tokens, hidden), torch.randint(vocab_size, (num_tokens,))
    linear_sparse_loss(hidden=states, weight=weight, targets=None, labels=labels, alpha=0.0)
    found = logits_chunk_bytes(
        num_tokens=num_tokens, vocab_size=vocab_size, dtype=torch.float32, device=torch.device("cpu")
    )
    assert [buffer.untyped_storage().nbytes() for buffer in made] == [found]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bytes_are_those_that_the_loaders_read(stores, tmp_path: Path, monkeypatch, num_ranks: int) -> None:
    """Two stages: rows by score with targets, then labels only; the second reads no targets."""
    rows = {"score": {"of": [{"store": "slm"}]}, "share": {"kind": "linear", "start": 0.25, "end": 1.0}, "segments": 2}
    tree = tiny.config_tree(
        stores, tmp_path / "run", curriculum=[{"until": 0.5, "targets": "teacher", "rows": rows}, {}]
    )
    found = figures(tree, num_ranks=num_ranks)
    assert not found.reads_sampled

    counted: dict[str, int] = {}
    read_batch = StoreReader._read_batch

    def counting(self: StoreReader, row: int, entry: Any, there: Any) -> Any:
        counted[self.digest] = counted.get(self.digest, 0) + int(entry["length"])
        return read_batch(self, row, entry, there)

    run = check_start(workers.config_of(tree), num_ranks=num_ranks).run
    monkeypatch.setattr(StoreReader, "_read_batch", counting)
    for rank in range(num_ranks):
        with Loader(run.plan, run.stores.tokens, run.stores.joined, rank=rank, world=num_ranks) as loader:
            for step in range(run.plan.total_steps):
                for ids in loader.reads(step):
                    loader._load(ids, run.plan.joined(step))
    told = {store.digest: store.read_bytes for store in found.stores if store.read_bytes}
    assert told == counted and len(told) == 2, "tokens and targets; the selector's statistics stand in the index"
    assert [stage.reads for stage in found.stages] == [("teacher",), ()]
    assert found.stages[0].row_share == (0.25, 1.0)


def test_a_long_run_is_sampled_and_said_so(stores, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("potstill.student_train.run.dry_run.SAMPLED_ROWS", 400)
    whole = tiny.config_tree(stores, tmp_path / "run", run={"max_steps": 100})
    longer = tiny.config_tree(stores, tmp_path / "run", run={"max_steps": 10_000})
    exact, sampled = figures(whole), figures(longer)
    assert not exact.reads_sampled and sampled.reads_sampled
    for few, many in zip(exact.stores, sampled.stores, strict=True):
        if few.read_bytes:
            assert many.read_bytes == pytest.approx(100 * few.read_bytes, rel=0.05)
    assert "all ranks: about " in format_dry_run(sampled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_zero_stage_cuts_one_more_part(stores, tmp_path: Path, dtype: str) -> None:
    """Table of the ZeRO paper (arXiv 1910.02054, figure 1): 2 + 2 + 12 bytes a parameter in mixed precision."""
    width, parameters = {"float32": 4, "bfloat16": 2}[dtype], 17_056
    for stage in range(4):
        tree = tiny.config_tree(stores, tmp_path / "run", zero_stage=stage, data={"global_batch_rows": 8})
        tree["model"]["dtype"] = dtype
        parts = figures(tree, num_ranks=4).memory_bytes
        assert parts["weights"] == width * parameters // (4 if stage == 3 else 1)
        assert parts["gradients"] == width * parameters // (4 if stage >= 2 else 1)
        assert parts["AdamW moments (float32)"] == 8 * parameters // (4 if stage >= 1 else 1)
        assert parts["master weights (float32)"] == (
            0 if dtype == "float32" and stage == 0 else 4 * parameters // (4 if stage >= 1 else 1)
        )


def test_the_command_prints_it_for_more_ranks_than_there_are(stores, tmp_path: Path, capsys) -> None:
    stages = [
        {"name": "guided", "until": 0.25, "targets": "teacher", "alpha": {"kind": "linear", "start": 0.9, "end": 0.5}},
        {"name": "all", "tokens": {"policy": "top_loss", "source": "slm", "share": 0.5}},
    ]
    tree = tiny.config_tree(stores, tmp_path / "run", curriculum=stages, data={"global_batch_rows": 32})
    tree["data"]["micro_batch_rows"] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    words = ["train", "--config", str(tmp_path / "run.yaml"), "--num-ranks", "16", "--dry-run", "--json"]
    assert main(words) == DONE
    captured = capsys.readouterr()
    assert captured.err == "" and not (tmp_path / "run").exists()
    text, _, last = captured.out.strip().rpartition("\n")
    told = json.loads(last)
    assert (told["accumulation"], told["num_ranks"], told["total_steps"], told["passes"]) == (2, 16, 8, 6.4)
    assert [store["key"] for store in told["stores"]][:3] == ["data.tokens", "data.targets.teacher", "data.scores.slm"]
    assert told["stores"][0]["digest"] == StoreReader(stores["tokens"]).digest
    for line in (
        "starts at step 0",
        "8 steps of 32 rows; 256 rows",
        "32 rows = 1 per forward x 2 accumulation x 16 rank(s); up to 1,024 tokens a step",
        "guided: steps 0 to 1",
        "targets teacher, forward_kl with missing mass tail; alpha 0.9 -> 0.5, temperature 1",
        "all rows; all positions; reads tokens, teacher",
        "labels only",
        "all rows; positions by top_loss, share 0.5; reads tokens, slm",
        "note: --num-ranks 16 on ",
    ):
        assert line in text, text


def test_a_start_that_would_resume(stores, tmp_path: Path) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run")
    start = check_start(workers.config_of(tree), num_ranks=2)
    manifest = {"loop": {"step": 6}, "world_size": 4, "pinned": {"zero_stage": 1}}
    found = dry_run(replace(start, checkpoint=Checkpoint(tmp_path / "step_00000006", manifest)))
    assert (found.first_step, found.passes, found.resume_converts) == (6, 0.2, True)
    text = format_dry_run(found)
    assert f"resumes at step 6 from {tmp_path / 'step_00000006'}, converted for this number of ranks" in text
    assert "2 steps (6 of 8 are done) of 4 rows; 8 rows" in text
