"""The teacher's top k against a full sort in float64, its ties, tails and selections."""

from __future__ import annotations

import math

import pytest
import torch

from potstill.kernels.tiles import order_keys
from potstill.kernels.topk import TopK, select_top_k, select_top_p_k, teacher_topk


def full_sort(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids by (value down, id up) from a stable sort."""
    return torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :k]


def random_logits(num_tokens: int, vocab_size: int, *, coarse: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(num_tokens, vocab_size, generator=generator) * 4
    return (logits * 2).round() / 2 if coarse else logits  # coarse: hundreds of ties per row


def check(best: TopK, raw: torch.Tensor, k: int, vocab_size: int, labels: torch.Tensor) -> None:
    """Every figure of `best` against float64 on all of `raw` [N, V]."""
    z = raw.double()[:, :vocab_size]
    log_p = z.log_softmax(1)
    ids = full_sort(raw[:, :vocab_size].float(), k)
    assert best.ids.dtype == torch.int32 and torch.equal(best.ids.long(), ids)
    close = {"rtol": 2e-6, "atol": 4e-6, "check_dtype": False}
    torch.testing.assert_close(best.logprobs, log_p.gather(1, ids), **close)
    torch.testing.assert_close(best.lse, z.logsumexp(1), **close)
    torch.testing.assert_close(best.entropy, -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=2e-5, check_dtype=False)
    for temperature, tail in [(1.0, best.log_tail), *best.log_tail_at.items()]:
        rest = (z / temperature).log_softmax(1).scatter(1, ids, -math.inf).logsumexp(1)
        torch.testing.assert_close(tail, rest, rtol=3e-6, atol=6e-6, check_dtype=False)
    for temperature, lse in best.lse_at.items():
        torch.testing.assert_close(lse, (z / temperature).logsumexp(1), **close)
    has_label = labels >= 0
    label = labels.clamp_min(0)[:, None]
    want = torch.where(has_label, log_p.gather(1, label)[:, 0], 0.0)
    torch.testing.assert_close(best.label_logprob, want, **close)
    rank = (full_sort(raw[:, :vocab_size].float(), vocab_size) == label).long().argmax(1)
    assert torch.equal(best.label_rank.long(), torch.where(has_label, rank, 255))
    excluded = raw.double().softmax(1)[:, vocab_size:].sum(1)
    torch.testing.assert_close(best.excluded_mass, excluded, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize(
    ("head", "vocab_size", "k"),
    [(1, 1, 1), (2, 1, 1), (63, 63, 63), (64, 64, 5), (65, 60, 20), (1000, 900, 20), (5003, 5003, 64), (300, 300, 255)],
)
def test_exact_ids_tails_and_figures(head: int, vocab_size: int, k: int, coarse: bool) -> None:
    raw = random_logits(6, head, coarse=coarse)
    labels = torch.arange(6) % vocab_size
    labels[1] = -100
    best = teacher_topk(
        logits=raw, k=k, vocab_size=vocab_size, temperatures=(2.0, 0.5), labels=labels, chunk_bytes=4 * 64 * 200
    )
    check(best, raw, k, vocab_size, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_hidden_states(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 24, generator=generator).to(dtype)
    weight = (torch.randn(700, 24, generator=generator) * 0.5).to(dtype)
    bias = torch.randn(700, generator=generator).to(dtype)
    labels = torch.randint(0, 650, (7,), generator=generator)
    best = teacher_topk(
        hidden=hidden,
        weight=weight,
        bias=bias,
        k=12,
        vocab_size=650,
        temperatures=(2.0,),
        labels=labels,
        soft_cap=30.0,
        logit_scale=1.5,
        chunk_bytes=4 * 704 * 3,
    )
    # The logits are float32 even of low-precision inputs: bf16 ones would be full of ties.
    raw = 1.5 * (hidden.float() @ weight.float().t() + bias.float())
    check(best, 30.0 * torch.tanh(raw / 30.0), 12, 650, labels)


def test_ties_go_to_the_lower_id_even_across_tiles() -> None:
    raw = torch.zeros(2, 1000)
    raw[0, [999, 500, 3]] = 1.0
    raw[1] = -0.0
    raw[1, 7] = 0.0  # 0.0 and -0.0 are equal
    best = teacher_topk(logits=raw, k=5)
    assert best.ids.tolist() == [[3, 500, 999, 0, 1], [0, 1, 2, 3, 4]]


def test_order_keys_sort_like_values_then_ids() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, math.inf, -1e30, 1e-40, -1e-40])
    ids = torch.arange(8)
    order = order_keys(values, ids).argsort(descending=True)
    assert order.tolist() == [4, 2, 6, 0, 1, 7, 3, 5]


def test_tail_of_a_certain_teacher_keeps_its_digits() -> None:
    """1 - kept would be 0 or noise here: the tail is 1e-9."""
    raw = torch.full((1, 2000), -20.0)
    raw[0, 5] = 8.0
    best = teacher_topk(logits=raw, k=3, temperatures=(2.0,))
    truth = raw.double().log_softmax(1)[0]
    want = truth[torch.arange(2000) > 5].logsumexp(0)  # ids 0, 1 and 5 are kept; 2, 3, 4 are as the others
    want = torch.logaddexp(want, truth[2:5].logsumexp(0))
    assert float(best.log_tail[0]) == pytest.approx(float(want), rel=1e-6)
    assert float(best.entropy[0]) > 0


def selection_source() -> TopK:
    return teacher_topk(logits=random_logits(9, 500), k=40, temperatures=(2.0,))


def test_top_k_prefix_and_tails() -> None:
    best = selection_source()
    picked = select_top_k(best, 8)
    direct = teacher_topk(logits=random_logits(9, 500), k=8, temperatures=(2.0,))
    assert torch.equal(picked.ids.view(9, 8), direct.ids) and torch.equal(picked.logprobs.view(9, 8), direct.logprobs)
    torch.testing.assert_close(picked.log_tail, direct.log_tail, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(picked.log_tail_at[2.0], direct.log_tail_at[2.0], rtol=1e-6, atol=2e-6)
    assert picked.max_entries >= 8


@pytest.mark.parametrize("p", [1e-6, 0.5, 0.9, 0.999, 1.0])
def test_top_p_k_is_the_smallest_prefix(p: float) -> None:
    best = selection_source()
    picked = select_top_p_k(best, p, 20)
    for n in range(9):
        masses = best.logprobs[n].double().exp()
        size = next((i for i in range(1, 20) if float(masses[:i].sum()) >= p), 20)
        a, b = picked.offsets[n : n + 2].tolist()
        assert b - a == size
        assert torch.equal(picked.ids[a:b], best.ids[n, :size])
        mass = float(picked.logprobs[a:b].double().exp().sum() + picked.log_tail[n].double().exp())
        assert mass == pytest.approx(1.0, abs=2e-6)


def test_tokens_without_a_target_are_empty() -> None:
    valid = torch.tensor([True, False] * 4 + [True])
    picked = select_top_p_k(selection_source(), 0.9, 20, valid=valid)
    counts = picked.offsets.diff()
    assert bool((counts[~valid] == 0).all()) and bool((counts[valid] > 0).all())
    assert bool((picked.log_tail[~valid] == 0).all()) and bool((picked.log_tail_at[2.0][~valid] == 0).all())


def test_ids_that_are_ruled_out_have_no_mass_and_spoil_nothing() -> None:
    """-Inf logits, given or by a bias, against float64 on the ids that are left."""
    raw = random_logits(3, 200)
    bias = torch.zeros(200)
    bias[50:190] = -math.inf  # a whole tile, and parts of others
    labels = torch.tensor([10, 60, -100])
    eye = torch.eye(200)
    for given in ({"logits": raw + bias}, {"hidden": raw, "weight": eye, "bias": bias}):
        best = teacher_topk(k=70, labels=labels, temperatures=(2.0,), **given)  # type: ignore[arg-type]
        z = (raw + bias).double()
        log_p = z.log_softmax(1)
        assert torch.equal(best.ids.long(), full_sort(raw + bias, 70))
        torch.testing.assert_close(
            best.logprobs, log_p.gather(1, best.ids.long()), rtol=2e-6, atol=4e-6, check_dtype=False
        )
        live = torch.where(log_p.isneginf(), 0.0, log_p)
        torch.testing.assert_close(best.entropy, -(log_p.exp() * live).sum(1), rtol=1e-5, atol=2e-5, check_dtype=False)
        torch.testing.assert_close(best.lse_at[2.0], (z / 2).logsumexp(1), rtol=2e-6, atol=4e-6, check_dtype=False)
        assert bool(best.log_tail.isneginf().all()) and bool(best.log_tail_at[2.0].isneginf().all())
        assert best.label_logprob[0].isfinite() and best.label_logprob[1] == -math.inf and best.label_logprob[2] == 0


def test_a_token_without_a_distribution_shows() -> None:
    raw = random_logits(3, 100)
    raw[0] = -math.inf
    raw[1, 7] = math.nan
    best = teacher_topk(logits=raw, k=5)
    assert best.lse[0] == -math.inf and bool(best.entropy[:2].isnan().all()) and bool(best.lse[1].isnan())
    whole = teacher_topk(logits=raw[2:], k=5)
    assert torch.equal(best.ids[2], whole.ids[0]) and torch.equal(best.entropy[2:], whole.entropy)
    assert bool((best.ids >= 0).all() and (best.ids < 100).all())
