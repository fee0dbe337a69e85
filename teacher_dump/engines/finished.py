"""Checks of a top-k that an engine finished by itself: what is wrong there would be stored as if it were right.

Legend: M target positions of a batch, k entries per position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.kernels.topk import TopK
from potstill.teacher_dump.engines.base import TopKWanted

_MASS_TOLERANCE = 1e-3  # kept and tail mass add up to 1; float32 sums over a vocabulary are good to 1e-5
_LABEL_TOLERANCE = 1e-3  # nats
_FIGURES = ("lse", "entropy", "label_logprob", "excluded_mass", "log_tail")


def check_top_k(topk: TopK, labels: Tensor, wanted: TopKWanted, *, engine: str) -> TopK:
    """The same top-k if it can be right; `labels` int64 [M] are the next tokens. Raises UserError naming the position.

    Positions whose lse or entropy is not finite are left alone: their rows are refused one by one later.
    """
    _check_shapes(topk, len(labels), wanted, engine)
    sound = topk.lse.isfinite() & topk.entropy.isfinite()  # [M]
    ids, logprobs = topk.ids[sound], topk.logprobs[sound]  # [S, k]
    places = sound.nonzero().flatten()  # [S]
    ordered_ids = ids.sort(dim=1).values
    mass = logprobs.double().exp().sum(1) + topk.log_tail[sound].double().exp()  # [S]
    own = ids == labels[sound, None]  # [S, k], at most one of a position
    of_label = torch.where(own, logprobs, 0.0).sum(1)  # [S]
    apart = own.any(1) & ~((of_label - topk.label_logprob[sound]).abs() <= _LABEL_TOLERANCE)
    limit = wanted.vocab_size - 1
    for wrong, text in (
        (((ids < 0) | (ids > limit)).any(1), f"holds an id that is not one of 0 .. {limit}"),
        ((ordered_ids[:, 1:] == ordered_ids[:, :-1]).any(1), "names an id twice"),
        (~(logprobs <= 0).all(1), "holds a log-probability above 0 or NaN"),
        (~(logprobs[:, 1:] <= logprobs[:, :-1]).all(1), "is not in descending order of log-probability"),
        (~((mass - 1).abs() <= _MASS_TOLERANCE), "has kept and tail mass that do not add up to 1"),
        (apart, "gives the label another log-probability than its entry; is each position that of its label?"),
    ):
        if bool(wrong.any()):
            here = int(wrong.nonzero()[0])
            raise UserError(
                f"engine {engine}: position {int(places[here])} of a batch {text} (ids {ids[here, :4].tolist()}, "
                f"log-probabilities {logprobs[here, :4].tolist()}, log tail {float(topk.log_tail[places[here]])}; "
                f"{int(wrong.sum())} of {len(labels)} positions); this engine must not be used: use engine hf"
            )
    return topk


def _check_shapes(topk: TopK, num_positions: int, wanted: TopKWanted, engine: str) -> None:
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "ids": ((num_positions, wanted.k), torch.int32),
        "logprobs": ((num_positions, wanted.k), torch.float32),
        "label_rank": ((num_positions,), torch.int32),
        **dict.fromkeys(_FIGURES, ((num_positions,), torch.float32)),
    }
    parts = {name: getattr(topk, name) for name in expected}
    for name, found in (("lse_at", topk.lse_at), ("log_tail_at", topk.log_tail_at)):
        if set(found) != set(wanted.temperatures):
            raise UserError(
                f"engine {engine}: {name} is for the temperatures {sorted(found)}, expected "
                f"{sorted(wanted.temperatures)}; leave temperatures out, or use engine hf"
            )
        parts |= {f"{name}[{t}]": value for t, value in found.items()}
        expected |= {f"{name}[{t}]": ((num_positions,), torch.float32) for t in found}
    for name, (shape, dtype) in expected.items():
        part = parts[name]
        if tuple(part.shape) != shape or part.dtype != dtype:
            raise UserError(
                f"engine {engine}: {name} of a finished top-k is {part.dtype} {list(part.shape)}, expected {dtype} "
                f"{list(shape)}; this engine must not be used: use engine hf"
            )
