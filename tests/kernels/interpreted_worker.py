"""Runs every Triton kernel in Triton's interpreter and compares it with its torch twin; prints JSON errors.

A process of its own: TRITON_INTERPRET must be set before triton is imported, and turns every kernel of the
process into an interpreted one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from potstill.kernels import one_pass, rows_triton
from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.loss import SparseTargetTensors, linear_sparse_loss, sparse_loss
from tests.kernels.fast_interpreter import patch_once_per_launch
from tests.kernels.reference import as_draws, as_weights, make_targets
from tests.kernels.slab_worker import small_rows

# Masked lanes that compute inf - inf warn in NumPy; on a GPU they would be NaN. Only this class: older
# interpreters raise a deprecation warning on every loop.
warnings.simplefilter("error", RuntimeWarning)


def compare_loss(
    *,
    vocab_size: int,
    dtype: torch.dtype,
    divergence: str = "forward_kl",
    upstream: float = 1.0,
    draws: Callable[[SparseTargetTensors], SparseTargetTensors] = lambda targets: as_draws(targets, 20),
    **settings,
) -> dict:
    """Errors of loss, gradient and sums: Triton in `dtype` against the torch passes in float64."""
    targets = make_targets(4, vocab_size, [min(vocab_size, n) for n in (3, 17, 0, 9)], seed=vocab_size)
    if divergence == "sampled":
        targets = draws(targets)
    generator = torch.Generator().manual_seed(vocab_size)
    labels = torch.randint(0, vocab_size, (4,), generator=generator)
    labels[1] = -100
    labels[3] = targets.ids[int(targets.offsets[3])]
    raw = (torch.randn(4, vocab_size, generator=generator) * 3).to(dtype)
    results = []
    for backend, values in (("torch", raw.double()), ("triton", raw)):
        leaf = values.clone().requires_grad_()
        loss, sums = sparse_loss(
            logits=leaf,
            targets=targets,
            labels=labels,
            divergence=divergence,
            backend=backend,
            token_weights=torch.tensor([1.0, 0.5, 2.0, 1.0]),
            normalizer=torch.tensor(1.0),
            **{"alpha": 0.7, "ce_weight": 0.3, **settings},
        )
        (grad,) = torch.autograd.grad(loss * upstream, leaf)
        results.append((loss.detach(), grad.double() / upstream, sums.stack().double()))
    (loss, grad, sums), (got, got_grad, got_sums) = results
    return {
        "loss": float((got - loss).abs() / loss.abs()),
        "grad": float((got_grad - grad).abs().max()),
        "largest": float(grad.abs().max()),
        "sums": float(((got_sums - sums).abs() / (1 + sums.abs())).max()),
        "finite": bool(got_grad.isfinite().all()),
    }


def compare_linear() -> dict:
    """Chunked from hidden states: padded row strides, several chunks, all three gradients."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator) for shape in ((5, 8), (301, 8), (301,))]
    targets, labels = make_targets(5, 301, [4, 0, 20]), torch.arange(5)
    results = []
    for backend, kind in (("torch", torch.float64), ("triton", torch.float32)):
        hidden, weight, bias = (x.to(kind).requires_grad_() for x in leaves)
        loss, _ = linear_sparse_loss(
            hidden=hidden, weight=weight, bias=bias, targets=targets, labels=labels, alpha=0.5, temperature=2.0,
            backend=backend, chunk_bytes=2 * 4 * 301,
        )  # fmt: skip
        results.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True)]
    return dict(zip(("hidden", "weight", "bias"), errors, strict=True))


def one_pass_cases(every: bool) -> dict[str, dict]:
    """Sizes of rows, temperatures, caps and dtypes of the row kernel, then each divergence with each of its modes; with
    `every` at each temperature, else at one of them in turn."""
    out: dict[str, dict] = {}
    temperatures: list[dict[str, Any]] = [
        {"temperature": 2.0},
        {"temperature": 1.0},
        {"temperature": 2.0, "temperature_side": "teacher"},
    ]
    sizes = (1, 2, 127, 256, 1000)
    for number, vocab_size in enumerate(size for size in sizes for _ in range(2)):
        settings: dict[str, Any] = {
            "logit_scale": 0.9,
            "z_loss": 0.01,
            "soft_cap": (None, 8.0)[number % 2],
        } | temperatures[number % 3]
        out[f"float32 V={vocab_size} {settings}"] = compare_loss(vocab_size=vocab_size, dtype=torch.float32, **settings)
    pairs = [(name, mode) for name, entry in DIVERGENCES.items() for mode in entry.modes]
    for number, (name, mode) in enumerate(pairs):
        wanted = temperatures if every else [temperatures[number % 3]]
        for settings in [{"temperature": 1.0}] if DIVERGENCES[name].needs_counts else wanted:
            out[f"float32 {name} {mode} {settings}"] = compare_loss(
                vocab_size=150, dtype=torch.float32, divergence=name, missing_mass=mode, z_loss=0.01, **settings
            )
    out["float32 log weights"] = compare_loss(
        vocab_size=300, dtype=torch.float32, divergence="sampled", missing_mass="renorm", draws=as_weights
    )
    off: dict[str, Any] = {"off_kd": "ce", "kd_weights": torch.tensor([0.0, 0.5, 1.0, 1.0])}
    for temperature in (1.0, 2.0):
        out[f"float32 KD off T={temperature}"] = compare_loss(
            vocab_size=300, dtype=torch.float32, temperature=temperature, alpha=1.0, ce_weight=0.0, **off
        )
    out["float32 argmax labels"] = compare_loss(
        vocab_size=600, dtype=torch.float32, temperature=1e-20, temperature_side="teacher", missing_mass="renorm"
    )
    return out


def dtype_cases() -> dict[str, dict]:
    """Short dtypes, and the parts of the loss one by one."""
    out = {}
    for temperature in (1.0, 2.0):
        for soft_cap in (None, 8.0):
            out[f"float16 V=300 T={temperature} cap={soft_cap}"] = compare_loss(
                vocab_size=300, dtype=torch.float16, temperature=temperature, soft_cap=soft_cap
            )
        # Conversion to bf16 truncates in the interpreter: one unit in the last place is all one can ask.
        out[f"bfloat16 V=300 T={temperature}"] = compare_loss(
            vocab_size=300, dtype=torch.bfloat16, temperature=temperature
        )
        out[f"float32 KD only V=300 T={temperature}"] = compare_loss(
            vocab_size=300, dtype=torch.float32, temperature=temperature, alpha=1.0, ce_weight=0.0
        )
    for dtype, name in ((torch.float32, "float32"), (torch.float16, "float16")):
        for soft_cap in (None, 8.0):
            out[f"{name} V=300 T=2.0 of the teacher cap={soft_cap}"] = compare_loss(
                vocab_size=300, dtype=dtype, temperature=2.0, temperature_side="teacher", soft_cap=soft_cap
            )
    return out


def main() -> None:
    # Small tiles and blocks make several whole ones and a ragged rest out of a small row.
    ordinary = rows_triton.TRITON
    rows_triton.TRITON = dataclasses.replace(ordinary, slab_pass=small_rows())
    rows_triton.MAX_BLOCK = rows_triton.HALF_BLOCK = 256
    out: dict[str, dict] = {**one_pass_cases(every="every" in sys.argv), **dtype_cases()}
    lanes, one_pass.MAX_LANES = one_pass.MAX_LANES, -1
    few: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
        (torch.float16, {"soft_cap": 8.0}),
        (torch.bfloat16, {"temperature": 2.0}),
        (torch.float32, {"temperature": 2.0, "alpha": 1.0, "ce_weight": 0.0}),
        (torch.float32, {"temperature": 2.0, "temperature_side": "teacher", "soft_cap": 8.0}),
    )
    for dtype, settings in few:
        name = f"{str(dtype).removeprefix('torch.')} {settings} in two passes"
        out[name] = compare_loss(vocab_size=600, dtype=dtype, **settings)
    one_pass.MAX_LANES = lanes
    rows_triton.TRITON = ordinary
    for dtype, name in ((torch.float32, "float32"), (torch.float16, "float16")):
        out[f"{name} upstream 4"] = compare_loss(vocab_size=20000, dtype=dtype, upstream=4.0)
    out["linear"] = compare_linear()
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    patch_once_per_launch()
    main()
