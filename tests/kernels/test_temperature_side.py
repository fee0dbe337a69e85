"""A temperature of the teacher alone: the student stays at 1, there is no T^2, and near 0 it is the argmax."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.loss import linear_sparse_loss, sparse_loss, token_statistics
from potstill.kernels.types import SparseTargetTensors
from tests.kernels.reference import as_draws, losses_per_token, make_targets

N, V, D = 6, 24, 5
NO_LABELS = torch.full((N,), -100)
ARGMAX = {"temperature": 1e-20, "temperature_side": "teacher"}
PAIRS = [(name, mode) for name, entry in DIVERGENCES.items() for mode in entry.modes]
ARGMAX_PAIRS = [
    (name, mode)
    for name, mode in PAIRS
    if mode in ("renorm", "support") and not DIVERGENCES[name].needs_counts and name != "mse_logprobs"
]


def student_logits(seed: int = 3, scale: float = 1.5, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(N, V, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def teacher_logits(seed: int = 0) -> Tensor:
    """What make_targets drew for this seed."""
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def gradient(logits: Tensor, **options) -> tuple[Tensor, Tensor]:
    loss, _ = sparse_loss(logits=logits, **options)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize(("divergence", "missing_mass"), PAIRS)
def test_at_temperature_one_the_side_makes_no_difference(divergence: str, missing_mass: str) -> None:
    targets = make_targets(N, V, [4, 0, 7])
    if DIVERGENCES[divergence].needs_counts:
        targets = as_draws(targets, 12)
    options = {"targets": targets, "labels": torch.arange(N), "alpha": 0.6}
    options |= {"divergence": divergence, "missing_mass": missing_mass}
    both = gradient(student_logits(), temperature_side="both", **options)
    assert all(map(torch.equal, both, gradient(student_logits(), temperature_side="teacher", **options)))


@pytest.mark.parametrize("missing_mass", ["tail", "renorm"])
@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_whole_vocabulary_is_the_dense_kl_of_a_tempered_teacher(temperature: float, missing_mass: str) -> None:
    """KL(softmax(z_T / tau) || softmax(z_S)) and its gradient softmax(z_S) - softmax(z_T / tau), without tau^2."""
    targets = make_targets(N, V, [V], temperatures=(temperature,))
    log_p, logits = (teacher_logits() / temperature).log_softmax(1), student_logits()
    options = {"targets": targets, "labels": NO_LABELS, "missing_mass": missing_mass, "temperature": temperature}
    loss, grad = gradient(logits, temperature_side="teacher", **options)
    log_q = logits.detach().log_softmax(1)
    # The targets are the teacher's up to float32.
    torch.testing.assert_close(loss, (log_p.exp() * (log_p - log_q)).sum(1).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, (log_q.exp() - log_p.exp()) / N, rtol=0, atol=1e-6)
    other, other_grad = gradient(logits, temperature_side="both", **options)
    assert abs(float(other - loss)) > 0.1 and float((other_grad - grad).norm()) > 0.1 * float(grad.norm())


@pytest.mark.parametrize(
    ("divergence", "missing_mass"), [p for p in PAIRS if p[0] in ("forward_kl", "reverse_kl", "mse_probs")]
)
def test_finite_differences(divergence: str, missing_mass: str) -> None:
    options = {"targets": make_targets(N, V, [5, 0, 3]), "labels": torch.arange(N), "divergence": divergence}
    options |= {"missing_mass": missing_mass, "temperature": 2.0, "temperature_side": "teacher"}
    logits = student_logits()
    _, grad = gradient(logits, **options)
    step, points = 1e-5, logits.detach()
    generator = torch.Generator().manual_seed(8)
    for _ in range(5):
        way = torch.randn(N, V, generator=generator, dtype=torch.float64)
        above, below = (sparse_loss(logits=points + sign * step * way, **options)[0] for sign in (1, -1))
        assert float((above - below) / (2 * step)) == pytest.approx(float((grad * way).sum()), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-20, 5e-324])
def test_near_zero_it_is_cross_entropy_of_the_argmax(temperature: float, dtype: torch.dtype) -> None:
    targets, logits = make_targets(N, V, [4]), student_logits(dtype=dtype)
    best = targets.ids.view(N, 4)[:, 0].long()
    kd = {"targets": targets, "labels": NO_LABELS, "missing_mass": "renorm", "temperature": temperature}
    loss, grad = gradient(logits, temperature_side="teacher", **kd)
    hard, hard_grad = gradient(logits, targets=None, labels=best, alpha=0.0)
    exact = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(loss, hard, **exact)
    torch.testing.assert_close(grad, hard_grad, **exact)
    if dtype == torch.float64:
        dense = F.cross_entropy(logits, best)
        torch.testing.assert_close(loss, dense.detach(), **exact)
        torch.testing.assert_close(grad, torch.autograd.grad(dense, logits)[0], **exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_entries_share_the_argmax(dtype: torch.dtype) -> None:
    """Values on the store's grid tie often; the labels are then the mean of the tied ones."""
    logprobs = torch.tensor([-1.5, -1.5, -2.0, -9.0]).repeat(N)
    ids = torch.arange(4).repeat(N)
    targets = dataclasses.replace(make_targets(N, V, [4]), ids=ids.int(), logprobs=logprobs)
    logits = student_logits(dtype=dtype)
    loss, grad = gradient(logits, targets=targets, labels=NO_LABELS, missing_mass="renorm", **ARGMAX)
    log_q = logits.detach().log_softmax(1)
    wanted = torch.zeros(N, V, dtype=dtype)
    wanted[:, :2] = 0.5
    entropy = torch.tensor(2.0, dtype=dtype).log()
    torch.testing.assert_close(loss, -(wanted * log_q).sum(1).mean() - entropy, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad, (log_q.exp() - wanted) / N, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(("divergence", "missing_mass"), ARGMAX_PAIRS)
def test_near_zero_everything_is_finite(divergence: str, missing_mass: str, dtype: torch.dtype) -> None:
    logits = student_logits(scale=8.0, dtype=dtype)
    options = {"targets": make_targets(N, V, [5, 0, V], scale=6.0), "labels": torch.arange(N), "alpha": 0.7}
    loss, sums = sparse_loss(logits=logits, divergence=divergence, missing_mass=missing_mass, **options, **ARGMAX)
    (grad,) = torch.autograd.grad(loss, logits)
    assert bool(loss.isfinite()) and bool(grad.isfinite().all()) and bool(sums.stack().isfinite().all())
    assert float(grad.abs().max()) > 0
    assert float(sums.kept_mass) == pytest.approx(float(sums.target_weight))


def linear_inputs() -> tuple[Tensor, Tensor, SparseTargetTensors]:
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64).requires_grad_() for n in (N, V))
    return hidden, weight, make_targets(N, V, [5, 3])


def test_every_entrance_takes_the_side() -> None:
    """Losses per token, statistics and sums are those of the tempered teacher and the plain student."""
    hidden, weight, targets = linear_inputs()
    shared = {"hidden": hidden, "weight": weight, "targets": targets, "labels": NO_LABELS}
    side = {"temperature": 2.0, "temperature_side": "teacher", "chunk_bytes": 2 * 8 * V}
    losses = losses_per_token(**shared, **side)
    loss, sums = linear_sparse_loss(**shared, **side)
    figures = token_statistics(**shared, **side)
    torch.testing.assert_close(losses.mean(), loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(figures.divergence, losses, rtol=1e-13, atol=0)  # no T^2 to tell them apart
    grads = torch.autograd.grad(losses.mean(), (hidden, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(loss, (hidden, weight)), rtol=1e-11, atol=1e-14)
    q = (hidden @ weight.t()).softmax(1).detach()
    entries = [targets.ids[targets.offsets[n] : targets.offsets[n + 1]].long() for n in range(N)]
    student_mass = torch.stack([q[n, ids].sum() for n, ids in enumerate(entries)])
    torch.testing.assert_close(figures.student_mass, student_mass, rtol=1e-12, atol=0)
    assert float(sums.student_mass) == pytest.approx(float(student_mass.sum()), rel=1e-12)
    kept = 1 - targets.log_tail_at[2.0].double().exp()
    assert float(sums.kept_mass) == pytest.approx(float(kept.sum()), rel=1e-12)
