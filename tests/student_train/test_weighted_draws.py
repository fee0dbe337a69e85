"""A student on draws from a power of the teacher: the store's weights reach the loss as they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.storage import Loader, SparseTargets, StoreReader, TargetsRow, TokensRow, token_digest
from potstill.student_train.data.batch import collate
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import TrainRequest, build_student
from potstill.student_train.run.metrics import read_metrics
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers


def weighted_row(row: TokensRow, *, num_entries: int = 4) -> TargetsRow:
    """Made-up weights on the grid whose sums are above and below 1."""
    rng, mask = np.random.default_rng(row.row), tiny.label_mask(row)
    codes = np.sort(rng.integers(100, 180, (int(mask.sum()), num_entries)), 1)
    ids = np.sort(rng.permuted(np.tile(np.arange(tiny.VOCAB), (len(codes), 1)), axis=1)[:, :num_entries], 1)
    targets = SparseTargets.build(
        offsets=np.append(0, np.cumsum(num_entries * mask)),
        ids=ids.flatten().astype(np.int32),
        log_weights=(7 - codes.flatten() / 16).astype(np.float32),
        num_draws=20,
        log_tail=np.where(mask, -2, 0).astype(np.float32),
        vocab_size=tiny.VOCAB,
        strict=True,
    )
    return TargetsRow(row.row, token_digest(row.tokens, row.doc_lens), targets)


@pytest.fixture(scope="module")
def tree(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run on weighted draws alone, with targets of the same kind for the held-out rows."""
    folder, paths = tmp_path_factory.mktemp("weighted"), {}
    for name in ("tokens", "heldout"):
        tokens = StoreReader(stores[name])
        spec = tiny.spec_of(
            "targets",
            num_rows=tokens.num_rows,
            input_digest=tokens.digest,
            selection={"mode": "sample", "num_draws": 20, "power": 0.8},
            teacher={"id": "made up", "weights_digest": "0" * 64, "dtype": "float32", "engine": "table"},
        )
        paths[name] = folder / name
        tiny.write_store(paths[name], spec, [weighted_row(row) for row in tokens.rows(range(tokens.num_rows))])
    data = {"targets": {"teacher": str(paths["tokens"])}, "heldout_targets": str(paths["heldout"]), "scores": {}}
    objective = {"alpha": 1.0, "divergence": "sampled", "missing_mass": "raw"}
    return tiny.config_tree(stores, folder / "run", data=data, objective=objective)


@pytest.mark.parametrize("missing_mass", ["raw", "tail", "renorm"])
def test_the_loss_is_the_sum_over_the_weights(tree: dict[str, Any], missing_mass: str) -> None:
    config = workers.config_of({**tree, "objective": {**tree["objective"], "missing_mass": missing_mass}})
    stores = open_stores(config)
    plan = build_plan(config, stores)
    student = build_student(config.model, hf_config(config.model, vocab_size=tiny.VOCAB), seed=0).double()
    with Loader(plan, stores.tokens, dict(stores.joined)) as loader:
        batch = next(iter(loader))
    (micro,) = collate(batch, plan.objective(0), micro_batch_rows=4, row_length=tiny.ROW_LENGTH)
    loss, _ = student(TrainRequest(micro, plan.objective(0), torch.ones((), dtype=torch.float64), 1))
    logits = student.hf(input_ids=micro.input_ids, position_ids=micro.position_ids).logits.detach()
    log_q = logits.log_softmax(-1).flatten(0, 1)
    assert micro.token_index is None  # rows of full length: the places of the grid are the tokens
    expected, start = 0.0, 0
    for row in batch.joined["teacher"]:
        for n in range(row.targets.num_tokens):
            here = slice(*row.targets.offsets[n : n + 2])
            if here.start == here.stop:
                continue
            weights = np.exp(row.targets.log_weights[here].astype(np.float64))
            weights = weights / weights.sum() if missing_mass == "renorm" else weights
            expected -= float((torch.from_numpy(weights) * log_q[start + n, row.targets.ids[here].tolist()]).sum())
        start += row.targets.num_tokens
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)


def test_a_run_on_weights_trains_and_measures(tree: dict[str, Any]) -> None:
    assert run_ranks(workers.train_run, tree, world=1)[0]["status"] == "done"
    records = read_metrics(Path(tree["run"]["output_dir"]))
    train = [record for record in records if record["kind"] == "train"]
    assert train and all(math.isfinite(record["kd"]) and record["ce"] is not None for record in train)
    # The sum of a token's weights is what was kept of the teacher; it is 1 in the mean over draws only.
    assert all(record["kept_mass"] > 0 for record in train) and any(record["kept_mass"] > 1 for record in train)
    heldout = [record for record in records if "teacher_kl" in record]
    assert heldout and all(record["teacher_kl"] is None and record["agreement"] is not None for record in heldout)


def test_weights_need_the_loss_of_draws(tree: dict[str, Any]) -> None:
    from potstill.common.errors import UserError
    from potstill.student_train.data.stores import check_objectives

    config = workers.config_of({**tree, "objective": {"alpha": 1.0}})
    with pytest.raises(
        UserError,
        match=r"curriculum\.0\.divergence, store 'teacher' of selection sample: divergence 'forward_kl' needs",
    ):
        check_objectives(config, open_stores(config))
