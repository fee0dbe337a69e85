"""How much signal the gradients of problems carry, by the chance p that the student solves them.

For problems with p in a bin, the gradients of their distillation losses have a mean, which a step follows, and a
spread, which hinders it: signal to noise is |mean|^2 over the sum of the variances of all parameters. Both are
estimated without bias from n problems (|mean of n|^2 holds 1/n of the variance, which is taken off).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from benchmarks.claims.arithmetic import Arithmetic
from benchmarks.claims.base import Bench
from potstill.storage import StoreReader, TokensRow

if TYPE_CHECKING:
    from torch import Tensor

BINS = (0.0, 0.01, 0.05, 0.25, 0.75, 0.95, 0.99, 1.0)
SAMPLES = 5
PER_BIN = {"quick": 2, "cpu": 50, "gpu": 200}  # problems of a sample


def signal_to_noise(bench: Bench) -> list[list[float | None]]:
    """[SAMPLES][bins] of the student as it comes; None where a bin has too few problems. Kept beside the setting."""
    setting = Arithmetic(bench)
    path = setting.folder / "signal_to_noise.json"
    if not path.is_file():
        path.write_text(json.dumps(_measured(setting, PER_BIN[bench.scale])), encoding="utf-8")
    found: list[list[float | None]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _measured(setting: Arithmetic, per_bin: int) -> list[list[float | None]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(setting.model(name)).eval() for name in ("start", "teacher")
    )
    store = StoreReader(setting.tokens("problems"))
    rows = cast("list[TokensRow]", store.rows(range(store.num_rows)))
    with torch.no_grad():
        chances = np.array([float(torch.exp(-_label_loss(student, row))) for row in rows])
    bin_of = np.clip(np.searchsorted(BINS, chances, side="right") - 1, 0, len(BINS) - 2)
    found: list[list[float | None]] = [[] for _ in range(SAMPLES)]
    draws = np.random.default_rng(0)
    for number in range(len(BINS) - 1):
        ids = draws.permutation(np.flatnonzero(bin_of == number))[: SAMPLES * per_bin]
        for sample, part in enumerate(np.array_split(ids, SAMPLES)):
            few = len(part) < per_bin
            found[sample].append(None if few else _of_problems(student, teacher, [rows[n] for n in part]))
    return found


def _logits(model: Any, row: TokensRow) -> Tensor:
    """[n, V] of the trained positions of a row."""
    import torch

    ids = torch.from_numpy(row.tokens.astype(np.int64))[None]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits[torch.from_numpy(row.has_target())]


def _label_loss(model: Any, row: TokensRow) -> Tensor:
    """Summed over the answer: exp(-it) is the chance that sampling writes the reference."""
    import torch

    labels = torch.from_numpy(row.labels()[row.has_target()])
    return torch.nn.functional.cross_entropy(_logits(model, row), labels, reduction="sum")


def _of_problems(student: Any, teacher: Any, rows: Sequence[TokensRow]) -> float:
    """Signal to noise of the gradients of forward KL, mean over the answer, of these problems."""
    import torch

    total: Tensor | None = None
    squares = 0.0
    for row in rows:
        with torch.no_grad():
            target = _logits(teacher, row).softmax(-1)
        student.zero_grad()
        loss = torch.nn.functional.kl_div(_logits(student, row).log_softmax(-1), target, reduction="batchmean")
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        total = gradient if total is None else total + gradient
        squares += float(gradient @ gradient)
    assert total is not None
    n = len(rows)
    mean_square = float(total @ total) / n**2
    variance = (squares / n - mean_square) * n / (n - 1)
    return (mean_square - variance / n) / variance if variance > 0 else 0.0
