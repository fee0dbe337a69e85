"""The examples do what they show: resume without a trace, a loss normalized over the global batch, a readable table."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples import hf_trainer, plain_torch_loop, read_store
from potstill.storage import EpochPlan, MismatchError, StoreReader
from tests.conftest import REPOSITORY
from tests.examples import reference
from tests.examples.conftest import ROW_LENGTH, Folder

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
DOORS = {"potstill.storage", "potstill.kernels.loss", "potstill.student_train", "potstill.teacher_dump"}


def loop(stores: Folder, output: Path, *more: str) -> list[float]:
    common = ["--tokens", str(stores.tokens), "--targets", str(stores.targets), "--model", str(stores.student)]
    common += ["--output", str(output), "--batch", "5", "--micro-batch", "2", "--lr", "3e-3"]
    return plain_torch_loop.train(plain_torch_loop.parse([*common, *more]))


def trainer(stores: Folder, output: Path, *more: str) -> Any:
    common = ["--tokens", str(stores.tokens), "--targets", str(stores.targets), "--model", str(stores.student)]
    return hf_trainer.train(hf_trainer.parse([*common, "--output", str(output), *more]))


@pytest.fixture
def readers(stores: Folder) -> tuple[StoreReader, StoreReader]:
    return StoreReader(stores.tokens), StoreReader(stores.targets)


def test_the_stores_are_worth_testing_on(readers: tuple[StoreReader, StoreReader]) -> None:
    tokens, _ = readers
    rows = tokens.tokens_rows(range(tokens.num_rows))
    assert max(len(row.doc_lens) for row in rows) >= 3
    assert len({len(row.tokens) - len(row.doc_lens) for row in rows}) > 2  # rows differ in their count of labels
    assert len(rows[-1].tokens) < ROW_LENGTH


def test_an_interrupted_loop_goes_on_to_the_same_losses(stores: Folder, tmp_path: Path) -> None:
    whole = loop(stores, tmp_path / "whole", "--steps", "9")
    first = loop(stores, tmp_path / "parts", "--steps", "4", "--save-every", "100")
    rest = loop(stores, tmp_path / "parts", "--steps", "9")
    assert len(whole) == 9 and len(rest) == 5
    assert first + rest == whole  # bit for bit
    assert whole[-1] < whole[0]
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["loader"] == b["loader"] and a["loader"]["batches"] == 9


def test_a_checkpoint_of_another_order_is_refused(stores: Folder, tmp_path: Path) -> None:
    loop(stores, tmp_path / "run", "--steps", "1")
    with pytest.raises(MismatchError, match=r"plan differs .*seed: saved 0, now 1"):
        loop(stores, tmp_path / "run", "--steps", "2", "--seed", "1")


def test_the_loop_s_gradients_are_those_of_the_dense_loss(
    stores: Folder, readers: tuple[StoreReader, StoreReader]
) -> None:
    """Documents one at a time in float64 sums against packed rows, micro-batches and the fused loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens, targets = readers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(stores.student)).double()
    plan = EpochPlan(tokens.num_rows, global_batch=5, seed=0)
    rows = next(plan.rows(b).tolist() for b in range(20) if tokens.num_rows - 1 in plan.rows(b))  # with the short row
    total, count = reference.loss(model, tokens, targets, rows, alpha=0.9)
    (total / count).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with plain_torch_loop.make_loader(stores.tokens, stores.targets, global_batch=5, seed=0) as loader:
        batch = next(b for b in loader if sorted(b.rows.tolist()) == sorted(rows))

    class Keep(torch.optim.SGD):
        """An optimizer that leaves the gradients to look at."""

        def zero_grad(self, set_to_none: bool = True) -> None: ...

    found = plain_torch_loop.train_step(model, Keep(model.parameters(), lr=0.0), batch, micro_rows=2, alpha=0.9)
    assert found == pytest.approx(float(total.detach()) / count, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-9)


def test_the_trainer_s_gradients_are_those_of_the_global_batch(
    stores: Folder, readers: tuple[StoreReader, StoreReader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback

    tokens, targets = readers
    seen: list[list[int]] = []
    grads: list[dict[str, torch.Tensor]] = []
    weights: list[dict[str, torch.Tensor]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **other: Any) -> None:
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
            grads.append({name: p.grad.clone() for name, p in model.named_parameters()})

    def watched(samples: Any) -> dict[str, Any]:
        seen.append([sample.tokens.row for sample in samples])
        return collate(samples)

    collate = hf_trainer.collate
    monkeypatch.setattr(hf_trainer, "collate", watched)
    build = hf_trainer.DistillationTrainer.__init__

    def with_watch(self: Any, **options: Any) -> None:
        options["args"].max_grad_norm = 0.0
        build(self, **options, callbacks=[Watch()])

    monkeypatch.setattr(hf_trainer.DistillationTrainer, "__init__", with_watch)
    done = trainer(stores, tmp_path / "run", "--steps", "2", "--micro-batch", "2", "--accumulation", "3")
    assert [len(rows) for rows in seen[:6]] == [2] * 6
    model = done.model.double()
    for step in range(2):
        micro = seen[3 * step : 3 * step + 3]
        model.load_state_dict(weights[step], strict=False)
        model.zero_grad()
        parts = [reference.loss(model, tokens, targets, rows, alpha=0.9) for rows in micro]
        count = sum(number for _, number in parts)
        # Micro-batches of equal counts could not tell the right division from a mean of means.
        assert len({number for _, number in parts}) > 1
        (sum(total for total, _ in parts) / count).backward()  # type: ignore[union-attr]
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[step][name].double(), parameter.grad, rtol=2e-4, atol=2e-7)
    logged = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
    assert all(np.isfinite(logged))


def test_the_trainer_learns_and_leaves_a_folder(stores: Folder, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = trainer(stores, tmp_path / "run", "--steps", "8", "--micro-batch", "2", "--lr", "5e-3", "--log-every", "1")
    losses = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == 300
    evaluated = done.evaluate(done.train_dataset)
    assert np.isfinite(evaluated["eval_loss"])


def test_documents_of_a_row_do_not_see_each_other(stores: Folder, readers: tuple[StoreReader, StoreReader]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from potstill.student_train import collate_rows

    tokens, _ = readers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(stores.student)).train()
    rows = [row for row in tokens.tokens_rows(range(tokens.num_rows - 1)) if len(row.doc_lens) >= 3][:2]
    batch = collate_rows(rows)
    logits = model(**batch.model_inputs(model.config)).logits
    first = int(rows[0].doc_lens[0])
    batch.input_ids[0, :first] = (batch.input_ids[0, :first] + 1) % 300
    changed = model(**batch.model_inputs(model.config)).logits
    assert not torch.equal(logits[0, :first], changed[0, :first])
    assert torch.equal(logits[0, first:], changed[0, first:])
    assert torch.equal(logits[1], changed[1])


def test_the_table_says_what_the_store_holds(stores: Folder, readers: tuple[StoreReader, StoreReader]) -> None:
    tokens, targets = readers
    arguments = ["--tokens", stores.tokens, "--targets", stores.targets, "--tokenizer", stores.tokenizer, "--row", "1"]
    shown = read_store.show(read_store.parse([*map(str, arguments), "--positions", "99", "--candidates", "3"]))
    lines = shown.splitlines()
    row, teacher = tokens.tokens_rows([1])[0], targets.targets_rows([1])[0].targets
    assert lines[0].split() == list(read_store.HEADER) and len(lines) == len(row.tokens) + 1
    ends = (np.cumsum(row.doc_lens) - 1).tolist()
    assert [n for n, line in enumerate(lines[1:]) if "(end of document)" in line] == ends
    n = next(n for n in range(len(row.tokens)) if n not in ends)
    assert teacher.label_logprob is not None and teacher.label_rank is not None
    kept = teacher.candidates(n)
    cells = [f"{np.exp(teacher.label_logprob[n]):.3f}", str(teacher.label_rank[n]), f"{kept.tail:.3f}"]
    assert " ".join(cells) in " ".join(lines[n + 1].split())
    assert f" {kept.probs[0]:.3f} " in lines[n + 1] and lines[n + 1].endswith(f" +{len(kept.ids) - 3}")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_explained_and_uses_the_front_doors_only(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    command = re.search(rf"^    python examples/{path.name} (--.*)$", text, flags=re.MULTILINE)
    assert command is not None, "the docstring holds the one command to run"
    importlib.import_module(f"examples.{path.stem}").parse(command[1].split())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("potstill"):
            assert node.module in DOORS
            public = importlib.import_module(node.module).__all__
            assert {alias.name for alias in node.names} <= set(public)
        elif isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("potstill")]
    done = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--tokens" in done.stdout


def test_reading_a_store_needs_no_torch() -> None:
    code = "import sys; from examples import read_store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0
