"""The teacher's top k on a GPU: what the interpreter cannot show (barriers, wide loads, real sizes, waits, devices).

Skips itself without a CUDA device. Run: PYTHONPATH=src python -m pytest tests/gpu/test_teacher_gpu.py -q
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from potstill.kernels.topk import TopK, teacher_topk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]


def random_logits(num_tokens: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return (torch.randn(num_tokens, vocab_size, device="cuda", generator=generator) * 3).to(dtype)


def check(best: TopK, z: torch.Tensor, k: int, labels: torch.Tensor, *, head: torch.Tensor | None = None) -> None:
    """Every figure against float64 on z [N, V], the ids against a stable sort; head: z and the columns beyond V."""
    wide = z.double()
    ids = torch.sort(wide, dim=1, descending=True, stable=True).indices
    assert torch.equal(best.ids.long(), ids[:, :k])
    log_p = wide.log_softmax(1)
    close: dict[str, Any] = {"rtol": 3e-6, "atol": 6e-6, "check_dtype": False}
    torch.testing.assert_close(best.logprobs, log_p.gather(1, ids[:, :k]), **close)
    torch.testing.assert_close(best.lse, wide.logsumexp(1), **close)
    live = torch.where(log_p.isneginf(), 0.0, log_p)
    torch.testing.assert_close(best.entropy, -(log_p.exp() * live).sum(1), rtol=1e-5, atol=2e-5, check_dtype=False)
    for temperature, tail in [(1.0, best.log_tail), *best.log_tail_at.items()]:
        rest = (wide / temperature).log_softmax(1).scatter(1, ids[:, :k], -math.inf).logsumexp(1)
        torch.testing.assert_close(tail, rest, rtol=5e-6, atol=1e-5, check_dtype=False)
    for temperature, lse in best.lse_at.items():
        torch.testing.assert_close(lse, (wide / temperature).logsumexp(1), **close)
    has_label = labels >= 0
    label = labels.clamp_min(0)[:, None]
    want = torch.where(has_label, log_p.gather(1, label)[:, 0], 0.0)
    torch.testing.assert_close(best.label_logprob, want, **close)
    rank = (ids == label).long().argmax(1)
    assert torch.equal(best.label_rank.long(), torch.where(has_label, rank, 255))
    if head is not None:
        excluded = head.double().softmax(1)[:, z.shape[1] :].sum(1)
        torch.testing.assert_close(best.excluded_mass, excluded, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("k", [1, 64, 255])
@pytest.mark.parametrize(("head", "vocab_size"), [(128256, 128256), (50257, 50257), (152064, 151669), (300, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_figure_from_logits(dtype: torch.dtype, head: int, vocab_size: int, k: int) -> None:
    raw = random_logits(40, head, dtype)
    labels = torch.arange(40, device="cuda") * 37 % vocab_size
    labels[3] = -100
    best = teacher_topk(logits=raw, k=k, vocab_size=vocab_size, labels=labels, temperatures=(2.0, 0.5))
    check(best, raw[:, :vocab_size], k, labels, head=raw)


@pytest.mark.parametrize("k", [5, 255])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ties_within_and_across_tiles(dtype: torch.dtype, k: int) -> None:
    """More equal values at the bound than survivors may be, in most tiles; a level row; both zeros."""
    raw = random_logits(64, 100000, dtype)
    raw[:, 1000:90000:7] = 30.0
    raw[::2, 99999] = 31.0
    raw[5] = -2.0
    raw[6] = 0.0
    raw[6, 1::2] = -0.0
    raw[7:12] = (raw[7:12] * 2).round() / 2
    labels = torch.arange(64, device="cuda") * 7
    best = teacher_topk(logits=raw, k=k, labels=labels, temperatures=(2.0,))
    check(best, raw, k, labels)


def test_from_bfloat16_hidden_states_in_chunks() -> None:
    """The products are float32, never rounded to bfloat16; the last chunk is a short one."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    place: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(300, 256, generator=generator, **place)
    weight = torch.randn(50304, 256, generator=generator, **place) * 0.2
    bias = torch.randn(50304, generator=generator, **place)
    bias[400:500] = -math.inf
    labels = torch.arange(300, device="cuda") * 11
    options: dict[str, Any] = {"k": 64, "vocab_size": 50257, "labels": labels, "temperatures": (2.0,)}
    best = teacher_topk(hidden=hidden, weight=weight, bias=bias, chunk_bytes=4 * 50304 * 128, **options)
    raw = torch.mm(hidden, weight.t(), out_dtype=torch.float32) + bias.float()
    twin = teacher_topk(logits=raw, **options)
    assert float((best.ids == twin.ids).float().mean()) > 0.999  # another split of the rows may round otherwise
    check(twin, raw[:, :50257], 64, labels, head=raw)
    torch.testing.assert_close(best.lse, twin.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(best.log_tail, twin.log_tail, rtol=1e-4, atol=1e-4)
    assert bool(best.logprobs.double().exp().sum(1).add(best.log_tail.double().exp()).sub(1).abs().max() < 1e-5)


def test_cap_and_scale() -> None:
    raw = random_logits(33, 50257, torch.bfloat16) * 4
    options: dict[str, Any] = {"k": 64, "temperatures": (2.0,), "soft_cap": 15.0, "logit_scale": 0.5}
    best = teacher_topk(logits=raw, **options)
    z = 15.0 * torch.tanh(0.5 * raw.double() / 15.0)
    values = z.gather(1, best.ids.long())
    wanted = torch.sort(z, dim=1, descending=True).values[:, :64]
    torch.testing.assert_close(values, wanted, rtol=0, atol=4e-6)
    torch.testing.assert_close(best.lse, z.logsumexp(1), rtol=3e-6, atol=6e-6, check_dtype=False)


def test_a_view_of_other_rows_is_read_where_it_lies() -> None:
    wide = random_logits(80, 40100, torch.bfloat16)
    view = wide[::2, 17:40017]
    labels = torch.arange(40, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    best = teacher_topk(logits=view, k=20, labels=labels)
    assert torch.cuda.max_memory_allocated() - before < view.numel()  # half of a copy
    check(best, view, 20, labels)


def test_rows_beyond_int32_offsets_and_the_same_at_every_run() -> None:
    num_tokens, vocab_size = 17000, 128256  # 2.18e9 elements
    raw = torch.empty(num_tokens, vocab_size, device="cuda", dtype=torch.bfloat16).normal_()
    labels = torch.arange(num_tokens, device="cuda")
    runs = [teacher_topk(logits=raw, k=64, labels=labels, temperatures=(2.0,)) for _ in range(2)]
    for name in ("ids", "logprobs", "lse", "entropy", "label_logprob", "label_rank", "log_tail"):
        assert torch.equal(getattr(runs[0], name), getattr(runs[1], name)), name
    some = torch.cat([torch.arange(0, num_tokens, 997), torch.tensor([16742, 16743, 16744, 16999])]).cuda()
    part = teacher_topk(logits=raw[some], k=64, labels=labels[some], temperatures=(2.0,))
    check(part, raw[some], 64, labels[some])
    assert torch.equal(part.ids, runs[0].ids[some]) and torch.equal(part.log_tail, runs[0].log_tail[some])


def test_bad_rows_show_and_spoil_no_other() -> None:
    raw = random_logits(8, 128256, torch.bfloat16)
    good = teacher_topk(logits=raw, k=64)
    spoiled = raw.clone()
    spoiled[1, 100000] = math.nan
    spoiled[3, 5] = math.inf
    spoiled[5] = -math.inf
    found = teacher_topk(logits=spoiled, k=64, labels=torch.tensor([0, 1, 2, 200000, 4, 5, 6, 7], device="cuda"))
    assert found.ids[1, 0] == 100000 and found.ids[3, 0] == 5 and found.ids[5].tolist() == list(range(64))
    assert not bool(found.lse[[1, 3, 5]].isfinite().any()) and bool(found.entropy[[1, 3, 5]].isnan().all())
    assert bool(found.label_logprob[3].isnan())  # a label beyond the vocabulary: nothing is read there
    rest = [0, 2, 4, 6, 7]
    assert torch.equal(found.ids[rest], good.ids[rest]) and torch.equal(found.logprobs[rest], good.logprobs[rest])


def test_two_launches_and_no_wait() -> None:
    raw = random_logits(512, 128256, torch.bfloat16)
    labels = torch.zeros(512, dtype=torch.int64, device="cuda")

    def run() -> TopK:
        return teacher_topk(logits=raw, k=64, labels=labels, temperatures=(2.0,))

    run()  # compiles, and makes the constants
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in names if "tile_kernel" in name or "select_kernel" in name]) == 2, names
    assert len(names) <= 3, names


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices in one process; this machine has one")
def test_on_the_second_device_while_the_first_is_current() -> None:
    raw = random_logits(40, 50257, torch.bfloat16)
    here = teacher_topk(logits=raw, k=20, temperatures=(2.0,))
    assert torch.cuda.current_device() == 0
    there = teacher_topk(logits=raw.to("cuda:1"), k=20, temperatures=(2.0,))
    assert there.ids.device == torch.device("cuda", 1)
    assert torch.equal(here.ids, there.ids.to("cuda:0")) and torch.equal(here.log_tail, there.log_tail.to("cuda:0"))
