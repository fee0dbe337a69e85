"""What must hold of any loss here, whatever its formula."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.kernels import rows_torch
from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.loss import LossSums, linear_sparse_loss, sparse_loss, token_statistics
from potstill.kernels.loss_call import LossCall, read_options
from potstill.kernels.row_terms import RowStats, build_fix_set, row_terms
from potstill.kernels.types import SparseTargetTensors
from tests.kernels.reference import as_draws, losses_per_token, make_targets

N, V, D = 6, 50, 8
ON_BUCKETS = [name for name in DIVERGENCES if name not in ("sampled", "mse_logprobs")]


def inputs(dtype: torch.dtype = torch.float64, num_tokens: int = N, vocab_size: int = V):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    return hidden, weight, labels


def gradients(call, leaves, **arguments):
    loss, sums = call(**arguments)
    return (loss.detach(), sums, *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("divergence", ON_BUCKETS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(divergence: str, temperature: float) -> None:
    targets = make_targets(N, V, [4, 9], seed=5)
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64) * 2  # what make_targets drew
    logits.requires_grad_()
    labels = torch.full((N,), -100)
    options = {"skew": 0.1} if "skew" in divergence else None
    loss, _ = sparse_loss(
        logits=logits,
        targets=targets,
        labels=labels,
        divergence=divergence,
        temperature=temperature,
        divergence_options=options,
    )
    (grad,) = torch.autograd.grad(loss, logits)
    # The stored float32 values are the teacher up to 1e-7; total variation is of first order in them.
    assert abs(float(loss.detach())) < (1e-5 if divergence == "total_variation" else 1e-10)
    if divergence != "total_variation":
        assert float(grad.abs().max()) < 1e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "reverse_kl"])
def test_merging_entries_into_the_tail_lowers_the_divergence(divergence: str) -> None:
    hidden, weight, _ = inputs()
    labels = torch.full((N,), -100)
    full, coarse = make_targets(N, V, [12], seed=2), make_targets(N, V, [5], seed=2)
    values = [
        losses_per_token(hidden=hidden, weight=weight, targets=targets, labels=labels, divergence=divergence)
        for targets in (full, coarse)
    ]
    assert bool((values[1] <= values[0] + 1e-9).all())
    assert bool((values[1] < values[0] - 1e-6).any())


def test_decoupled_form_is_the_tail_form() -> None:
    """KL(Bern M, Bern Q) + M KL(p~, q~) = KL on the k + 1 buckets (chain rule)."""
    hidden, weight, _ = inputs()
    labels = torch.full((N,), -100)
    targets = make_targets(N, V, [6])
    loss = losses_per_token(hidden=hidden, weight=weight, targets=targets, labels=labels)
    inner = losses_per_token(hidden=hidden, weight=weight, targets=targets, labels=labels, missing_mass="support")
    q = (hidden @ weight.t()).softmax(1).gather(1, targets.ids.view(N, 6).long()).sum(1)
    p = targets.logprobs.view(N, 6).double().exp().sum(1)
    p = p / (p + targets.log_tail.double().exp())
    outer = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(loss, outer + p * inner, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_shift_of_all_logits_and_order_of_entries_change_nothing(divergence: str) -> None:
    targets = make_targets(N, V, [7])
    labels = torch.arange(N)
    logits = torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = torch.cat([torch.randperm(7, generator=torch.Generator().manual_seed(n)) + 7 * n for n in range(N)])
    shuffled = dataclasses.replace(targets, ids=targets.ids[order], logprobs=targets.logprobs[order])
    base = gradients_of_logits(logits, targets, labels, divergence)
    for other in (
        gradients_of_logits(logits + 37.5, targets, labels, divergence),
        gradients_of_logits(logits, shuffled, labels, divergence),
    ):
        torch.testing.assert_close(other, base, rtol=1e-9, atol=1e-12)


def gradients_of_logits(logits, targets, labels, divergence):
    leaf = logits.clone().requires_grad_()
    loss, _ = sparse_loss(
        logits=leaf, targets=targets, labels=labels, divergence=divergence, alpha=0.5, temperature=2.0
    )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_tokens_of_weight_zero_cost_nothing_and_touch_nothing() -> None:
    hidden, weight, labels = inputs()
    targets = make_targets(N, V, [5])
    keep = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5, 1.0])
    poisoned = hidden.detach().clone()
    poisoned[keep == 0] = math.nan
    poisoned.requires_grad_()
    arguments = {"targets": targets, "alpha": 0.5, "temperature": 2.0, "labels": labels}
    loss, sums = linear_sparse_loss(hidden=poisoned, weight=weight, token_weights=keep, **arguments)
    got = torch.autograd.grad(loss, (poisoned, weight))
    assert bool((got[0][keep == 0] == 0).all())
    assert int(sums.num_targets) == 4 and float(sums.weight) == 4.5
    chosen = keep.nonzero()[:, 0]
    rest, _ = linear_sparse_loss(
        hidden=hidden[chosen],
        weight=weight,
        token_weights=keep[chosen],
        **{**arguments, "targets": targets.select(chosen), "labels": labels[chosen]},
    )
    torch.testing.assert_close(loss, rest, rtol=1e-14, atol=0)
    torch.testing.assert_close(got[1], torch.autograd.grad(rest, weight)[0], rtol=1e-12, atol=1e-15)
    known, _ = linear_sparse_loss(hidden=poisoned, weight=weight, token_weights=keep, num_active=4, **arguments)
    assert torch.equal(known, loss)
    # Logits given: the rows without a weight get exact zeros too, also in place.
    for inplace in (False, True):
        logits = (hidden @ weight.t()).detach()
        logits[keep == 0] = math.nan
        logits.requires_grad_()
        value, _ = sparse_loss(logits=logits, token_weights=keep, inplace=inplace, **arguments)
        (grad,) = torch.autograd.grad(value, logits)
        assert bool((grad[keep == 0] == 0).all()) and bool(grad.isfinite().all())


def test_all_weights_zero_gives_zero() -> None:
    hidden, weight, labels = inputs()
    loss, sums = linear_sparse_loss(
        hidden=hidden, weight=weight, targets=make_targets(N, V, [3]), labels=labels, token_weights=torch.zeros(N)
    )
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert float(loss.detach()) == 0.0 and float(sums.weight) == 0.0
    assert all(bool((grad == 0).all()) for grad in grads)


def test_linear_in_weights_and_upstream() -> None:
    hidden, weight, labels = inputs()
    targets = make_targets(N, V, [5])
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(N, generator=generator)
    norm = torch.tensor(3.0)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "labels": labels, "alpha": 0.5}
    one = gradients(linear_sparse_loss, (hidden, weight), token_weights=w, normalizer=norm, **arguments)
    two = gradients(linear_sparse_loss, (hidden, weight), token_weights=2 * w, normalizer=norm, **arguments)
    for a, b in zip((one[0], *one[2:]), (two[0], *two[2:]), strict=True):
        torch.testing.assert_close(2 * a, b, rtol=1e-6, atol=1e-9)
    loss, _ = linear_sparse_loss(token_weights=w, normalizer=norm, **arguments)
    scaled = torch.autograd.grad(loss * 1024.0, (hidden, weight))
    torch.testing.assert_close(scaled, tuple(1024 * g for g in one[2:]), rtol=1e-12, atol=1e-12)


def test_second_backward_is_refused_and_linear_in_upstream_in_place() -> None:
    hidden, weight, labels = inputs()
    arguments = {"targets": make_targets(N, V, [5]), "labels": labels, "alpha": 0.5}
    loss, _ = linear_sparse_loss(hidden=hidden, weight=weight, **arguments)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, hidden)
    results = []
    for inplace, upstream in ((False, 1.0), (False, 3.0), (True, 1.0), (True, 3.0)):
        logits = (hidden @ weight.t()).detach().requires_grad_()
        value, _ = sparse_loss(logits=logits, inplace=inplace, **arguments)
        results.append(torch.autograd.grad(value * upstream, logits)[0] / upstream)
    torch.testing.assert_close(torch.stack(results), results[0].expand(4, N, V), rtol=1e-13, atol=1e-16)


def test_any_weights_and_upstream_are_sums_of_the_tokens() -> None:
    """One call with weights is the weighted sum of calls on single tokens, in its gradients too."""
    hidden, weight, labels = inputs()
    targets = make_targets(N, V, [5, 0, 3])
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "alpha": 0.5, "temperature": 2.0}
    one = torch.ones((), dtype=torch.float64)
    loss, _ = linear_sparse_loss(
        targets=targets, token_weights=weights, normalizer=one, chunk_bytes=2 * 8 * V, **arguments
    )
    expected = (losses_per_token(targets=targets, **arguments) * weights).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    got, wanted = (torch.autograd.grad(-2 * value, (hidden, weight)) for value in (loss, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunks_do_not_matter(temperature: float) -> None:
    hidden, weight, labels = inputs()
    arguments = {"hidden": hidden, "weight": weight, "labels": labels, "targets": make_targets(N, V, [5, 0])}
    results = [
        gradients(
            linear_sparse_loss, (hidden, weight), alpha=0.5, temperature=temperature, chunk_bytes=size, **arguments
        )
        for size in (1, 8 * V * 2, 8 * V * 5, 1 << 20)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0], rtol=1e-13, atol=0)
        torch.testing.assert_close(other[2:], results[0][2:], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_statistics_of_vocabulary_shards_merge_to_those_of_the_whole(temperature: float) -> None:
    """Sums of exp merge exactly in any split of the vocabulary, so that ranks may hold shards of the head."""
    hidden, weight, labels = inputs()
    logits = (hidden @ weight.T).detach()
    targets = make_targets(N, V, [5, 0, 2])
    options = read_options(None, {"alpha": 0.5, "temperature": temperature, "z_loss": 1e-3})
    call = LossCall.make(*options, targets=targets, labels=labels, sizes=(N, V), like=logits)
    fix = build_fix_set(
        targets, labels, torch.arange(N), call.settings, width=call.width, vocab_size=V, dtype=torch.float64
    )

    def statistics(start: int, stop: int) -> RowStats:
        here = fix.used & (fix.ids >= start) & (fix.ids < stop)
        shard = dataclasses.replace(fix, ids=torch.where(here, fix.ids - start, 0), used=here, kept=fix.kept & here)
        return rows_torch.row_stats(logits[:, start:stop].clone(), shard, call.settings, keep_exp=False)[0]

    parts = [statistics(start, stop) for start, stop in ((0, 1), (1, 17), (17, V))]
    log_rest = torch.stack([part.log_rest for part in parts])
    merged = RowStats(
        fix=torch.stack([part.fix for part in parts]).amax(0),
        log_rest=log_rest.logsumexp(0),
        log_rest_t=torch.stack([part.log_rest_t for part in parts]).logsumexp(0),
        mean_rest=(torch.stack([part.mean_rest for part in parts]) * log_rest.softmax(0)).sum(0),
        row_max=torch.stack([part.row_max for part in parts]).amax(0),
    )
    ones = torch.ones(N, dtype=torch.float64)
    expected, got = (
        row_terms(stats, fix, call.settings, factors=call.factors, weights=ones, kd_weights=ones)
        for stats in (statistics(0, V), merged)
    )
    for name in ("loss", "sums", "fix_grad", "dense_t", "dense_1"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-12, atol=1e-14, msg=name)


def test_kd_weights_touch_the_kd_term_only() -> None:
    hidden, weight, labels = inputs()
    targets = make_targets(N, V, [5])
    kd_weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 3.0])
    arguments = {"hidden": hidden, "weight": weight, "labels": labels}
    mixed = losses_per_token(targets=targets, kd_weights=kd_weights, alpha=0.4, ce_weight=0.6, **arguments)
    kd = losses_per_token(targets=targets, **arguments)
    ce = losses_per_token(targets=None, alpha=0.0, **arguments)
    torch.testing.assert_close(mixed, 0.4 * kd_weights.double() * kd + 0.6 * ce, rtol=1e-12, atol=1e-14)


def test_statistics_are_the_losses_of_each_token() -> None:
    hidden, weight, labels = inputs()
    labels[2] = -100
    targets = make_targets(N, V, [5, 0, 3])
    got = token_statistics(
        hidden=hidden, weight=weight, labels=labels, targets=targets, temperature=2.0, chunk_bytes=8 * V * 2
    )
    log_q = (hidden @ weight.t()).log_softmax(1)
    want = torch.where(labels >= 0, log_q.gather(1, labels.clamp_min(0)[:, None])[:, 0], 0.0)
    torch.testing.assert_close(got.label_logprob, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.entropy, -(log_q.exp() * log_q).sum(1), rtol=1e-11, atol=1e-12)
    kd = losses_per_token(hidden=hidden, weight=weight, labels=labels, targets=targets, temperature=2.0)
    torch.testing.assert_close(got.divergence * 4, kd, rtol=1e-12, atol=1e-13)
    assert not got.entropy.requires_grad
    plain = token_statistics(hidden=hidden, weight=weight, labels=labels)
    assert bool((plain.divergence == 0).all())


def test_sums_add_and_stack() -> None:
    hidden, weight, labels = inputs()
    targets = make_targets(N, V, [5])
    _, whole = linear_sparse_loss(hidden=hidden, weight=weight, targets=targets, labels=labels)
    parts = []
    for index in (torch.arange(0, 2), torch.arange(2, N)):
        _, sums = linear_sparse_loss(
            hidden=hidden[index], weight=weight, targets=targets.select(index), labels=labels[index]
        )
        parts.append(sums)
    torch.testing.assert_close((parts[0] + parts[1]).stack(), whole.stack(), rtol=1e-12, atol=1e-13)
    assert LossSums.unstack(whole.stack()) == whole
    assert int(whole.num_labels) == N


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_low_precision_is_no_worse_than_eager(dtype: torch.dtype, temperature: float) -> None:
    """|truth - ours| <= |truth - eager in the same dtype| + one rounding of the result."""
    hidden, weight, labels = inputs(dtype, 40, 300)
    targets = make_targets(40, 300, [9])
    arguments = {"targets": targets, "labels": labels, "alpha": 0.5, "temperature": temperature}
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = gradients(linear_sparse_loss, wide, hidden=wide[0], weight=wide[1], **arguments)
    ours = gradients(linear_sparse_loss, (hidden, weight), hidden=hidden, weight=weight, **arguments)
    logits = hidden @ weight.t()
    loss, _ = sparse_loss(logits=logits, **arguments)
    eager = torch.autograd.grad(loss, (hidden, weight))
    assert abs(float(ours[0]) - float(truth[0])) <= 2e-3 * float(truth[0])
    for a, b, c in zip(ours[2:], eager, truth[2:], strict=True):
        assert a.dtype == dtype
        room = torch.finfo(dtype).eps * float(c.norm())
        assert float((a - c).norm()) <= float((b - c).norm()) + room


@settings(max_examples=40, deadline=None)
@given(
    vocab_size=st.integers(1, 70),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([1.0, 2.0]),
    divergence=st.sampled_from(sorted(DIVERGENCES)),
    chunk_rows=st.integers(1, 9),
)
def test_any_shape_is_finite_and_balanced(vocab_size, counts, seed, temperature, divergence, chunk_rows) -> None:
    counts = [min(count, vocab_size) for count in counts]
    targets = make_targets(5, vocab_size, counts, seed=seed, scale=4.0)
    if divergence == "sampled":
        targets, temperature = as_draws(targets, 12), 1.0
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(5, vocab_size, generator=generator, dtype=torch.float64) * 4).requires_grad_()
    labels = torch.randint(-1, vocab_size, (5,), generator=generator)
    labels[labels < 0] = -100
    loss, sums = sparse_loss(
        logits=logits,
        targets=targets,
        labels=labels,
        alpha=0.7,
        temperature=temperature,
        divergence=divergence,
        chunk_bytes=8 * vocab_size * chunk_rows,
    )
    (grad,) = torch.autograd.grad(loss, logits)
    assert bool(loss.isfinite()) and bool(grad.isfinite().all()) and bool(sums.stack().isfinite().all())
    assert float(grad.sum(1).abs().max()) < 1e-10 * max(1.0, float(grad.abs().max()))
    assert float(sums.kept_mass) <= float(sums.target_weight) + 1e-6


def test_select_and_move_keep_the_rows() -> None:
    targets = make_targets(5, 30, [3, 0, 4])
    index = torch.tensor([4, 0, 0, 1])
    picked = targets.select(index)
    assert picked.offsets.tolist() == [0, 0, 3, 6, 6]
    assert torch.equal(picked.ids[:3], targets.ids[:3]) and torch.equal(picked.logprobs[3:6], targets.logprobs[:3])
    assert torch.equal(picked.log_tail_at[2.0], targets.log_tail_at[2.0][index])
    moved = targets.to("cpu")
    assert moved.max_entries == 4 and targets.width == 4
    again = SparseTargetTensors.from_arrays(targets)
    assert torch.equal(again.ids, targets.ids) and again.max_entries == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["whole", "padded rows", "columns apart"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_of_any_layout_are_read_where_they_lie(dtype, form: str, weighted: bool, inplace: bool) -> None:
    """Out of place they stay as they are; tokens of weight 0 may hold NaN."""
    hidden, weight, labels = inputs()
    plain = (hidden @ weight.T).detach().to(dtype)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.5]) if weighted else None
    if weighted:
        plain[1] = math.nan
    shared = {"targets": make_targets(N, V, [5, 0, 2]), "labels": labels, "token_weights": weights, "alpha": 0.5}
    leaf = plain.double().requires_grad_()
    wanted, _ = sparse_loss(logits=leaf, **shared)
    (slope,) = torch.autograd.grad(wanted, leaf)
    base = torch.full((N, 2 * V) if form != "columns apart" else (N, V, 2), 7.0, dtype=dtype)
    place = base[:, :V] if form == "padded rows" else (base[..., 0] if form == "columns apart" else plain.clone())
    place.copy_(plain)
    given = place.requires_grad_()
    loss, _ = sparse_loss(logits=given, inplace=inplace, chunk_bytes=4 * V * 2, **shared)
    (found,) = torch.autograd.grad(loss, given)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.double(), slope, rtol=tolerance, atol=tolerance)
    if inplace:
        assert found.data_ptr() == given.data_ptr()
    else:
        assert torch.equal(given.detach().nan_to_num(), plain.nan_to_num())
    assert not found.isnan().any()
