"""What the teacher itself says of the probe prompts, by a way that has nothing in common with the pooled states.

Small teachers are run by transformers, in their dtype and in float32: what these two differ by is what the dtype costs,
and vLLM may be as far again. Others are run by a second vLLM in a process of its own, which is gone before the first
one loads: its `prompt_logprobs` come from vLLM's own head and sampler.

Legend: P tokens of a prompt, n of its positions that are compared, R best ids of each, V output rows.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.common.processes import start
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.hf import load_weights
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import Devices, only_gpus
from potstill.teacher_dump.identity import PLACE_KEYS, weights_folder

log = logging.getLogger(__name__)

SMALL_BYTES = 2 << 30  # of weights on disk; twice that in float32, beside nothing else
_BEST = 64
# Mean total variation below which no figure of a store shows it, by the bits of the dtype: see engine_mix.LEAST_BOUND.
_LEAST = {"float32": 2e-4}
_LEAST_BITS_LOST = 2e-3
_OF_NOISE = 2.0  # times what the reference differs from itself
_CHILD = "potstill.teacher_dump.engines.vllm_engine.reference_child"


@dataclass(frozen=True)
class Reference:
    """The best ids [n, R] of the first n positions of each prompt, and their log-probabilities float32 [n, R].

    noise: mean total variation between two runs of the reference itself, of which `noise_text` says which.
    """

    source: str
    prompts: Sequence[list[int]]
    ids: Sequence[Tensor]
    logprobs: Sequence[Tensor]
    noise: float
    noise_text: str
    dtype: str

    @property
    def bound(self) -> float:
        """Mean total variation that is allowed."""
        return max(self._least, _OF_NOISE * self.noise)

    @property
    def bound_text(self) -> str:
        """How it comes about."""
        return f"the larger of {self._least} and twice the {self.noise:.2g} that {self.noise_text}"

    @property
    def _least(self) -> float:
        return _LEAST.get(self.dtype, _LEAST_BITS_LOST)

    def distance(self, log_p: Sequence[Tensor]) -> float:
        """Mean total variation to log-probabilities [P, V] of the same prompts; all other ids count as one."""
        found = [
            best_distance(mine[: len(ids)], ids.to(mine.device), logprobs.to(mine.device))
            for mine, ids, logprobs in zip(log_p, self.ids, self.logprobs, strict=True)
        ]
        return float(torch.cat(found).mean())


def best_distance(log_p: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Total variation [n] between log_p [n, V] and a distribution of which the best ids [n, R] are known."""
    p, q = log_p.gather(-1, ids).double().exp(), logprobs.double().exp()
    rest = ((1 - p.sum(-1)) - (1 - q.sum(-1))).abs()
    return ((p - q).abs().sum(-1) + rest) / 2


def take_reference(
    teacher: TeacherConfig,
    prompts: Sequence[list[int]],
    *,
    dtype: str,
    devices: Devices,
    quantised: bool,
    row_length: int | None,
) -> Reference:
    """See above. Raises UserError where neither way works."""
    num_bytes = sum(file.stat().st_size for file in weights_folder(teacher).glob("*.safetensors"))
    why = "its weights are quantised, which transformers computes otherwise" if quantised else ""
    if num_bytes > SMALL_BYTES:
        why = f"its weights have {num_bytes / 2**30:.1f} GiB"
    if not why:
        try:
            return by_transformers(teacher, prompts, dtype=dtype, device=devices.device)
        except UserError as error:
            why = f"transformers cannot run it ({error})"
    log.info("engine vllm: the teacher is compared with prompt_logprobs of a second vLLM first, because %s", why)
    return by_prompt_logprobs(teacher, prompts, dtype=dtype, devices=devices, row_length=row_length)


@torch.no_grad()
def by_transformers(
    teacher: TeacherConfig, prompts: Sequence[list[int]], *, dtype: str, device: torch.device
) -> Reference:
    """The model's own logits in float32, and in `dtype` for what the rounding costs."""
    places = {key: value for key, value in teacher.load_options.items() if key in PLACE_KEYS}
    plain = teacher.model_copy(update={"load_options": places, "attention": None})
    model = load_weights(plain, places | {"dtype": dtype}).to(device)
    rounded = _log_probabilities(model, prompts, device) if dtype != "float32" else None
    exact = _log_probabilities(model.float(), prompts, device)
    best = [one.topk(min(_BEST, one.shape[-1])) for one in exact]
    ids, logprobs = [one.indices.cpu() for one in best], [one.values.cpu() for one in best]
    reference = Reference("transformers", prompts, ids, logprobs, 0.0, f"transformers loses by {dtype}", dtype)
    noise = 0.0 if rounded is None else reference.distance(rounded)
    del model, exact, rounded
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Reference("transformers in float32", prompts, ids, logprobs, noise, f"transformers loses by {dtype}", dtype)


def _log_probabilities(model: Any, prompts: Sequence[list[int]], device: torch.device) -> list[Tensor]:
    vocab_size = int(model.config.get_text_config().vocab_size)
    logits = (model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0] for ids in prompts)
    return [one[:, :vocab_size].float().log_softmax(-1) for one in logits]


def by_prompt_logprobs(
    teacher: TeacherConfig, prompts: Sequence[list[int]], *, dtype: str, devices: Devices, row_length: int | None
) -> Reference:
    """By a child process, see reference_child.py. Raises UserError with the end of its log where it fails."""
    usable = [ids for ids in prompts if len(ids) > 1]  # prompt_logprobs speak of the second token on
    with tempfile.TemporaryDirectory(prefix="potstill-reference-") as folder:
        place = Path(folder)
        task = {
            "teacher": teacher.model_dump(mode="json"),
            "prompts": usable,
            "dtype": dtype,
            "row_length": row_length,
            "best": _BEST,
        }
        (place / "task.json").write_text(json.dumps(task), encoding="utf-8")
        with only_gpus(devices):
            child = start([sys.executable, "-m", _CHILD, folder], output=place / "log.txt")
        code = child.wait()
        if code != 0:
            tail = (place / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            raise UserError(
                f"teacher {teacher.model!r}: vLLM gives no prompt_logprobs to compare its hidden states with (exit "
                f"code {code}): {' | '.join(tail)}"
            )
        with np.load(place / "answer.npz") as answer:
            found = [
                [
                    (torch.from_numpy(answer[f"ids{run}_{i}"]), torch.from_numpy(answer[f"logprobs{run}_{i}"]))
                    for i in range(len(usable))
                ]
                for run in range(2)
            ]
    noise = torch.cat([_sparse_distance(*a, *b) for a, b in zip(*found, strict=True)]).mean()
    lookup = iter(found[0])
    pairs = [next(lookup) if len(ids) > 1 else _nothing() for ids in prompts]
    return Reference(
        "vLLM's own prompt_logprobs",
        prompts,
        [ids for ids, _ in pairs],
        [logprobs for _, logprobs in pairs],
        float(noise),
        "they differ from themselves in another batch",
        dtype,
    )


def _nothing() -> tuple[Tensor, Tensor]:
    return torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1)


def _sparse_distance(ids: Tensor, logprobs: Tensor, other_ids: Tensor, other_logprobs: Tensor) -> Tensor:
    """Total variation [n] over the ids that both name, all others as one."""
    same = ids[:, :, None] == other_ids[:, None, :]  # [n, R, R]
    q = torch.where(same, other_logprobs.double().exp()[:, None, :], 0.0).sum(-1)
    p = torch.where(same.any(-1), logprobs.double().exp(), 0.0)
    return ((p - q).abs().sum(-1) + (p.sum(-1) - q.sum(-1)).abs()) / 2
