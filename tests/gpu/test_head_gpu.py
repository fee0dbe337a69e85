"""The student's head on a GPU: a request for the loss is enqueued, and the host goes on.

Skips itself without a CUDA device. Run: PYTHONPATH=src python -m pytest tests/gpu -q
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.student_train.model.head import DistillationHead, SparseLossRequest
from tests.student_train import tiny
from tests.student_train.test_model import micro_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
WIDTH = 32
STAGES: dict[str, dict[str, Any]] = {
    "all": {},
    "half": {"tokens": {"policy": "random", "share": 0.5}},
    "by_entropy": {"tokens": {"policy": "top_entropy", "share": 0.3}},
    "by_divergence": {"tokens": {"policy": "soft_or", "share": 0.5}},
    "weighed": {"tokens": {"policy": "paced", "floor": 0.1}},  # without a floor their number is asked for: known_active
    "warm_teacher": {"temperature": 2.0, "alpha": 0.5, "z_loss": 1e-4},
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_request_does_not_wait_for_the_device(tmp_path: Path, stage: str) -> None:
    """One number that is copied from the host in a step's forward drains the whole queue of the device."""
    stores = tiny.write_all(tmp_path)
    micro, objective = micro_of(stores, [3, 39], **STAGES[stage])
    linear = torch.nn.Linear(WIDTH, tiny.VOCAB, bias=False)
    head = DistillationHead(linear, soft_cap=None, logit_scale=1.0).cuda()
    hidden = torch.randn(micro.labels.shape[0], WIDTH, device="cuda", requires_grad=True)
    micro, normalizer = micro.to(torch.device("cuda")), torch.tensor(7.0, device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss, sums = head(hidden, SparseLossRequest(micro, objective, normalizer))
        loss.backward()
        return loss, sums

    loss, sums = step()  # compiles the kernels, which may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, sums_again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, again) and torch.equal(sums, sums_again)
