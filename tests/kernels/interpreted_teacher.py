"""Runs the teacher's Triton kernels in Triton's interpreter beside the torch way and a sort in float64; prints JSON.

A process of its own: TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from potstill.kernels import teacher_triton
from potstill.kernels.topk import TopK, select_sample, teacher_topk
from tests.kernels.fast_interpreter import patch_once_per_launch

FIGURES = ("logprobs", "lse", "entropy", "label_logprob", "excluded_mass", "log_tail")


def logits(num_tokens: int, head: int, *, coarse: bool = False) -> Tensor:
    raw = torch.randn(num_tokens, head, generator=torch.Generator().manual_seed(head)) * 4
    return (raw * 2).round() / 2 if coarse else raw


def sorted_ids(z: Tensor, k: int) -> Tensor:
    """By (value down, id up), from a stable sort in float64."""
    return torch.sort(z.double(), dim=1, descending=True, stable=True).indices[:, :k].int()


def furthest(found: TopK, expected: TopK) -> float:
    """Largest difference of any figure; inf where one of them is NaN or infinite and the other is not the same."""
    pairs = [(getattr(found, name), getattr(expected, name)) for name in FIGURES]
    pairs += [(found.lse_at[t], expected.lse_at[t]) for t in expected.lse_at]
    pairs += [(found.log_tail_at[t], expected.log_tail_at[t]) for t in expected.log_tail_at]
    worst = 0.0
    for a, b in pairs:
        same = (a == b) | (a.isnan() & b.isnan())
        difference = torch.where(same, 0.0, (a - b).abs())
        worst = max(worst, float(torch.where(difference.isnan(), math.inf, difference).max()) if a.numel() else 0.0)
    return worst


def compare(raw: Tensor, k: int, **options: Any) -> dict[str, Any]:
    """Triton beside torch, and the ids beside a sort of the logits as float32 (without a cap, which rounds)."""
    vocab_size = options.setdefault("vocab_size", raw.shape[1])
    if "labels" not in options:
        options["labels"] = torch.arange(raw.shape[0]) * 37 % vocab_size
        if raw.shape[0] > 1:
            options["labels"][1] = -100
    mine, twin = (teacher_topk(logits=raw, k=k, backend=name, **options) for name in ("triton", "torch"))
    z = raw.float() * options.get("logit_scale", 1.0)
    if options.get("soft_cap"):
        z = options["soft_cap"] * torch.tanh(z / options["soft_cap"])
    wanted = sorted_ids(z[:, :vocab_size], k)
    # A cap is rounded in two ways: then the values in order must agree, and ids may swap where they are nearly equal.
    values = [z.gather(1, ids.long()) for ids in (mine.ids, wanted)]
    distinct = all(len(set(row)) == k for row in mine.ids.tolist())
    return {
        "ids": torch.equal(mine.ids, twin.ids) and torch.equal(mine.ids, wanted),
        "values": float((values[0] - values[1]).abs().nan_to_num().max()) if raw.numel() else 0.0,
        "distinct": distinct,
        "rank": torch.equal(mine.label_rank, twin.label_rank),
        "error": furthest(mine, twin),
    }


def shapes() -> dict[str, dict[str, Any]]:
    out = {}
    for head, vocab_size, k, temperatures in (
        *((1, 1, 1, ()), (2, 1, 1, ()), (64, 64, 64, ()), (65, 60, 20, ()), (70, 66, 7, (0.5, 3.0))),
        *((1000, 900, 20, (2.0, 0.5)), (5003, 4990, 64, (2.0,)), (300, 300, 255, (2.0,)), (20011, 20001, 255, ())),
        *((40000, 39999, 1, (0.5,)), (3000, 64, 5, ())),
    ):
        for coarse in (False, True) if head < 5000 else (False,):
            raw = logits(3, head, coarse=coarse)
            name = f"{head} {vocab_size} {k} {temperatures} coarse={coarse}"
            out[name] = compare(raw, k, vocab_size=vocab_size, temperatures=temperatures)
    return out


def dtypes() -> dict[str, dict[str, Any]]:
    out = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for k in (1, 64, 255) if dtype == torch.bfloat16 else (64,):
            out[f"{dtype} k={k}"] = compare(logits(2, 5000).to(dtype), k, vocab_size=4999, temperatures=(2.0,))
        wide = torch.zeros(3, 1100, dtype=dtype)
        wide[:, 13:1013] = logits(3, 1000)
        out[f"{dtype} rows of a wider tensor"] = compare(wide[:, 13:1013], 20, vocab_size=900)
        turned = logits(3, 500).to(dtype).t().contiguous().t()
        out[f"{dtype} columns apart"] = compare(turned, 20)
        if dtype == torch.float16:
            continue
        capped = {"soft_cap": 5.0, "logit_scale": 0.7, "temperatures": (2.0,)}
        out[f"{dtype} cap"] = compare(logits(2, 3000).to(dtype), 30, vocab_size=2900, **capped)
        out[f"{dtype} scale"] = compare(logits(2, 1000).to(dtype), 30, logit_scale=0.37)
    return out


def ties() -> dict[str, dict[str, Any]]:
    across = torch.zeros(2, 1500)
    across[0, [1499, 1200, 3, 64, 127, 128]] = 1.0
    across[1] = -0.0
    across[1, 7] = 0.0
    edge = logits(2, 4500)
    edge[:, 100:4300:7] = 30.0  # more equal ones than survivors may be, in many tiles
    edge[:, 4499] = 31.0
    level = torch.full((2, 1100), -3.0)
    near = torch.full((2, 1100), 1.0)
    near[:, 1::2] = 1.0000001  # the next float32
    tiny = torch.zeros(2, 300)
    tiny[:, 10], tiny[:, 20], tiny[:, 30] = 1e-45, -1e-45, 1e-40
    labels = torch.tensor([7, 128])
    return {
        f"ties {name} k={k}": compare(raw, k, labels=labels, temperatures=(2.0,))
        for name, raw in {
            "across": across, "edge": edge, "level": level, "near": near, "tiny": tiny,
            "bf16": logits(2, 2000).bfloat16(), "edge bf16": edge.bfloat16(), "negative": -edge.abs(),
        }.items()
        for k in ((5, 255) if name in ("across", "edge") else (64,))
    }  # fmt: skip


def bad_rows() -> dict[str, dict[str, Any]]:
    """-Inf rules out; NaN and +Inf show in lse and entropy. Ids are those of the torch way, the label's rank too."""
    out = {}
    ruled = logits(4, 1000)
    ruled[0, 300:800] = -math.inf
    ruled[1, 3:] = -math.inf
    ruled[2] = -math.inf
    ruled[3, :64] = -math.inf
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out[f"-inf {dtype}"] = compare(ruled.to(dtype), 20, vocab_size=960, temperatures=(2.0,))
    labels = torch.tensor([0, 5, 500, -100])
    for name, value in (("nan", math.nan), ("inf", math.inf)):
        bad = logits(4, 1000)
        bad[0, 17] = bad[1, 990] = bad[2, 500] = value
        found, twin = (
            teacher_topk(logits=bad, k=20, labels=labels, temperatures=(2.0,), vocab_size=960, backend=backend)
            for backend in ("triton", "torch")
        )
        good = teacher_topk(logits=bad[3:], k=20, labels=labels[3:], vocab_size=960, backend="torch")
        rows = torch.tensor([0, 2])
        out[name] = {
            "first": bool((found.ids[rows, 0] == torch.tensor([17, 500])).all()),
            "distinct": all(len(set(row)) == 20 for row in found.ids.tolist()),
            "shown": bool(found.lse[rows].isnan().all() and found.entropy[rows].isnan().all()),
            "shown as in torch": torch.equal(found.lse[:3].isfinite(), twin.lse[:3].isfinite()),
            "others": bool(torch.equal(found.ids[3], good.ids[0]) and abs(found.lse[3] - good.lse[0]) < 1e-6),
        }
    return out


def other_ways() -> dict[str, Any]:
    """From hidden states, in chunks; no tokens; labels that are no ids; draws."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 24, generator=generator)
    weight, bias = torch.randn(701, 24, generator=generator) * 0.5, torch.randn(701, generator=generator)
    bias[100:110] = -math.inf
    out: dict[str, Any] = {}
    for chunk_bytes in (None, 4 * 704 * 3, 1):
        options: dict[str, Any] = {
            "hidden": hidden, "weight": weight, "bias": bias, "k": 12, "vocab_size": 650, "temperatures": (2.0,),
            "labels": torch.arange(7) * 90, "logit_scale": 1.5, "chunk_bytes": chunk_bytes,
        }  # fmt: skip
        mine, twin = (teacher_topk(**options, backend=name) for name in ("triton", "torch"))
        out[f"hidden {chunk_bytes}"] = {
            "ids": torch.equal(mine.ids, twin.ids), "rank": torch.equal(mine.label_rank, twin.label_rank),
            "error": furthest(mine, twin),
        }  # fmt: skip
    raw = logits(6, 900)
    whole, parts = (
        teacher_topk(logits=raw, k=9, temperatures=(2.0,), chunk_bytes=size, backend="triton") for size in (None, 500)
    )
    out["chunks"] = {"ids": torch.equal(whole.ids, parts.ids), "error": furthest(whole, parts)}
    none = teacher_topk(logits=raw[:0], k=9, temperatures=(2.0,), backend="triton")
    out["no tokens"] = {"shapes": [list(none.ids.shape), list(none.lse_at[2.0].shape), list(none.label_rank.shape)]}
    drawn = [
        select_sample(
            logits=raw, num_draws=30, seed=1, rows=torch.arange(6), positions=torch.arange(6), backend=name, power=0.8,
            labels=torch.arange(6) * 7,
        )
        for name in ("triton", "torch")
    ]  # fmt: skip
    out["draws"] = {
        "ids": torch.equal(drawn[0].targets.ids, drawn[1].targets.ids),
        "rank": torch.equal(drawn[0].label_rank, drawn[1].label_rank),
        "error": float((drawn[0].entropy - drawn[1].entropy).abs().max()),
    }
    return out


def wrong_labels() -> dict[str, Any]:
    """Beyond the vocabulary and beyond the head: no figure of another token changes, the token's own shows it."""
    raw, labels = logits(3, 500), torch.tensor([450, 10**12, -7])
    rows = teacher_triton.TeacherRows(raw, labels, 400, (), None, 1.0)
    table = teacher_triton.TopKTable.empty(3, 5, 0, raw.device)
    teacher_triton.TOP_K(rows, 5, table)
    found = table.figures[2]
    return {"nan": found[:2].isnan().tolist(), "none": float(found[2]), "rank": table.label_rank.tolist()}


def costs() -> dict[str, Any]:
    """Launches, and bytes of the tensors that each launch reads, over the bytes of the logits."""
    launches: list[tuple[str, list[Tensor]]] = []
    found = {}
    for name in ("tile_kernel", "select_kernel"):
        kernel = getattr(teacher_triton, name)
        setattr(teacher_triton, name, Recorded(kernel, name, launches))
    raw = logits(1, 128256).bfloat16()
    for temperatures in ((), (2.0,)):
        teacher_topk(logits=raw, k=64, temperatures=temperatures, backend="triton")  # makes the constants, once
        launches.clear()
        operations = Operations()
        with operations:
            teacher_topk(logits=raw, k=64, temperatures=temperatures, backend="triton")
        tile, select = (dict(launches)[name] for name in ("tile_kernel", "select_kernel"))
        stats = tile[3]
        assert select[3] is stats
        candidates = raw.shape[0] * 64 * teacher_triton.TILE * raw.element_size()
        read = raw.numel() * raw.element_size() + stats.numel() * 4 + candidates
        written = stats.numel() * 4
        found[str(temperatures)] = {
            "launches": len(launches), "operations": operations.names,
            "read": read / (raw.numel() * raw.element_size()), "written": written / (raw.numel() * raw.element_size()),
            "copies": [t.dtype != raw.dtype for t in (tile[0], select[0])],
            "same memory": [t.data_ptr() == raw.data_ptr() for t in (tile[0], select[0])],
        }  # fmt: skip
    return found


class Recorded:
    """A kernel that notes its launches and the tensors it was given."""

    def __init__(self, kernel: Any, name: str, launches: list) -> None:
        self._kernel, self._name, self._launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            self._launches.append((self._name, [a for a in arguments if isinstance(a, Tensor)]))
            with torch.utils._python_dispatch._disable_current_modes():  # the interpreter has operations of its own
                self._kernel[grid](*arguments, **options)

        return launch


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes torch operations that would launch something or wait: all but views and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and func.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.empty_strided):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def main() -> None:
    parts = {"shapes": shapes, "dtypes": dtypes, "ties": ties, "bad": bad_rows, "ways": other_ways}
    out = {name: make() for name, make in parts.items()}
    json.dump(out | {"labels": wrong_labels(), "costs": costs()}, sys.stdout)


if __name__ == "__main__":
    patch_once_per_launch()
    main()
