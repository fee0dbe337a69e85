"""Training on a GPU: a step beside the CPU's, packed documents under SDPA, and ZeRO 0 to 3 through NCCL on one rank.

Skips itself without a CUDA device. Run: PYTHONPATH=src python -m pytest tests/gpu -n 8 --dist loadgroup -q
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.common.processes import free_port
from potstill.storage import Loader, StoreReader
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.data.batch import MicroBatch, collate
from potstill.student_train.data.packed import collate_rows
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import StudentModel, TrainRequest, build_student
from tests.gpu import place
from tests.gpu.place import DEVICE
from tests.student_train import tiny, workers

pytestmark = place.marks
ROOT = Path(__file__).resolve().parents[2]
SELECTED = {"policy": "label_rank", "source": "slm", "max_rank": 6}
CURRICULA: dict[str, dict[str, Any]] = {
    "plain": {"targets": "teacher"},
    "temperature": {"targets": "teacher", "temperature": 2.0},
    "chosen tokens": {"targets": "teacher", "tokens": SELECTED},
    "draws": {"targets": "sampled", "divergence": "sampled"},
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.write_all(tmp_path_factory.mktemp("stores"))


def tree_of(stores: dict[str, Path], output: Path, stage: dict[str, Any] | None = None, **changes: Any) -> Any:
    data = {"targets": {name: str(stores[name]) for name in ("teacher", "sampled")}}
    tree = tiny.config_tree(stores, output, curriculum=[stage or CURRICULA["plain"]], **changes)
    return {**tree, "data": {**tree["data"], **data}}


def student_and_batch(tree: dict[str, Any]) -> tuple[StudentModel, list[MicroBatch], StepObjective]:
    """The student of a configuration and the micro-batches of its first step, on the CPU in float32."""
    config = workers.config_of(tree)
    stores = open_stores(config)
    plan = build_plan(config, stores)
    student = build_student(config.model, hf_config(config.model, vocab_size=tiny.VOCAB), seed=config.run.seed)
    with Loader(plan, stores.tokens, dict(stores.joined)) as loader:
        batch = next(iter(loader))
    objective = plan.objective(0)
    micros = collate(batch, objective, micro_batch_rows=2, row_length=tiny.ROW_LENGTH)
    return student.train(), micros, objective


def step_on(device: torch.device, dtype: torch.dtype, tree: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, sums, gradients by name) of one optimizer step, on the CPU in float64."""
    student, micros, objective = student_and_batch(tree)
    student = student.to(device, dtype)
    weight = torch.tensor(sum(micro.weight_sum for micro in micros), device=device)
    total, sums = torch.zeros((), dtype=torch.float64), torch.zeros(len(student.sum_names), dtype=torch.float64)
    for micro in micros:
        checked = dtype != torch.float64
        request = TrainRequest(micro.to(device), objective, weight, len(micros), self_check=checked)
        loss, parts = student(request)
        loss.backward()
        total, sums = total + loss.detach().cpu().double(), sums + parts.cpu().double()
    grads = {name: p.grad.cpu().double() for name, p in student.named_parameters() if p.grad is not None}
    return total, sums, grads


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 8e-2)])
@pytest.mark.parametrize("name", list(CURRICULA))
def test_a_step_beside_the_cpu(stores, tmp_path: Path, name: str, dtype: torch.dtype, limit: float) -> None:
    """Same weights, same batch: loss, sums and the gradient of each parameter are those of float64 on the CPU."""
    tree = tree_of(stores, tmp_path / "run", CURRICULA[name])
    loss, sums, grads = step_on(torch.device("cpu"), torch.float64, tree)
    got, got_sums, got_grads = step_on(DEVICE, dtype, tree)
    assert float((got - loss).abs()) <= limit * float(loss)
    torch.testing.assert_close(got_sums, sums, rtol=limit, atol=limit * float(sums.abs().max()))
    assert got_grads.keys() == grads.keys() and len(grads) > 5
    for key, grad in grads.items():
        assert float((got_grads[key] - grad).norm()) <= limit * float(grad.norm()), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_under_sdpa(stores, tmp_path: Path, dtype: torch.dtype) -> None:
    """A document in a packed row has the hidden states that it has alone: attention stops at its borders."""
    student, _, _ = student_and_batch(tree_of(stores, tmp_path / "run", model={"attention": "sdpa"}))
    student = student.to(DEVICE, dtype).eval()
    rows = StoreReader(stores["tokens"]).tokens_rows([0, 39, 1])  # row 39 is shorter than the others
    batch = collate_rows(rows)
    with torch.no_grad():
        grid = student.hf.model(
            input_ids=batch.input_ids.to(DEVICE), position_ids=batch.position_ids.to(DEVICE), use_cache=False
        ).last_hidden_state
        joined = student.hf.model(input_ids=batch.input_ids.to(DEVICE), use_cache=False).last_hidden_state
        worst = others = 0.0
        for number, row in enumerate(rows):
            for start, length in zip(np.cumsum(row.doc_lens) - row.doc_lens, row.doc_lens, strict=True):
                ids = torch.from_numpy(row.tokens[start : start + length].astype(np.int64))[None].to(DEVICE)
                alone = student.hf.model(input_ids=ids, use_cache=False).last_hidden_state[0]
                part = slice(int(start), int(start + length))
                worst = max(worst, float((grid[number, part] - alone).norm() / alone.norm()))
                others = max(others, float((joined[number, part] - alone).norm() / alone.norm()))
    assert worst <= (1e-5 if dtype == torch.float32 else 2e-2)
    assert others > 0.1, "the test could not see attention across documents"


def start(tree: dict[str, Any], name: str, folder: Path, *, on_cpu: bool = False) -> subprocess.Popen[str]:
    """A run of zero_training.py, begun."""
    tree = {**tree, "run": {**tree["run"], "output_dir": str(folder / name)}}
    file = folder / f"{name}.json"
    file.write_text(json.dumps(tree, default=str), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), environment.get("PYTHONPATH", "")])}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if on_cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("zero_training.py")), str(file)],
        stdout=subprocess.PIPE,
        stderr=(folder / f"{name}.log").open("w"),
        text=True,
        env=environment,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """What the run printed; AssertionError with the end of its log."""
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, log.read_text()[-4000:]
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def test_zero_stages_through_nccl_train_alike(stores, tmp_path: Path) -> None:
    """Losses and gradient norms of eight steps: the stages' agree, and are those of a run on the CPU."""
    steps, changes = 8, {"optimizer": {"lr": 1e-3}, "logging": {"every_steps": 1}}
    tree = tree_of(stores, tmp_path / "run", CURRICULA["chosen tokens"], model={"dtype": "float32"}, **changes)
    stages = place.size((0, 1, 2, 3), (0, 3))
    runs = {f"stage {n}": start({**tree, "zero_stage": n}, f"stage {n}", tmp_path) for n in stages}
    runs["cpu"] = start({**tree, "zero_stage": 0}, "cpu", tmp_path, on_cpu=True)
    try:
        found = {name: finish(process, tmp_path / f"{name}.log") for name, process in runs.items()}
    finally:
        for process in runs.values():
            if process.poll() is None:
                process.kill()
                process.wait(timeout=10)
    want = found.pop("cpu")
    assert len(want["losses"]) == len(want["norms"]) == steps and want["losses"][-1] < want["losses"][0]
    for name, seen in found.items():
        assert seen["group"] == place.size("nccl", "gloo") and seen["steps"] == steps, name
        assert seen["losses"] == pytest.approx(want["losses"], rel=1e-4), name
        assert seen["norms"] == pytest.approx(want["norms"], rel=1e-3), name
