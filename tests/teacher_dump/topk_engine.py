"""An engine that finishes its top-k by itself: whole logits of a transformers model, and plain torch.

Its entry stands in no table; tests add it. Tests spoil its results by `SPOIL`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from potstill.kernels.topk import TopK
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import FinishedTopK, TopKWanted
from potstill.teacher_dump.engines.table import EngineEntry

ENTRY = EngineEntry(
    module=__name__, description="whole logits and plain torch", gives_top_k=True, refuses={"compile": (True,)}
)
SPOIL: list[Callable[[TopK], TopK]] = []


class TopKEngine:
    """See TeacherEngine."""

    name = "torch_topk"
    dtype = "float32"
    device = torch.device("cpu")

    def __init__(self, model: Any, wanted: TopKWanted) -> None:
        self.model, self.wanted = model, wanted
        self.vocab_size = model.config.vocab_size

    @torch.no_grad()
    def forward(self, batch: TeacherBatch) -> FinishedTopK:
        ids, places = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
        logits = self.model(input_ids=ids, position_ids=places, use_cache=False).logits
        picked = logits.reshape(-1, logits.shape[-1])[torch.from_numpy(batch.positions)]  # [M, V]
        topk = plain_topk(picked.double(), torch.from_numpy(batch.labels), self.wanted)
        for spoil in SPOIL:
            topk = spoil(topk)
        return FinishedTopK(topk)

    def idle_pass(self) -> None:
        raise AssertionError("one process has no idle pass")


def plain_topk(logits: torch.Tensor, labels: torch.Tensor, wanted: TopKWanted) -> TopK:
    """The k best of logits float64 [M, V] with all figures, each as its definition says."""
    inside = logits[:, : wanted.vocab_size]
    log_p = inside.log_softmax(1)
    order = torch.sort(inside, dim=1, descending=True, stable=True).indices
    best = order[:, : wanted.k]
    label = labels[:, None]

    def tail(temperature: float) -> torch.Tensor:
        rest = (inside / temperature).log_softmax(1).scatter(1, best, -torch.inf)
        return rest.logsumexp(1).float()

    return TopK(
        ids=best.int(),
        logprobs=log_p.gather(1, best).float(),
        lse=inside.logsumexp(1).float(),
        lse_at={t: (inside / t).logsumexp(1).float() for t in wanted.temperatures},
        entropy=-(log_p.exp() * log_p).sum(1).float(),
        label_logprob=log_p.gather(1, label)[:, 0].float(),
        label_rank=(order == label).int().argmax(1).int(),
        excluded_mass=logits.softmax(1)[:, wanted.vocab_size :].sum(1).float(),
        log_tail=tail(1.0),
        log_tail_at={t: tail(t) for t in wanted.temperatures},
    )


def load(teacher: TeacherConfig, wanted: TopKWanted | None) -> TopKEngine:
    """The engine of the model in the folder `teacher.model`."""
    from transformers import AutoModelForCausalLM

    assert wanted is not None
    return TopKEngine(AutoModelForCausalLM.from_pretrained(teacher.model).eval(), wanted)
