"""The kernels on a GPU: what the interpreter cannot show (barriers, wide loads, bf16, the device's own exp2).

Skips itself without a CUDA device. Run: PYTHONPATH=src python -m pytest tests/gpu -n 8 --dist loadgroup -q
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from potstill.kernels.counter_random import uniforms
from potstill.kernels.loss import linear_sparse_loss, self_check, sparse_loss
from potstill.kernels.topk import select_sample, teacher_topk
from tests.gpu import place
from tests.gpu.place import BACKEND, DEVICE, ROUNDING
from tests.kernels.reference import as_draws, make_targets

pytestmark = place.marks
BACKENDS = [BACKEND, pytest.param("triton_compiled", marks=place.only_on_a_gpu)]


def batch(num_tokens: int, vocab_size: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    targets = make_targets(num_tokens, vocab_size, [min(vocab_size, n) for n in (64, 1, 0, 17)])
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    labels[1] = -100
    raw = (torch.randn(num_tokens, vocab_size, generator=generator) * 3).to(dtype)
    return targets, labels, raw


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("soft_cap", [None, 15.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab_size", [1, 127, 8192, 50257])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_loss_and_gradient_from_logits(dtype, vocab_size, temperature, soft_cap, backend) -> None:
    if backend == "triton_compiled" and (dtype != torch.bfloat16 or vocab_size < 8192):
        pytest.skip("the compiled steps do not see the dtype and the vocabulary")
    targets, labels, raw = batch(16, vocab_size, dtype)
    results = []
    for name, device, values in (("torch", "cpu", raw.double()), (backend, DEVICE, raw)):
        leaf = values.to(device).requires_grad_()
        loss, sums = sparse_loss(
            logits=leaf,
            targets=targets.to(device),
            labels=labels.to(device),
            alpha=0.6,
            temperature=temperature,
            soft_cap=soft_cap,
            z_loss=1e-3,
            backend=name,
            normalizer=torch.tensor(1.0),
        )
        results.append((loss.detach().cpu().double(), torch.autograd.grad(loss, leaf)[0].cpu().double(), sums))
    (loss, grad, sums), (got, got_grad, got_sums) = results
    assert float((got - loss).abs()) <= 1e-5 * float(loss.abs())
    # Every entry, the dense ones off the support too: one rounding to the dtype, and float32 arithmetic.
    limit = ROUNDING[dtype] * grad.abs() + 2e-6
    assert bool(((got_grad - grad).abs() <= limit).all())
    torch.testing.assert_close(got_sums.stack().cpu().double(), sums.stack().double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("temperature", "missing_mass"), [(2.0, "tail"), (1e-20, "renorm"), (5e-324, "support")])
def test_a_temperature_of_the_teacher_alone(temperature: float, missing_mass: str, backend: str) -> None:
    """A GPU divides by a number as it multiplies by its inverse: near 0 neither may leave the range of float32."""
    targets, labels, raw = batch(16, 32000, torch.float32)
    options: dict[str, Any] = {"temperature": temperature, "temperature_side": "teacher", "missing_mass": missing_mass}
    results = []
    for name, device, values in (("torch", "cpu", raw.double()), (backend, DEVICE, raw)):
        leaf = values.to(device).requires_grad_()
        loss, _ = sparse_loss(
            logits=leaf,
            targets=targets.to(device),
            labels=labels.to(device),
            backend=name,
            normalizer=torch.tensor(1.0),
            **options,
        )
        results.append((loss.detach().cpu().double(), torch.autograd.grad(loss, leaf)[0].cpu().double()))
    (loss, grad), (got, got_grad) = results
    assert float((got - loss).abs()) <= 1e-5 * float(loss.abs())
    assert bool(((got_grad - grad).abs() <= ROUNDING[torch.float32] * grad.abs() + 2e-6).all())


@pytest.mark.parametrize("divergence", ["reverse_kl", "skew_forward", "jsd", "total_variation", "sampled"])
def test_each_divergence(divergence: str) -> None:
    targets, labels, raw = batch(16, 32000, torch.float32)
    if divergence == "sampled":
        targets = as_draws(targets, 70)
    grads = []
    for device, values in (("cpu", raw.double()), (DEVICE, raw)):
        leaf = values.to(device).requires_grad_()
        loss, _ = sparse_loss(logits=leaf, targets=targets.to(device), labels=labels.to(device), divergence=divergence)
        grads.append(torch.autograd.grad(loss, leaf)[0].cpu().double())
    assert float((grads[0] - grads[1]).norm()) <= 2e-5 * float(grads[0].norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_op_and_self_check(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(32000, 256, generator=generator) * 0.1).to(DEVICE, dtype).requires_grad_()
    targets = make_targets(6, 32000, [64, 0, 9]).select(torch.arange(300) % 6).to(DEVICE)
    labels = torch.randint(0, 32000, (300,), generator=generator).to(DEVICE)
    weights = (torch.arange(300) % 3).float().to(DEVICE)
    arguments: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "labels": labels,
        "token_weights": weights,
        "alpha": 0.5,
        "temperature": 2.0,
        "chunk_bytes": 64 * 32000 * hidden.element_size(),
    }
    figures = self_check(**arguments)
    assert max(figures.values()) < (1e-4 if dtype == torch.float32 else 2e-2)
    loss, _ = linear_sparse_loss(**arguments)
    one, _ = linear_sparse_loss(**{**arguments, "chunk_bytes": 1 << 30})
    assert float((loss - one).detach().abs()) <= 1e-5 * float(loss.detach())
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert bool((grads[0][weights == 0] == 0).all())
    for grad, other in zip(grads, torch.autograd.grad(one, (hidden, weight)), strict=True):
        assert float((grad - other).norm()) <= 5e-3 * float(other.norm())


def test_nan_reaches_the_loss() -> None:
    targets, labels, raw = batch(4, 32000, torch.bfloat16)
    raw[2, 20000] = math.nan
    loss, _ = sparse_loss(logits=raw.to(DEVICE), targets=targets.to(DEVICE), labels=labels.to(DEVICE), alpha=0.5)
    assert bool(loss.isnan())


def test_teacher_equals_the_cpu() -> None:
    raw = torch.randn(33, 50257, generator=torch.Generator().manual_seed(0)).bfloat16().float() * 4
    labels = torch.arange(33)
    arguments: dict[str, Any] = {"k": 64, "vocab_size": 50000, "temperatures": (2.0, 0.5)}
    cpu = teacher_topk(logits=raw, labels=labels, **arguments)
    gpu = teacher_topk(logits=raw.to(DEVICE), labels=labels.to(DEVICE), **arguments)
    assert torch.equal(cpu.ids, gpu.ids.cpu()) and torch.equal(cpu.label_rank, gpu.label_rank.cpu())
    for name in ("logprobs", "lse", "entropy", "label_logprob", "log_tail", "excluded_mass"):
        torch.testing.assert_close(getattr(gpu, name).cpu(), getattr(cpu, name), rtol=3e-6, atol=6e-6)
    for temperature, tail in cpu.log_tail_at.items():
        torch.testing.assert_close(gpu.log_tail_at[temperature].cpu(), tail, rtol=3e-6, atol=6e-6)


def test_draws_have_the_bits_of_the_cpu() -> None:
    rows, positions = torch.arange(1000) * 2**33, torch.arange(1000)
    arguments: dict[str, Any] = {"seed": 7, "num_draws": 50}
    cpu = uniforms(rows=rows, positions=positions, **arguments)
    assert torch.equal(cpu, uniforms(rows=rows.to(DEVICE), positions=positions.to(DEVICE), **arguments).cpu())
    num_tokens = 40
    logits = torch.randn(num_tokens, 32000, generator=torch.Generator().manual_seed(1)) * 3
    number = torch.arange(num_tokens)
    drawn = [
        select_sample(logits=logits.to(d), num_draws=50, seed=3, rows=number.to(d), positions=number.to(d)).targets
        for d in ("cpu", DEVICE)
    ]
    # Token by token, ids with their counts. The same numbers meet sums that differ in the last bit: a draw or two on
    # a boundary may go to the next id.
    moved = 0.0
    for n in range(num_tokens):
        tables = []
        for found in drawn:
            entries = slice(*found.offsets[n : n + 2].tolist())
            assert found.counts is not None
            tables.append(dict(zip(found.ids[entries].tolist(), found.counts[entries].tolist(), strict=True)))
        assert sum(tables[0].values()) == sum(tables[1].values()) == 50
        moved += (
            sum(abs(tables[0].get(id_, 0) - tables[1].get(id_, 0)) for id_ in tables[0].keys() | tables[1].keys()) / 2
        )
    assert moved <= 4, f"{moved} of {50 * num_tokens} draws differ"
