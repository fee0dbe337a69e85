"""Find a transformers model's backbone and output layer, and make sure that head(backbone(x)) is the model."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.common.causal_lm import backbone, soft_cap_and_scale
from potstill.common.errors import UserError
from potstill.common.packed import as_lines, probe_ids
from potstill.kernels.soft_cap import scale_and_cap_
from potstill.teacher_dump.engines.base import Head

log = logging.getLogger(__name__)

_PROBE_TOKENS, _EXPERT_LINES = 12, 4
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def read_head(model: Any) -> Head | None:
    """The model's output layer with the cap and scale of its configuration; None when it has no plain linear one.

    Rows beyond the configuration's vocabulary are left out: padding, or heads of multi-token prediction, which stand
    behind the one that predicts the next token.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, torch.nn.Linear) or not layer.weight.is_floating_point():
        return None
    text = model.config.get_text_config()
    cap, scale = soft_cap_and_scale(text)
    rows = layer.weight.shape[0]
    if rows > text.vocab_size:
        log.warning(
            "teacher %s has %d output rows, its vocab_size is %d: targets are of the first %d, the others (padding, or "
            "heads for tokens after the next) are left out",
            type(model).__name__,
            rows,
            text.vocab_size,
            text.vocab_size,
        )
    bias = None if layer.bias is None else _whole(layer.bias.detach())[: text.vocab_size]
    weight = _whole(layer.weight.detach())[: text.vocab_size]
    return Head(weight=weight, bias=bias, soft_cap=cap, logit_scale=scale)


def _whole(value: Any) -> Any:
    """A tensor as it is, one that is spread over ranks gathered from all of them (a collective call then)."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def apply_head(hidden: Tensor, head: Head) -> Tensor:
    """Logits [..., V] in the hidden's dtype, as the models themselves compute them."""
    raw = F.linear(hidden, head.weight, head.bias)
    return scale_and_cap_(raw, logit_scale=head.logit_scale, soft_cap=head.soft_cap)


def probe_line(vocab_size: int, device: torch.device, number: int = 0) -> Tensor:
    """A short line of ids [1, L], spread over the vocabulary; the same for every call with this number."""
    return probe_ids(torch.arange(_PROBE_TOKENS, device=device)[None] + number * _PROBE_TOKENS, vocab_size)


@torch.no_grad()
def head_agrees(model: Any, head: Head, vocab_size: int) -> float:
    """Largest difference between head(backbone(x)) and the model's logits, over the largest logit; nan if unusable."""
    ids = probe_line(vocab_size, next(model.parameters()).device)
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden = backbone(model)(input_ids=ids, position_ids=places, use_cache=False)[0]
    if hidden.shape[-1] != head.weight.shape[1]:
        return float("nan")
    expected = model(input_ids=ids, position_ids=places, use_cache=False).logits.float()
    return relative_difference(apply_head(hidden, head).float(), expected[..., : head.weight.shape[0]])


def packing_agrees(model: Any, vocab_size: int) -> float:
    """Largest difference between the logits of documents two in a line and apart, over the largest logit.

    Of a mixture of experts the least one over several lines of ids. In a low precision the same token in another batch
    may be routed to another expert, where two are nearly even, and its logits are far off then; that is a chance which
    few lines have, while documents that see one another do so in every line.
    """
    lines = _EXPERT_LINES if any(name.endswith("experts") for name, _ in model.named_modules()) else 1
    # All of them, since each is a collective pass of an engine that is a group.
    return min(_packing_agrees(model, vocab_size, number) for number in range(lines))


@torch.no_grad()
def _packing_agrees(model: Any, vocab_size: int, number: int) -> float:
    """See packing_agrees; of one line of ids.

    Documents must be told apart by position ids that begin again; a model that ignores them (no mask from positions,
    or a state that runs on) shows here, before a single wrong target is stored. Two lines with different cuts, as in a
    dump: some attention keeps documents apart in a batch of one line only.
    """
    ids = probe_line(vocab_size, next(model.parameters()).device, number)
    cut = _PROBE_TOKENS // 2 - 1
    parts = [ids[:, :cut], ids[:, cut:]]
    places = [torch.arange(part.shape[1], device=ids.device)[None] for part in parts]
    lines = [torch.cat([torch.cat(pair, 1), torch.cat(pair[::-1], 1)]) for pair in (parts, places)]
    input_ids, position_ids = as_lines(getattr(model, "module", model).config, lines[0], lines[1])
    packed = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()
    apart = [
        model(input_ids=part, position_ids=place, use_cache=False).logits.float()
        for part, place in zip(parts, places, strict=True)
    ]
    expected = torch.cat([*apart, *apart[::-1]], 1)  # line after line
    return relative_difference(packed.reshape(1, *expected.shape[1:]), expected)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest finite value of `expected`."""
    if found.shape != expected.shape:
        return float("nan")
    finite = expected.isfinite()
    if not finite.any():
        return 0.0  # a broken teacher is found row by row later, where its rows can be named
    return float((found - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-9))


def tolerance(dtype: torch.dtype) -> float:
    """How far two orders of the same computation may lie apart in this dtype."""
    return _TOLERANCE.get(dtype, 3e-2)


def choose_head(model: Any, *, wanted: str, vocab_size: int, dtype: torch.dtype) -> Head | None:
    """The head to apply in chunks, or None for the model's own logits; see TeacherConfig.head."""
    if wanted == "logits":
        return None
    head = read_head(model)
    difference = float("nan") if head is None else head_agrees(model, head, vocab_size)
    if head is not None and difference <= tolerance(dtype):
        return head
    text = (
        "has no plain linear output layer"
        if head is None
        else f"gives logits that are not head(hidden) (relative difference {difference:.2g})"
    )
    if wanted == "hidden":
        raise UserError(f"teacher {type(model).__name__} {text}; set head=logits")
    log.warning("teacher %s %s: the model's own logits are used, which needs more memory", type(model).__name__, text)
    return None
