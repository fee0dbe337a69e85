"""Where the tests of this folder run, and what they share.

On a CUDA device, at sizes that show what small ones hide. With POTSTILL_GPU_TESTS_ON_CPU=1 in the environment on the
CPU, through the torch path and at small sizes: that tests the tests (their arguments, references and bounds), since a
machine with a GPU is rarely there to find a slip in them. tests/kernels/test_gpu_tests_on_cpu.py does it in the suite.
With TRITON_INTERPRET=1 besides the kernels run, in Triton's interpreter: slowly, for a few tests at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from potstill.kernels.loss import LossSums, SparseTargetTensors, linear_sparse_loss, sparse_loss
from tests.kernels.reference import make_targets

T = TypeVar("T")
ON_CPU = os.environ.get("POTSTILL_GPU_TESTS_ON_CPU") == "1"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
BACKEND = "torch" if ON_CPU and os.environ.get("TRITON_INTERPRET") != "1" else "triton"

marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_CPU or torch.cuda.is_available()), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
only_on_a_gpu = pytest.mark.skipif(ON_CPU, reason="shows nothing without a CUDA device")
# One rounding to the dtype of the logits.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def size(on_gpu: T, on_cpu: T) -> T:
    """One of the two, by where the tests run."""
    return on_cpu if ON_CPU else on_gpu


def generator(seed: int) -> torch.Generator:
    """Random numbers on the tests' device."""
    return torch.Generator(DEVICE).manual_seed(seed)


def targets_of(num_tokens: int, vocab_size: int, counts: tuple[int, ...], *, period: int = 13) -> SparseTargetTensors:
    """Targets of N tokens on the device; tokens less than `period` apart have different ones."""
    few = make_targets(min(period, num_tokens), vocab_size, [min(n, vocab_size) for n in counts])
    return few.select(torch.arange(num_tokens) % few.num_tokens).to(DEVICE)


def labels_of(num_tokens: int, vocab_size: int, targets: SparseTargetTensors | None = None, seed: int = 0) -> Tensor:
    """Labels int64 [N] on the device: every fifth none, every third a token's last entry where it has one."""
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    if targets is not None:
        offsets, ids = targets.offsets.cpu(), targets.ids.cpu()
        for n in range(0, num_tokens, 3):
            if offsets[n + 1] > offsets[n]:
                labels[n] = ids[offsets[n + 1] - 1]
    labels[4::5] = -100
    return labels.to(DEVICE)


@dataclass(frozen=True)
class Found:
    """What a call gave, in float64: loss, its gradients by the inputs in their order, sums [14]."""

    loss: Tensor
    grads: tuple[Tensor, ...]
    sums: Tensor


def from_logits(raw: Tensor, **options: Any) -> Found:
    """sparse_loss of raw [N, V], with its gradient; divided by 1 unless `normalizer` says otherwise."""
    leaf = raw.detach().requires_grad_()
    options = {"normalizer": torch.ones((), device=raw.device), **options}
    loss, sums = sparse_loss(logits=leaf, **options)
    return _found(loss, sums, (leaf,))


def from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Found:
    """linear_sparse_loss of the three, with its gradients; divided by 1 unless `normalizer` says otherwise."""
    leaves = tuple(x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None)
    options = {"normalizer": torch.ones((), device=hidden.device), **options}
    bias = leaves[2] if bias is not None else None
    loss, sums = linear_sparse_loss(hidden=leaves[0], weight=leaves[1], bias=bias, **options)
    return _found(loss, sums, leaves)


def _found(loss: Tensor, sums: LossSums, leaves: tuple[Tensor, ...]) -> Found:
    grads = torch.autograd.grad(loss, leaves)
    return Found(loss.detach().double(), tuple(grad.double() for grad in grads), sums.stack().double())


def check_from_logits(raw: Tensor, *, backend: str = BACKEND, **options: Any) -> Found:
    """Loss, every entry of the gradient and the sums of the kernels beside torch in float64; returns the kernels'."""
    want = from_logits(raw.double(), backend="torch", **options)
    got = from_logits(raw, backend=backend, **options)
    assert_close(got, want, raw.dtype)
    return got


def assert_close(got: Found, want: Found, dtype: torch.dtype) -> None:
    """`got` is `want` but for float32 arithmetic and one rounding of the gradient to `dtype`."""
    assert float((got.loss - want.loss).abs()) <= 1e-5 * float(want.loss.abs()), (got.loss, want.loss)
    for found, wanted in zip(got.grads, want.grads, strict=True):
        assert bool(found.isfinite().all()), "the gradient is not finite"
        # Of its own row: a row of small weights would be lost beside the others.
        limit = ROUNDING[dtype] * wanted.abs() + 1e-5 * wanted.norm(dim=1, keepdim=True)
        wrong = (found - wanted).abs() > limit
        assert not bool(wrong.any()), f"{int(wrong.sum())} entries, the first at {wrong.nonzero()[0].tolist()}"
    torch.testing.assert_close(got.sums, want.sums, rtol=2e-5, atol=2e-5)


def assert_rows_close(got: Found, want: Found, limit: float) -> None:
    """Loss within `limit`, and each row of each gradient [rows, D] or [rows] within `limit` of its own norm."""
    assert float((got.loss - want.loss).abs()) <= limit * float(want.loss.abs()), (got.loss, want.loss)
    for found, wanted in zip(got.grads, want.grads, strict=True):
        if wanted.dim() == 1:
            found, wanted = found[None], wanted[None]
        # Rows next to zero (an id that hardly any token is sure of) are held to the norm of a middling row.
        norms = wanted.norm(dim=1)
        error = (found - wanted).norm(dim=1) / norms.clamp_min(float(norms.median()))
        assert bool((error.nan_to_num(torch.inf) <= limit).all()), (
            f"row {int(error.argmax())}: {float(error.max()):.2e}"
        )


def assert_same_bits(first: Found, second: Found) -> None:
    """Two calls gave the same, bit for bit."""
    assert torch.equal(first.loss, second.loss) and torch.equal(first.sums, second.sums)
    for a, b in zip(first.grads, second.grads, strict=True):
        assert torch.equal(a, b), f"{int((a != b).sum())} entries differ, at most by {float((a - b).abs().max()):.2e}"


def strided(value: Tensor, filler: float = 7) -> Tensor:
    """The same values at every second place of a memory that holds `filler` between."""
    return torch.stack([value, torch.full_like(value, filler)], -1)[..., 0]


@contextmanager
def no_wait_for_the_device() -> Iterator[None]:
    """Any call that waits for the GPU raises while open."""
    if ON_CPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def fill_free_memory(value: float, *, num_bytes: int = 2 << 30) -> None:
    """Free memory that torch hands out next holds `value` in every float32 of it."""
    if ON_CPU:
        return
    torch.cuda.empty_cache()
    large = [torch.full((num_bytes // 8,), value, device=DEVICE) for _ in range(2)]
    # Below 1 MiB torch takes from blocks of 2 MiB that it keeps apart.
    small = [torch.full((1 << 17,), value, device=DEVICE) for _ in range(64)]
    del large, small


def twice(call: Callable[[], Found], values: tuple[float, float] = (0.0, float("nan"))) -> tuple[Found, Found]:
    """What a call gives in memory full of one value, and full of another."""
    results = []
    for value in values:
        fill_free_memory(value)
        results.append(call())
    return results[0], results[1]
