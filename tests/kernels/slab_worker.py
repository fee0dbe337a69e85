"""Calls the slab passes by themselves, Triton's in the interpreter beside torch's in float64; prints JSON errors.

A process of its own, as interpreted_worker.py says. Cases are what a whole loss does not reach one by one: rows in
place and from a source, a list of rows, weight 0 on rows of NaN, ids and labels that are none, logits of -inf.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from potstill.kernels import one_pass
from potstill.kernels.backend import Backend, SlabTokens
from potstill.kernels.backends import TORCH
from potstill.kernels.divergences import DIVERGENCES, Divergence, Terms, forward_kl
from potstill.kernels.loss import LossSettings
from potstill.kernels.one_pass import LaunchShape, OnePass
from potstill.kernels.rows_triton import TRITON
from potstill.kernels.types import SparseTargetTensors
from tests.kernels.fast_interpreter import patch_once_per_launch
from tests.kernels.reference import make_targets

V, GUARD = 301, 7.0
COUNTS = [3, 17, 0, 9, 1]


def made_up(log_p: Tensor, log_q: Tensor) -> Terms:
    """A divergence that has no twin in Triton: twice the forward KL."""
    value, a = forward_kl(log_p, log_q)
    return 2 * value, 2 * a


def small_rows(backwards: bool = True) -> OnePass:
    """The one pass with tiles of 64 columns, two at a time: 301 columns are whole pairs, a single one and a rest."""
    assert isinstance(TRITON.slab_pass, OnePass)
    shape = LaunchShape(num_warps=1, warp_size=16, loads=2, backwards=backwards)
    return replace(TRITON.slab_pass, shape=lambda *_: shape)


def tokens_of(
    settings: LossSettings,
    targets: SparseTargetTensors | None,
    labels: Tensor,
    dtype: torch.dtype,
    *,
    weights: list[float],
    rows: Tensor | None = None,
    first: int = 0,
) -> SlabTokens:
    """All tokens, those of a list of rows, or those from `first` on."""
    num_tokens = labels.shape[0]
    vector = torch.tensor(weights, dtype=dtype)
    return SlabTokens(
        settings=settings,
        targets=targets,
        labels=labels,
        weights=vector,
        kd_weights=torch.linspace(0.5, 1.5, num_tokens, dtype=dtype),
        factors=torch.tensor(
            [settings.alpha, settings.label_weight, settings.z_loss, settings.off_weight], dtype=dtype
        ),
        width=0 if targets is None else targets.width,
        rows=rows,
        first=first,
        count=num_tokens - first if rows is None else rows.shape[0],
    )


def run(
    backend: Backend, raw: Tensor, tokens: SlabTokens, *, use_source: bool, with_gradient: bool, factor: float | None
) -> dict[str, Tensor]:
    """Figures [15, B] and gradient [B, V] of one call, with guards around both that nothing may touch."""
    dtype = tokens.weights.dtype
    padded = torch.full((tokens.count + 2, V + 19), GUARD, dtype=raw.dtype)
    slab = padded[1:-1, 8 : 8 + V]
    if backend is TORCH:
        slab = torch.empty(slab.shape, dtype=raw.dtype)  # it takes contiguous ones alone
    slab.copy_(torch.full_like(slab, float("nan")) if use_source else tokens.take(raw))
    table = torch.full((17, tokens.count + 3), GUARD, dtype=dtype)
    out = table[1:-1, 1 : 1 + tokens.count]
    source = raw.clone() if use_source else None
    backend.slab_pass(
        slab,
        tokens,
        out=out,
        with_gradient=with_gradient,
        factor=None if factor is None else torch.tensor(factor, dtype=dtype),
        source=source,
    )
    found = {"figures": out.clone(), "gradient": slab.clone() if with_gradient else torch.zeros(0)}
    slab.fill_(GUARD)
    out.fill_(GUARD)
    found["guards"] = torch.cat([padded.flatten(), table.flatten().to(padded.dtype)]) != GUARD
    found["source"] = torch.zeros(0) if source is None else (source != raw) & ~raw.isnan()
    return found


def compare(
    settings: LossSettings,
    *,
    one: OnePass | None = None,
    targets: SparseTargetTensors | None = None,
    labels: list[int] | None = None,
    weights: list[float] | None = None,
    rows: list[int] | None = None,
    first: int = 0,
    use_source: bool = False,
    with_gradient: bool = True,
    factor: float | None = None,
    raw: Tensor | None = None,
) -> dict[str, float | bool]:
    """Largest differences of figures and gradient; where NaN are, they must be in the same places."""
    if raw is None:
        raw = torch.randn(5, V, generator=torch.Generator().manual_seed(5)) * 3
    label = torch.tensor([4, -100, 17, 300, 0] if labels is None else labels)
    results = []
    for backend, dtype in ((TORCH, torch.float64), (replace(TRITON, slab_pass=one or small_rows()), torch.float32)):
        tokens = tokens_of(
            settings,
            targets,
            label,
            dtype,
            weights=weights or [1.0, 0.5, 2.0, 1.0, 0.25],
            rows=None if rows is None else torch.tensor(rows),
            first=first,
        )
        values = raw.to(dtype)
        results.append(run(backend, values, tokens, use_source=use_source, with_gradient=with_gradient, factor=factor))
    truth, found = results
    figures, gradient = (found[name].double() - truth[name].double() for name in ("figures", "gradient"))
    same = [torch.equal(found[name].isnan(), truth[name].isnan()) for name in ("figures", "gradient")]
    return {
        "figures": float((figures.nan_to_num() / (1 + truth["figures"].nan_to_num().abs())).abs().max()),
        "gradient": float(gradient.nan_to_num().abs().max()) if gradient.numel() else 0.0,
        "same_nan": all(same),
        "nan_losses": int(found["figures"][0].isnan().sum()),
        "untouched": not bool(found["guards"].any()) and not bool(found["source"].any()),
    }


def strided(targets: SparseTargetTensors) -> SparseTargetTensors:
    """The same in tensors whose neighbours are not side by side."""

    def spread(value: Tensor) -> Tensor:
        return torch.stack([value, torch.zeros_like(value)], -1)[..., 0]

    return targets.each(lambda axis, value: spread(value), offsets=spread(targets.offsets))


def broken(targets: SparseTargetTensors, token: int, value: int) -> SparseTargetTensors:
    """The targets with one id of a token that is none."""
    ids = targets.ids.clone()
    ids[int(targets.offsets[token]) + 1] = value
    return targets.each(lambda axis, tensor: tensor, ids=ids)


def placement_cases(targets: SparseTargetTensors) -> dict[str, dict]:
    """Where logits come from and what is asked for."""
    kl = LossSettings(alpha=0.7, ce_weight=0.3, z_loss=0.01)
    poisoned = torch.randn(5, V, generator=torch.Generator().manual_seed(6))
    poisoned[1] = float("nan")
    silent = [1.0, 0.0, 2.0, 1.0, 0.25]
    out = {}
    for place, from_source in (("in place", False), ("from a source", True)):
        out[f"all rows {place}"] = compare(kl, targets=targets, use_source=from_source)
        out[f"a list of rows {place}"] = compare(kl, targets=targets, rows=[3, 0, 2], use_source=from_source)
        out[f"later rows {place}"] = compare(kl, targets=targets, first=2, use_source=from_source, factor=0.25)
        out[f"weight 0 on NaN {place}"] = compare(
            kl, targets=targets, weights=silent, raw=poisoned, use_source=from_source
        )
        out[f"no gradient {place}"] = compare(kl, targets=targets, use_source=from_source, with_gradient=False)
    out["strided targets"] = compare(kl, targets=strided(targets))
    out["forwards"] = compare(kl, one=small_rows(backwards=False), targets=targets)
    out["labels alone"] = compare(kl.without_kd())
    out["cap"] = compare(kl.for_head(soft_cap=5.0, logit_scale=0.7), targets=targets, factor=3.0)
    out["two temperatures"] = compare(LossSettings(alpha=0.7, temperature=2.0, z_loss=0.01), targets=targets)
    out["second softmax alone"] = compare(LossSettings(temperature=2.0), targets=targets)
    return out


def peaked(targets: SparseTargetTensors) -> Tensor:
    """Logits whose best is at an entry (tokens 0 and 1), at the label (2, 3), or in the rest (4)."""
    raw = torch.randn(5, V, generator=torch.Generator().manual_seed(9)) * 3
    for token, best in enumerate([int(targets.ids[0]), int(targets.ids[int(targets.offsets[1])]), 17, 300]):
        raw[token, best] = 15.0
    return raw


def input_cases(targets: SparseTargetTensors) -> dict[str, dict]:
    """Inputs at the border of what makes sense."""
    kl = LossSettings(alpha=0.7, ce_weight=0.3, z_loss=0.01)
    out = {}
    masked = torch.randn(5, V, generator=torch.Generator().manual_seed(7))
    masked[:, 100:200] = -float("inf")  # ids that a model never gives, kept ids and labels among them
    masked[4, 1:] = -float("inf")
    for temperature in (1.0, 2.0):
        settings = LossSettings(alpha=0.0, ce_weight=0.3, temperature=temperature)
        out[f"-inf logits T={temperature}"] = compare(settings, targets=targets, raw=masked)
    capped = kl.for_head(soft_cap=5.0, logit_scale=1.0)
    for temperature in (1.0, 2.0):
        settings = LossSettings(alpha=0.7, ce_weight=0.3, z_loss=0.01, temperature=temperature)
        out[f"the best outside the stream T={temperature}"] = compare(settings, targets=targets, raw=peaked(targets))
    out["-inf logits under a cap"] = compare(capped, targets=targets, raw=masked)
    nan = torch.randn(5, V, generator=torch.Generator().manual_seed(8))
    nan[2, 77] = float("nan")
    out["a NaN logit"] = compare(kl, targets=targets, raw=nan)
    nothing = torch.full((5, V), float("nan"))
    nothing[4, int(targets.ids[-1])] = 1.0
    out["a NaN logit and no other in the rest"] = compare(
        kl, targets=targets, raw=nothing, labels=[4, -100, 17, 300, int(targets.ids[-1])], first=4
    )
    out["an id beyond V"] = compare(kl, targets=broken(targets, 1, V))
    out["an id below 0"] = compare(kl, targets=broken(targets, 3, -1))
    out["an id far away"] = compare(kl, targets=broken(targets, 1, 2**31 - 1))
    out["a label beyond V"] = compare(kl, targets=targets, labels=[4, V, 17, 300, 0])
    out["a label far away"] = compare(kl, targets=targets, labels=[4, 2**40, 17, 300, 0])
    empty = make_targets(5, V, [0])
    wide = SparseTargetTensors(offsets=empty.offsets, columns=empty.columns, axes=empty.axes, max_entries=9)
    out["no entries at all"] = compare(kl, targets=wide)
    every = make_targets(5, V, [V])
    out["every id kept"] = compare(kl, targets=every, one=small_rows())
    return out


def two_pass_cases(targets: SparseTargetTensors) -> dict[str, dict]:
    """What takes two passes: a divergence without a twin, and more entries than there are lanes."""
    assert isinstance(DIVERGENCES, dict) and isinstance(TRITON.slab_pass, OnePass)
    DIVERGENCES["made_up"] = Divergence(made_up)
    out = {}
    for mode in ("tail", "label", "raw"):
        for temperature in (1.0, 2.0):
            settings = LossSettings(
                alpha=0.7, ce_weight=0.3, divergence="made_up", missing_mass=mode, temperature=temperature
            )
            out[f"made up {mode} T={temperature}"] = compare(settings, targets=targets, use_source=temperature == 1.0)
    del DIVERGENCES["made_up"]
    one_pass.MAX_LANES = 4
    kl = LossSettings(alpha=0.7, ce_weight=0.3, z_loss=0.01)
    out["more entries than lanes"] = compare(kl, targets=targets, rows=[3, 0, 2])
    out["two passes, an id beyond V"] = compare(kl, targets=broken(targets, 1, V))
    out["two passes, a label beyond V"] = compare(kl, targets=targets, labels=[4, V, 17, 300, 0])
    masked = torch.randn(5, V, generator=torch.Generator().manual_seed(7))
    masked[:, 100:200] = -float("inf")
    out["two passes, -inf logits"] = compare(
        LossSettings(alpha=0.0, ce_weight=0.3, temperature=2.0), targets=targets, raw=masked
    )
    return out


def main() -> None:
    targets = make_targets(5, V, COUNTS, seed=1)
    cases = {**placement_cases(targets), **input_cases(targets), **two_pass_cases(targets)}
    json.dump(cases, sys.stdout)


if __name__ == "__main__":
    patch_once_per_launch()
    main()
