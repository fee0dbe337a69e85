"""A compiled backbone: one graph for all batches, whatever their documents, with the losses of the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from potstill.storage import Loader
from potstill.student_train.data.batch import collate
from potstill.student_train.model.checks import check_model
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import TrainRequest, build_student
from tests.student_train import tiny, workers


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_batch_is_compiled_anew(stores) -> None:
    from torch._dynamo.utils import counters

    config = workers.config_of(tiny.config_tree(stores, Path("unused"), model={"compile": True}))
    opened = workers.open_stores(config)
    plan = workers.build_plan(config, opened)
    student_config = hf_config(config.model, vocab_size=tiny.VOCAB)
    compiled = build_student(config.model, student_config, seed=0)
    plain_model = config.model.model_copy(update={"compile": False})
    plain = build_student(plain_model, hf_config(plain_model, vocab_size=tiny.VOCAB), seed=0)
    counters.clear()
    check_model(compiled, compiled, micro_batch_rows=2, row_length=tiny.ROW_LENGTH, vocab_size=tiny.VOCAB)
    assert counters["stats"]["unique_graphs"] == 0, "the check at start costs no compilation"
    losses: list[tuple[float, float]] = []
    with Loader(plan, opened.tokens, dict(opened.joined)) as loader:
        for batch in loader:
            if batch.batch == 10:  # every row of the store has been seen, the short one too
                break
            objective = plan.objective(batch.batch)
            for micro in collate(batch, objective, micro_batch_rows=2, row_length=tiny.ROW_LENGTH):
                request = TrainRequest(micro, objective, torch.tensor(10.0), 1)
                pair = [model(request)[0] for model in (compiled, plain)]
                pair[0].backward()
                losses.append((float(pair[0].detach()), float(pair[1].detach())))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["recompiles"] and not counters["graph_break"]
    found, expected = zip(*losses, strict=True)
    assert found == pytest.approx(expected, rel=1e-5)
