"""Before the first step: the model keeps packed documents apart, and its logits are those that the loss works on.

Both faults train without an error. A model that ignores positions which begin again, or carries a state along the row,
learns from text of other documents; a model that scales its logits in its own way is not the one that the loss saw.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.common.packed import probe_ids
from potstill.kernels.types import IGNORE_LABEL
from potstill.student_train.data.batch import MicroBatch, position_ids
from potstill.student_train.model.probe import BothLogitsRequest, HiddenStatesRequest
from potstill.student_train.model.requests import RunsRequests

log = logging.getLogger(__name__)

DOCUMENT = 4  # tokens: what a state or an attention brings in from before shows most in short documents
LOOKED_AT = 64  # tokens at the start of a row that short documents fill; one long document fills the rest
HEAD_TOKENS = 12
# Equal inputs in equal shapes give equal bits, except where experts are given other numbers of tokens. Short
# convolutions leak little: 1e-3 to 1e-2 in fresh models of lfm2, jamba, falcon_h1.
LEAK_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
LOGITS_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def probe_documents(row_length: int) -> np.ndarray:
    """Lengths of the documents of a probe row: short ones first, then the rest of the row."""
    short = min(LOOKED_AT, row_length) // DOCUMENT
    rest = row_length - short * DOCUMENT
    return np.array([DOCUMENT] * short + ([rest] if rest else []), np.int64)


def probe_batch(input_ids: Tensor, doc_lens: np.ndarray) -> MicroBatch:
    """A micro-batch of full rows [B, L] whose positions count in no loss."""
    num_rows, length = input_ids.shape
    places = torch.from_numpy(position_ids(doc_lens, length)).to(input_ids.device).expand(num_rows, -1).contiguous()
    num_tokens, device = num_rows * length, input_ids.device
    return MicroBatch(
        input_ids=input_ids,
        position_ids=places,
        labels=torch.full((num_tokens,), IGNORE_LABEL, device=device),
        targets=None,
        token_weights=torch.zeros(num_tokens, device=device),
        kd_weights=None,
        token_index=None,
        row=torch.arange(num_rows, device=device).repeat_interleave(length),
        columns={},
        extras={},
        weight_sum=0.0,
        num_active=0,
    )


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Evaluation mode (no dropout) while open."""
    was_training = bool(model.training)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def document_leak(model: RunsRequests, head: Any, *, num_rows: int, row_length: int, vocab_size: int) -> float:
    """How much the hidden states of a document change when other documents change; 0 is what it must be.

    Rows of short documents go through the model twice, with other tokens in every second document of the first row.
    Returns the median over the positions of the documents that stayed the same (of that row, and of the second row)
    of |change| / |hidden state|. The median, because in a mixture of experts a rounding can send single tokens to
    other experts. `model` is a StudentModel or the engine around one (a collective call), `head` its lm_head.
    """
    doc_lens = probe_documents(row_length)
    places = torch.arange(num_rows * row_length, device=head.weight.device).view(num_rows, row_length)
    ids = probe_ids(places, vocab_size)
    document = torch.repeat_interleave(torch.arange(len(doc_lens)), torch.from_numpy(doc_lens)).to(ids.device)  # [L]
    other = ids.clone()
    other[0] = torch.where(document % 2 == 0, (ids[0] + 1 + vocab_size // 2) % vocab_size, ids[0])
    seen = [model(HiddenStatesRequest(probe_batch(tokens, doc_lens))) for tokens in (ids, other)]
    first, second = (hidden.float().view(num_rows, row_length, -1) for hidden in seen)
    change = (second - first).norm(dim=-1) / first.norm(dim=-1).clamp(min=1e-12)  # [B, L]
    mine = change[0, :LOOKED_AT][document[:LOOKED_AT] % 2 == 1]
    found = [mine.median()] if len(mine) else []
    found += [change[1, :LOOKED_AT].median()] if num_rows > 1 else []
    return float(torch.stack(found).max()) if found else 0.0


@torch.no_grad()
def logits_difference(model: RunsRequests, head: Any, *, row_length: int, vocab_size: int) -> float:
    """Largest difference between the loss's logits and the model's own, over the largest logit (a collective call)."""
    length = min(HEAD_TOKENS, row_length)
    ids = probe_ids(torch.arange(length, device=head.weight.device)[None], vocab_size)
    micro = probe_batch(ids, np.array([length], np.int64))
    ours, theirs = model(BothLogitsRequest(micro))
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp(min=1e-9))


def check_model(model: Any, student: Any, *, micro_batch_rows: int, row_length: int, vocab_size: int) -> None:
    """Raise UserError (on all ranks alike) when the model mixes documents or has other logits than the loss."""
    kind, head = student.hf.config.model_type, student.hf.lm_head
    leak_limit, logits_limit = LEAK_LIMIT[head.weight.dtype], LOGITS_LIMIT[head.weight.dtype]
    # A compiled backbone would be compiled once more for these forwards; a test compares it with the plain one.
    with measuring(model), torch.compiler.set_stance("force_eager"):
        sizes = {"row_length": row_length, "vocab_size": vocab_size}
        leak = document_leak(model, head, num_rows=min(2, micro_batch_rows), **sizes)
        difference = logits_difference(model, head, **sizes)
    log.info("model check: documents change each other by %.2g, logits differ by %.2g", leak, difference)
    attention = student.hf.config.get_text_config()._attn_implementation
    # Weights that are not finite are found by the first step, which can name its rows.
    if leak > leak_limit:
        raise UserError(
            f"model.config: a {kind} with attention {attention} does not keep the documents of a packed row apart: "
            f"hidden states of one document change by {leak:.2g} of their size when another document's tokens change, "
            f"expected at most {leak_limit:g}. It would learn from text that it must not see: take an architecture "
            "whose attention knows positions that begin again (llama, qwen3, gemma2, mixtral, ...), or another "
            "model.attention"
        )
    if difference > logits_limit:
        raise UserError(
            f"model.config: the logits of a {kind} are not those that the loss works on: they differ by "
            f"{difference:.2g} of the largest, expected at most {logits_limit:g}. The architecture changes its hidden "
            "states or logits in a way that is not known here (common/causal_lm.py); take another one"
        )
