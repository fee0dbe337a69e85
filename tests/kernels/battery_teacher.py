"""The teacher's part of kernel_battery.py: the k best ids and their figures beside a sort of everything in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from potstill.kernels.topk import TopK, teacher_topk

BESIDE = 50.0


def in_order(z: Tensor) -> list[int]:
    """Ids of z [V] by (value down, id up)."""
    values = z.tolist()
    return sorted(range(len(values)), key=lambda token: (-values[token], token))


def compare(found: TopK, raw: Tensor, labels: Tensor, *, k: int, vocab_size: int, **options: Any) -> None:
    """AssertionError unless every figure of `found` follows from raw logits [N, head] by its definition."""
    cap, scale = options.get("soft_cap"), options.get("logit_scale", 1.0)
    whole = raw.double() * scale
    whole = whole if cap is None else cap * torch.tanh(whole / cap)
    z = whole[:, :vocab_size]
    for n in range(raw.shape[0]):
        # Capped in float32 two logits may become equal, so the order is that of the values as they were given.
        ids = in_order(raw[n, :vocab_size].float())[:k]
        assert found.ids[n].tolist() == ids, f"ids of row {n}: {found.ids[n].tolist()}, expected {ids}"
        lse = z[n].logsumexp(0)
        near("logprobs", found.logprobs[n], z[n, ids] - lse)
        near("lse", found.lse[n], lse)
        p = (z[n] - lse).exp()
        near("entropy", found.entropy[n], -torch.xlogy(p, p).sum())
        near("excluded_mass", found.excluded_mass[n], 1 - (lse - whole[n].logsumexp(0)).exp())
        label = int(labels[n])
        near("label_logprob", found.label_logprob[n], z[n, label] - lse if label >= 0 else torch.tensor(0.0))
        rank = in_order(raw[n, :vocab_size].float()).index(label) if label >= 0 else 255
        assert int(found.label_rank[n]) == rank, f"rank of row {n}: {int(found.label_rank[n])}, expected {rank}"
        others = torch.ones(vocab_size, dtype=torch.bool)
        others[ids] = False
        for temperature in (1.0, *options.get("temperatures", ())):
            tempered = z[n] / temperature
            tail = tempered[others].logsumexp(0) - tempered.logsumexp(0) if others.any() else torch.tensor(-math.inf)
            at_1 = temperature == 1.0
            near(f"tail at {temperature}", found.log_tail[n] if at_1 else found.log_tail_at[temperature][n], tail)
            if not at_1:
                near(f"lse at {temperature}", found.lse_at[temperature][n], tempered.logsumexp(0))


def near(name: str, found: Tensor, wanted: Tensor) -> None:
    """Within float32 arithmetic, infinities alike."""
    found, wanted = torch.atleast_1d(found.double()), torch.atleast_1d(wanted.double())
    fine = (found == wanted) | ((found - wanted).abs() <= 5e-6 * (1 + wanted.abs()))
    assert bool(fine.all()), f"{name}: {found.tolist()}, expected {wanted.tolist()}"


def check(*, head: int, vocab_size: int, k: int, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """One call on rows between other memory; logits on a coarse grid, so that there are ties within and across tiles."""
    random = torch.Generator().manual_seed(head + k)
    raw = (torch.randn(4, head, generator=random) * 8).round().div(4).to(dtype)
    raw[:, ::7] -= 3.0
    raw[3, :vocab_size] = raw[3, 0]  # all alike
    wide = torch.full((4, head + 11), BESIDE, dtype=dtype)
    view = wide[:, 3 : 3 + head]
    view.copy_(raw)
    labels = torch.tensor([0, vocab_size - 1, -100, vocab_size // 2])
    arguments: dict[str, Any] = {"k": k, "vocab_size": vocab_size, "labels": labels, **options}
    found = teacher_topk(logits=view, backend="triton", **arguments)
    compare(found, raw, labels, k=k, vocab_size=vocab_size, **options)
    assert torch.equal(view, raw) and bool((wide[:, :3] == BESIDE).all()), "the logits, or what lies beside, changed"


def check_ids_and_figures() -> None:
    """Whole tiles and parts of one, one best id and all of them, ids that are left out, three temperatures."""
    for head, vocab_size, k in ((300, 250, 7), (70, 66, 1), (129, 128, 128), (5, 5, 5)):
        check(head=head, vocab_size=vocab_size, k=k, temperatures=(2.0, 0.5))


def check_many_tiles() -> None:
    """More tiles than a step of a program has, and more than are taken."""
    check(head=3000, vocab_size=2950, k=9, temperatures=(2.0,))
    check(head=2111, vocab_size=2111, k=3, dtype=torch.bfloat16)
    check(head=700, vocab_size=690, k=200, dtype=torch.float16)


def check_cap_and_scale() -> None:
    check(head=300, vocab_size=250, k=20, soft_cap=20.0, logit_scale=0.5, temperatures=(2.0,))
    check(head=300, vocab_size=300, k=20, logit_scale=0.5)


def check_ruled_out_ids() -> None:
    """-Inf logits have no mass; a NaN reaches lse."""
    raw = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    raw[0, ::2] = -math.inf
    raw[1, 3:] = -math.inf
    found = teacher_topk(logits=raw, k=5, backend="triton")
    for n, count in ((0, 5), (1, 3)):
        lse = raw[n].double().logsumexp(0)
        near("lse", found.lse[n], lse)
        order = in_order(raw[n])[:5]
        assert found.ids[n].tolist() == order, (found.ids[n].tolist(), order)
        near("logprobs", found.logprobs[n], raw[n, order].double() - lse)
        assert int(torch.isfinite(found.logprobs[n]).sum()) == count
    raw[2, 150] = math.nan
    assert bool(teacher_topk(logits=raw, k=5, backend="triton").lse[2].isnan()), "a NaN does not reach lse"


def check_rows_far_apart() -> None:
    """As of the student's: rows whose offset passes 2^31 elements."""
    stride, width = 2**30 + 64, 200
    view = torch.empty(2 * stride + width, dtype=torch.float16).as_strided((3, width), (stride, 1))
    raw = torch.randn(3, width, generator=torch.Generator().manual_seed(2)).half()
    view.copy_(raw)
    labels = torch.tensor([4, 5, 199])
    compare(teacher_topk(logits=view, labels=labels, k=9, backend="triton"), raw, labels, k=9, vocab_size=width)


TEACHER_CHECKS: dict[str, Callable[[], None]] = {
    "teacher: ids and figures": check_ids_and_figures,
    "teacher: many tiles": check_many_tiles,
    "teacher: cap and scale": check_cap_and_scale,
    "teacher: ruled out ids": check_ruled_out_ids,
    "teacher: rows far apart": check_rows_far_apart,
}
