"""The kernels of gradients_triton.py in Triton's interpreter against float64; prints JSON errors.

A process of its own, as interpreted_worker.py is.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from potstill.kernels import chunks, fused_linear, gradients_triton, products
from potstill.kernels.loss import linear_sparse_loss
from tests.kernels.fast_interpreter import patch_once_per_launch
from tests.kernels.reference import make_targets

# Masked lanes hold 0, and 0 times a factor that is not finite warns in NumPy.
warnings.simplefilter("ignore", RuntimeWarning)
SMALL_TILE = {"BM": 16, "BN": 32, "BK": 16, "GROUP": 3, "num_warps": 4, "num_stages": 2}


def compare_weight_gradient(*, rows: int, vocab_size: int, width: int, adds: bool, factor: float) -> dict[str, Any]:
    """(total + slab^T hidden) * factor, of a slab with padded rows and hidden states that are part of more."""
    generator = torch.Generator().manual_seed(rows)
    slab = torch.randn(rows, vocab_size + 5, generator=generator).half()[:, :vocab_size]
    hidden = torch.randn(rows + 3, width, generator=generator).half()[3:]
    total = torch.randn(vocab_size, width, generator=generator) if adds else None
    found = gradients_triton.weight_gradient(total, slab, hidden, torch.tensor(factor), torch.float16).double()
    wanted = slab.double().t() @ hidden.double() + (total.double() if total is not None else 0)
    wanted = wanted * factor
    if not math.isfinite(factor):
        return {"same": torch.equal(found.nan_to_num(), wanted.nan_to_num()), "error": 0.0}
    return {
        "same": found.shape == wanted.shape,
        "error": float((found - wanted).abs().max() / (1 + wanted.abs().max())),
    }


def compare_scale(*, count: int, dtype: torch.dtype, out: torch.dtype, factor: float) -> dict[str, Any]:
    value = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    wanted = products.scale(value.clone(), torch.tensor(factor), out)
    given = value.clone()
    found = gradients_triton.scale(given, torch.tensor(factor), out)
    same = torch.equal(found.isfinite(), wanted.isfinite()) and found.dtype == out
    both = found.isfinite() & wanted.isfinite()
    error = float((found[both].double() - wanted[both].double()).abs().max()) if bool(both.any()) else 0.0
    in_place = (found.data_ptr() == given.data_ptr()) == (dtype == out)
    return {"same": same and in_place, "error": error}


def compare_kept(*, rows: int, weighted: bool, upstream: float) -> dict[str, Any]:
    """The whole loss in float16 by chunks of 8, the last one added in backward, against all of it in float64."""
    fused_linear.KEEPS_LAST_CHUNK = True
    generator = torch.Generator().manual_seed(rows)
    vocab_size = 75
    leaves = [torch.randn(*shape, generator=generator).half() for shape in ((rows, 4), (vocab_size, 4))]
    targets, labels = make_targets(rows, vocab_size, [4, 0, 20]), torch.arange(rows) % vocab_size
    weights = torch.ones(rows)
    if weighted:
        weights[1::4] = 0.0
    results, kept = [], []
    whole = fused_linear.plan_chunks

    def noting(*args: Any, **options: Any) -> Any:
        kept.append(whole(*args, **options))
        return kept[-1]

    fused_linear.plan_chunks = noting
    for backend, kind in (("torch", torch.float64), ("triton", torch.float16)):
        hidden, weight = (x.to(kind).requires_grad_() for x in leaves)
        loss, _ = linear_sparse_loss(
            hidden=hidden, weight=weight, targets=targets, labels=labels, alpha=0.5, backend=backend,
            token_weights=weights if weighted else None, chunk_bytes=8 * 2 * vocab_size,
        )  # fmt: skip
        results.append([g.double() for g in torch.autograd.grad(loss * upstream, (hidden, weight))])
    fused_linear.plan_chunks = whole
    errors = [float((a - b).norm() / (a.norm() + 1e-30)) for a, b in zip(*results, strict=True)]
    plan = kept[-1]
    return {"kept": plan.kept, "chunks": len(plan.sizes), "error": max(errors)}


def change_before_backward() -> str:
    """What autograd says where the hidden states change between forward and the backward that still needs them."""
    fused_linear.KEEPS_LAST_CHUNK = True
    hidden, weight = (torch.ones(*shape).half().requires_grad_() for shape in ((3, 4), (75, 4)))
    states = hidden * 1.0
    loss, _ = linear_sparse_loss(
        hidden=states, weight=weight, targets=None, labels=torch.arange(3), alpha=0.0, backend="triton"
    )
    with torch.no_grad():
        states.add_(1.0)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def compare_single(*, dtype: torch.dtype) -> dict[str, Any]:
    """One chunk is all: in bfloat16 its product is the gradient, in float16 it waits in float32 for 1 / normalizer."""
    fused_linear.KEEPS_LAST_CHUNK = False
    generator = torch.Generator().manual_seed(5)
    leaves = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 4), (75, 4))]
    results, held = [], []
    make = fused_linear.empty_gradients

    def noting(*args: Any, **options: Any) -> Any:
        grads = make(*args, **options)
        held.append(str(grads.weight.dtype))
        return grads

    fused_linear.empty_gradients = noting
    for backend, kind in (("torch", torch.float64), ("triton", dtype)):
        hidden, weight = (x.to(kind).requires_grad_() for x in leaves)
        loss, _ = linear_sparse_loss(
            hidden=hidden, weight=weight, targets=None, labels=torch.arange(5), alpha=0.0, backend=backend,
            normalizer=torch.tensor(20.0),
        )  # fmt: skip
        results.append([g.double() for g in torch.autograd.grad(loss * 0.3, (hidden, weight))])
    fused_linear.empty_gradients = make
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True)]
    return {"held": held[-1], "error": max(errors)}


def main() -> None:
    out: dict[str, Any] = {}
    gradients_triton.WEIGHT_TILE = SMALL_TILE
    for rows, vocab_size, width in ((1, 16, 32), (16, 48, 64), (37, 75, 50), (5, 130, 16)):
        for adds in (False, True):
            for factor in (1.0, 0.37, 0.0):
                out[f"weight {rows} {vocab_size} {width} {adds} {factor}"] = compare_weight_gradient(
                    rows=rows, vocab_size=vocab_size, width=width, adds=adds, factor=factor
                )
    out["weight inf"] = compare_weight_gradient(rows=5, vocab_size=20, width=16, adds=True, factor=math.inf)
    gradients_triton.SCALE_BLOCK, gradients_triton.PROGRAMS_PER_PROCESSOR = 64, 3
    for count in (1, 64, 1000):
        for dtype, kind in ((torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float16,) * 2):
            for factor in (1.0, 0.25, 0.0, math.inf, math.nan):
                out[f"scale {count} {dtype} {kind} {factor}"] = compare_scale(
                    count=count, dtype=dtype, out=kind, factor=factor
                )
    chunks.ROW_MULTIPLE = 4
    for rows, weighted in ((7, True), (10, False), (18, False), (12, True)):
        out[f"kept {rows} {weighted}"] = compare_kept(rows=rows, weighted=weighted, upstream=3.0)
    out["change"] = {"error": change_before_backward()}
    out["single bfloat16"] = compare_single(dtype=torch.bfloat16)
    out["single float16"] = compare_single(dtype=torch.float16)
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    patch_once_per_launch()
    main()
