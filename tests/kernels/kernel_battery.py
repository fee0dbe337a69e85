"""Comparisons of the Triton kernels with the definitions, in Triton's interpreter; made to notice any slip in them.

A process of its own (see interpreted_worker.py): `python kernel_battery.py [--first] [CHECK ..]` prints JSON,
{"kernels": folder of the kernels that ran, "checks": their number, "failed": {check: what}}, and ends with 1 if a check
failed. --first: stop there; CHECK: names of those to begin with. test_mutants.py runs it against kernels with planted
faults, each of which must fail a check.

Expected values are float64 by autograd from reference.py, by brute force for the teacher; nothing comes from the code
of the kernels room. Logits, rows and vocabularies are small, and tiles too, so that a row has several and a rest.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
import inspect
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import backends, loss_call, one_pass, rows_triton
from potstill.kernels.loss import LossSums, SparseTargetTensors, linear_sparse_loss, sparse_loss
from tests.kernels.battery_teacher import TEACHER_CHECKS
from tests.kernels.fast_interpreter import patch_once_per_launch
from tests.kernels.reference import as_draws, as_weights, make_targets, reference_loss

# In the interpreter what is masked out is computed too, and its overflows are no fault.
warnings.simplefilter("ignore", RuntimeWarning)

COUNTS = (3, 17, 0, 9, 1, 17)
TOKENS, VOCAB = 6, 200
WEIGHTS = (1.0, 0.5, 2.0, 1.5, 0.25, 3.0)
KD_WEIGHTS = (1.0, 2.0, 0.5, 0.75, 1.25, 1.5)
KD_OFF = (1.0, 0.0, 0.5, 0.75, 0.0, 1.5)  # off at tokens with a target; the token of no entry is off by itself
# All weights differ from each other, so that none can stand for another.
TERMS: dict[str, Any] = {"alpha": 0.7, "ce_weight": 0.4, "z_loss": 0.03}
NORMALIZER = 0.5  # its inverse goes to the kernel with the gradient, and is divided out again
BESIDE = 50.0  # in memory next to the logits: far above them, so that one of it that is read shows at once
LIMIT = {torch.float32: 2e-6, torch.float16: 1.1e-3, torch.bfloat16: 0.016}


class Wrong(AssertionError):
    """A check that failed, and by how much."""


def small_tiles(*_: Any) -> one_pass.LaunchShape:
    """One warp a row: tiles of 128 float32 or 256 float16 logits."""
    return one_pass.LaunchShape(num_warps=1, loads=1)


def use_small_tiles(*, two_passes: bool = False) -> None:
    """The backend "triton" from here on: with small tiles, and with two passes if asked for."""
    rows_triton.MAX_BLOCK = rows_triton.HALF_BLOCK = 256
    whole = rows_triton.TRITON.slab_pass
    assert isinstance(whole, one_pass.OnePass)
    chosen = whole.otherwise if two_passes else dataclasses.replace(whole, shape=small_tiles)
    small = dataclasses.replace(rows_triton.TRITON, slab_pass=chosen)
    backends.BACKENDS["triton"] = lambda: small  # type: ignore[index]


def labels_for(targets: Any, vocab_size: int) -> Tensor:
    """Labels that are the best entry, the last one, none of them, the last id, and one that is missing."""
    labels = torch.tensor([0, 0, vocab_size - 1, -100, 0, vocab_size // 2])
    labels[0] = targets.ids[int(targets.offsets[1]) - 1]
    labels[1] = targets.ids[int(targets.offsets[1])]
    labels[4] = vocab_size - 1 if int(targets.ids[int(targets.offsets[4])]) != vocab_size - 1 else vocab_size - 2
    return labels.clamp_max(vocab_size - 1)


def on_the_grid(targets: SparseTargetTensors) -> SparseTargetTensors:
    """As a store has them, in steps of 1/16: entries and tail then sum to 1 only nearly."""

    def rounded(value: Tensor) -> Tensor:
        return value.mul(16).round().div(16)

    return targets.each(lambda axis, value: rounded(value) if value.is_floating_point() else value)


def logits_for(vocab_size: int, seed: int = 0) -> Tensor:
    """float32 [TOKENS, V], each row at a level of its own, whose largest value may stand anywhere."""
    raw = torch.randn(TOKENS, vocab_size, generator=torch.Generator().manual_seed(seed + vocab_size)) * 3
    raw[2:, -3:-2] = 11.0  # a row's largest comes late
    return raw + torch.tensor([0.0, 3.0, -5.0, 8.0, 1.0, -2.0])[:, None]


def figures(raw: Tensor, targets: Any, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """The sums [14] of LossSums that the reference does not give, from their definitions; NaN for those it does."""
    weights = torch.tensor(options.get("weights", WEIGHTS), dtype=torch.float64)
    kd_weights = torch.tensor(options.get("kd_weights", KD_WEIGHTS), dtype=torch.float64)
    cap, scale = options.get("soft_cap"), options.get("logit_scale", 1.0)
    z = raw.double() * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    has_label = labels >= 0
    has_target = torch.zeros(TOKENS, dtype=torch.bool) if targets is None else targets.offsets.diff() > 0
    first = [int(targets.ids[targets.offsets[n]]) if has_target[n] else 0 for n in range(TOKENS)]
    if options.get("missing_mass") == "label":
        has_target = has_target & has_label
    best, own = z.amax(1), torch.arange(TOKENS)
    agrees = has_target & (z[own, torch.tensor(first)] >= best)
    correct = has_label & (z[own, labels.clamp_min(0)] >= best)
    named = {
        "z": weights * z.logsumexp(1).square(),
        "weight": weights,
        "kd_weight": weights * kd_weights * has_target,
        "agreement": weights * agrees,
        "correct": weights * correct,
        "target_weight": weights * has_target,
        "label_weight": weights * has_label,
        "num_targets": (has_target & (weights != 0)).double(),
        "num_labels": (has_label & (weights != 0)).double(),
    }
    # NaN in a row that has no weight must not count.
    return torch.tensor(
        [
            float(torch.where(weights != 0, named[name], 0.0).sum()) if name in named else math.nan
            for name in LossSums.names()
        ]
    )


def expected(raw: Tensor, targets: Any, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient [N, V], sums [14]) of the definitions in float64."""
    leaf = raw.double().requires_grad_()
    weights = torch.tensor(options.pop("weights", WEIGHTS))
    kd_weights = torch.tensor(options.pop("kd_weights", KD_WEIGHTS))
    given = {**TERMS, **options}
    loss, parts = reference_loss(leaf, targets, labels, weights=weights, kd_weights=kd_weights, **given)
    (grad,) = torch.autograd.grad(loss, leaf)
    own = {**options, "weights": weights.tolist(), "kd_weights": kd_weights.tolist()}
    sums = figures(raw, targets, labels, own)
    for place, name in enumerate(LossSums.names()):
        if name in parts:
            sums[place] = parts[name]
    return loss.detach(), grad, sums.double()


def call(
    raw: Tensor, targets: Any, labels: Tensor, *, inplace: bool = False, upstream: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the kernels; `upstream`: of the gradient that comes from above, divided out again."""
    names = {"options": "divergence_options"}
    options = {names.get(name, name): value for name, value in options.items()}
    weights, kd_weights = options.pop("weights", WEIGHTS), options.pop("kd_weights", KD_WEIGHTS)
    leaf = raw.detach().requires_grad_()
    loss, sums = sparse_loss(
        logits=leaf,
        targets=targets,
        labels=labels,
        inplace=inplace,
        backend="triton",
        token_weights=None if weights is None else torch.tensor(weights),
        kd_weights=torch.tensor(kd_weights),
        normalizer=torch.tensor(NORMALIZER),
        **{**TERMS, **options},
    )
    (grad,) = torch.autograd.grad(loss * upstream, leaf)
    return loss.detach().double() * NORMALIZER, grad.double() * NORMALIZER / upstream, sums.stack().double()


def compare(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], limit: float) -> None:
    """Raises Wrong unless loss, every entry of the gradient and every figure agree."""
    (got, got_grad, got_sums), (loss, grad, sums) = found, wanted
    if not float((got - loss).abs()) <= 3e-6 * float(loss.abs()) + 1e-6:
        raise Wrong(f"loss {float(got):.9g}, expected {float(loss):.9g}")
    error = (got_grad - grad).abs() - limit * (1 + grad.abs())
    if not bool((error <= 0).all()):
        row, column = divmod(int(error.nan_to_num(math.inf).argmax()), grad.shape[1])
        raise Wrong(f"gradient at {row, column}: {float(got_grad[row, column])}, expected {float(grad[row, column])}")
    for name, a, b in zip(LossSums.names(), got_sums.tolist(), sums.tolist(), strict=True):
        if not abs(a - b) <= 5e-6 * (1 + abs(b)):
            raise Wrong(f"sum {name} is {a}, expected {b}")


def check(
    *,
    vocab_size: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    kind: str = "logprobs",
    shift: float = 0.0,
    limit: float | None = None,
    least: float | None = None,
    layouts: tuple[str, ...] = ("copy",),
    **options: Any,
) -> None:
    """One setting, in each of the layouts: a copy, in place between other memory, with all rows alike or a list."""
    targets = on_the_grid(make_targets(TOKENS, vocab_size, [min(vocab_size, n) for n in COUNTS], seed=vocab_size))
    if least is not None:  # of each token's last entry
        targets.logprobs[targets.offsets[1:][targets.offsets.diff() > 0] - 1] = least
    labels = labels_for(targets, vocab_size)
    made: dict[str, Callable[[Any], Any]] = {"draws": lambda t: as_draws(t, 40), "weights": as_weights}
    made |= {"logprobs": lambda t: t, "none": lambda t: None}
    given = made[kind](targets)
    raw = (logits_for(vocab_size).mul(256).round() / 256 + shift).to(dtype)
    wanted = expected(raw, given, labels, **options)
    limit = LIMIT[dtype] if limit is None else limit
    for layout in layouts:
        own, here = {**options, "upstream": 1.0 if layout == "copy" else 4.0}, wanted
        if layout == "in place" and "weights" not in options:
            # Without weights there is no list of rows, and the slab is the gradient itself.
            own["weights"] = None
            here = expected(raw, given, labels, **options, weights=(1.0,) * TOKENS)
        if layout == "copy":
            compare(call(raw, given, labels, **own), wanted, limit)
            continue
        if layout == "in place":  # rows side by side, as the slab itself must have them to be the gradient too
            wide = torch.full((TOKENS * vocab_size + 48,), BESIDE, dtype=dtype)
            view = wide[16:-32].view(TOKENS, vocab_size)
        else:
            wide = torch.full((TOKENS + 2, vocab_size + 37), BESIDE, dtype=dtype)
            view = wide[1:-1, 5 : 5 + vocab_size]
            own["chunk_bytes"] = 2 * vocab_size * dtype.itemsize  # two rows at a time
        view.copy_(raw)
        compare(call(view, given, labels, inplace=layout == "in place", **own), here, limit)
        view.fill_(BESIDE)
        if not bool((wide == BESIDE).all()):
            raise Wrong("memory beside the logits was written")


LAYOUTS = ("in place", "beside others", "copy")


def loss_checks() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every setting of the loss from logits, by name. What most faults show in comes first."""

    def case(name: str, **options: Any) -> tuple[str, Callable[[], None]]:
        return name, lambda: check(**options)

    yield case("plain", layouts=LAYOUTS)
    uneven = (1.0, 0.0, 2.0, 1.5, 0.0, 3.0)
    yield case("a list of rows", weights=uneven, layouts=LAYOUTS)
    yield case("temperature", temperature=2.0, layouts=("in place",))
    yield case("teacher's temperature", temperature=2.0, temperature_side="teacher")
    yield case("cap and scale", soft_cap=8.0, logit_scale=0.8, layouts=("in place",))
    yield case("cap, scale and temperature", soft_cap=8.0, logit_scale=0.8, temperature=2.0)
    yield case("scale", logit_scale=0.7)
    yield case("scale and temperature", logit_scale=0.7, temperature=2.0)
    modes = (("label", 1.0), ("label", 2.0), ("raw", 1.0), ("raw", 2.0), ("renorm", 2.0), ("support", 2.0))
    for mode, temperature in modes:
        yield case(f"{mode} at {temperature}", missing_mass=mode, temperature=temperature)
    yield case("KD alone at 2", temperature=2.0, ce_weight=0.0, z_loss=0.0)
    off: dict[str, Any] = {"off_kd": "ce", "kd_weights": KD_OFF}
    yield case("KD off", **off, layouts=LAYOUTS)
    yield case("KD off at 2, nothing beside KD", **off, temperature=2.0, ce_weight=0.0, z_loss=0.0)
    for kind in ("draws", "weights"):
        yield case(kind, kind=kind, divergence="sampled")
    yield case("weights that sum to 1", kind="weights", divergence="sampled", missing_mass="renorm")
    yield case("labels alone", kind="none", alpha=0.0)
    yield case("labels alone, capped", kind="none", alpha=0.0, soft_cap=8.0)
    constants = {"skew_forward": {"skew": 0.2}, "skew_reverse": {"skew": 0.3}, "jsd": {"beta": 0.3}}
    for name in ("reverse_kl", "skew_forward", "skew_reverse", "jsd", "total_variation", "mse_logprobs", "mse_probs"):
        own: dict[str, Any] = {"missing_mass": "raw"} if name == "mse_logprobs" else {}
        yield case(name, divergence=name, **own, **({"options": constants[name]} if name in constants else {}))
    yield case("reverse_kl of next to nothing", divergence="reverse_kl", least=-40.0)
    yield case("label mode of jsd at 2", divergence="jsd", missing_mass="label", temperature=2.0, options={"beta": 0.3})
    for vocab_size, temperature in ((1, 2.0), (2, 1.0), (17, 2.0), (127, 1.0), (128, 2.0), (129, 1.0), (257, 2.0)):
        yield case(f"V = {vocab_size}", vocab_size=vocab_size, layouts=("in place",), temperature=temperature)
    for dtype, cap in ((torch.float16, None), (torch.float16, 8.0), (torch.bfloat16, None)):
        name = f"{str(dtype).removeprefix('torch.')} cap {cap}"
        yield case(name, dtype=dtype, vocab_size=300, soft_cap=cap, layouts=("in place",))
    # Without a shift by the maximum these leave the range of float32. A difference of numbers of 300 (in base 2) has
    # lost 2^-16 of itself.
    yield case("far above 0", shift=192.0, z_loss=0.0, limit=4e-5)
    yield case("far below 0", shift=-192.0, z_loss=0.0, temperature=2.0, limit=4e-5)


def check_rows_of_no_weight() -> None:
    """Rows that do not count may hold anything."""
    targets, raw = make_targets(TOKENS, VOCAB, COUNTS), logits_for(VOCAB)
    labels, weights = labels_for(targets, VOCAB), (1.0, 0.0, 2.0, 0.0, 0.0, 3.0)
    wanted = expected(raw, targets, labels, weights=weights)
    spoilt = raw.clone()
    spoilt[1], spoilt[3, 5], spoilt[4] = math.nan, math.inf, -math.inf
    compare(call(spoilt, targets, labels, weights=weights), wanted, LIMIT[torch.float32])
    compare(call(spoilt.clone(), targets, labels, weights=weights, inplace=True), wanted, LIMIT[torch.float32])
    # A count that is too high, as a bound would be, brings some of them to the kernel.
    for inplace in (False, True):
        found = call(spoilt.clone(), targets, labels, weights=weights, inplace=inplace, num_active=TOKENS - 1)
        compare(found, wanted, LIMIT[torch.float32])


def check_chunks_from_hidden_states() -> None:
    """Chunks of two rows, with and without a list of rows: each row's targets, labels and weights are its own."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator) for shape in ((TOKENS, 8), (VOCAB, 8), (VOCAB,))]
    targets = make_targets(TOKENS, VOCAB, COUNTS)
    labels = labels_for(targets, VOCAB)
    for weights in (None, (1.0, 0.0, 2.0, 1.5, 0.0, 3.0), WEIGHTS):
        wide = [x.double().requires_grad_() for x in leaves]
        of_all = torch.tensor((1.0,) * TOKENS if weights is None else weights)
        loss, _ = reference_loss(
            wide[0] @ wide[1].t() + wide[2], targets, labels, weights=of_all, kd_weights=torch.tensor(KD_WEIGHTS),
            **TERMS,
        )  # fmt: skip
        wanted = torch.autograd.grad(loss, wide)
        own = [x.clone().requires_grad_() for x in leaves]
        found, _ = linear_sparse_loss(
            hidden=own[0], weight=own[1], bias=own[2], targets=targets, labels=labels, backend="triton",
            token_weights=None if weights is None else of_all, kd_weights=torch.tensor(KD_WEIGHTS),
            normalizer=torch.tensor(1.0), chunk_bytes=2 * 4 * VOCAB, **TERMS,
        )  # fmt: skip
        grads = torch.autograd.grad(found * 4.0, own)
        if not abs(float(found.detach()) - float(loss.detach())) <= 1e-5 * float(loss.detach()):
            raise Wrong(f"loss {float(found)}, expected {float(loss)}")
        for name, a, b in zip(("hidden", "weight", "bias"), grads, wanted, strict=True):
            error = float((a.double() / 4.0 - b).norm() / b.norm())
            if not error <= 2e-6:
                raise Wrong(f"gradient of {name} is off by {error:.2e} of its norm")


def check_ties_and_the_largest() -> None:
    """agreement and correct: the largest logit as entry, as label, elsewhere, and equal ones."""
    targets = make_targets(TOKENS, VOCAB, COUNTS)
    labels, raw = labels_for(targets, VOCAB), logits_for(VOCAB)
    first = [int(targets.ids[targets.offsets[n]]) for n in (0, 1, 3, 4, 5)]
    raw[0, first[0]] = raw[1, labels[1]] = raw[2, labels[2]] = 20.0
    raw[3, first[2]] = raw[3, 7] = 21.0  # a tie counts
    raw[4, 8] = 22.0
    raw[5, labels[5]] = raw[5, first[4]] = raw[5, 9] = 23.0
    compare(call(raw, targets, labels), expected(raw, targets, labels), 8e-6)


def check_logits_of_minus_infinity() -> None:
    """A ruled out id is one of no mass; nothing becomes NaN."""
    targets = make_targets(TOKENS, VOCAB, COUNTS)
    labels, raw = labels_for(targets, VOCAB), logits_for(VOCAB)
    out = torch.zeros(TOKENS, VOCAB, dtype=torch.bool)
    out[:, ::3] = True
    out[torch.repeat_interleave(torch.arange(TOKENS), targets.offsets.diff()), targets.ids.long()] = False
    out[torch.arange(TOKENS), labels.clamp_min(0)] = False
    wanted = expected(raw.masked_fill(out, -1e4), targets, labels)
    compare(call(raw.masked_fill(out, -math.inf), targets, labels), wanted, LIMIT[torch.float32])


def check_nan_reaches_the_loss() -> None:
    targets, raw = make_targets(TOKENS, VOCAB, COUNTS), logits_for(VOCAB)
    labels = labels_for(targets, VOCAB)
    for place in ((0, 100), (1, int(targets.ids[3])), (5, VOCAB - 1)):
        spoilt = raw.clone()
        spoilt[place] = math.nan
        with torch.no_grad():
            loss, _ = sparse_loss(logits=spoilt, targets=targets, labels=labels, backend="triton", alpha=0.5)
        if not bool(loss.isnan()):
            raise Wrong(f"a NaN at {place} does not reach the loss")


def check_without_a_gradient() -> None:
    """The same loss and figures, and logits that stay as they are."""
    targets, raw = make_targets(TOKENS, VOCAB, COUNTS), logits_for(VOCAB)
    labels, before = labels_for(targets, VOCAB), raw.clone()
    options: dict[str, Any] = {**TERMS, "targets": targets, "labels": labels, "normalizer": torch.tensor(1.0)}
    options |= {"token_weights": torch.tensor(WEIGHTS), "kd_weights": torch.tensor(KD_WEIGHTS)}
    loss, sums = sparse_loss(logits=raw, backend="triton", **options)
    wanted = expected(raw, targets, labels)
    compare((loss.double(), wanted[1], sums.stack().double()), wanted, LIMIT[torch.float32])
    if not torch.equal(raw, before):
        raise Wrong("the logits changed")


def check_columns_with_strides() -> None:
    """Labels, weights and targets at every second place of their memory, as columns of a table are."""

    def strided(value: Tensor) -> Tensor:
        return torch.stack([value, torch.full_like(value, 3)], -1)[..., 0]

    targets, raw = make_targets(TOKENS, VOCAB, COUNTS), logits_for(VOCAB)
    labels = labels_for(targets, VOCAB)
    apart = targets.each(lambda axis, value: strided(value), offsets=strided(targets.offsets))
    leaf = raw.clone().requires_grad_()
    loss, sums = sparse_loss(
        logits=leaf, targets=apart, labels=strided(labels), backend="triton", normalizer=torch.tensor(1.0),
        token_weights=strided(torch.tensor(WEIGHTS)), kd_weights=strided(torch.tensor(KD_WEIGHTS)), **TERMS,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, leaf)
    found = (loss.detach().double(), grad.double(), sums.stack().double())
    compare(found, expected(raw, targets, labels), LIMIT[torch.float32])


def check_ids_beyond_the_vocabulary() -> None:
    """On a CPU the call refuses them; a GPU cannot look, and the kernel must neither read nor write there."""
    honest = {name: getattr(loss_call, name) for name in ("check_targets", "check_labels")}
    try:
        for name in honest:
            setattr(loss_call, name, lambda *args, **options: None)
        for wrong_id, wrong_label in ((VOCAB, None), (-1, None), (None, VOCAB + 3)):
            targets = make_targets(TOKENS, VOCAB, COUNTS)
            labels = labels_for(targets, VOCAB)
            if wrong_id is not None:
                targets.ids[int(targets.offsets[3]) + 2] = wrong_id
            elif wrong_label is not None:
                labels[3] = wrong_label
            wide = torch.full((TOKENS, VOCAB + 37), BESIDE)
            view = wide[:, 5 : 5 + VOCAB]
            view.copy_(logits_for(VOCAB))
            loss, grad, _ = call(view, targets, labels, weights=None, inplace=True)
            good = torch.arange(TOKENS) != 3
            if not bool(loss.isnan()) or not bool(grad[good].isfinite().all()):
                raise Wrong(f"id {wrong_id}, label {wrong_label}: the loss is {float(loss)}, or other rows are NaN")
            view.fill_(BESIDE)
            if not bool((wide == BESIDE).all()):
                raise Wrong(f"id {wrong_id}, label {wrong_label}: memory beside the logits was written")
    finally:
        for name, function in honest.items():
            setattr(loss_call, name, function)


def check_rows_far_apart() -> None:
    """Rows whose offset passes 2^31 elements, in memory that is only reserved: a short offset ends in another's."""
    stride, vocab_size = 2**30 + 64, 200
    memory = torch.empty(2 * stride + vocab_size, dtype=torch.float16)
    for inplace, weights in ((True, None), (False, (1.0, 0.0, 2.0)), (False, None)):
        view = memory.as_strided((3, vocab_size), (stride, 1))
        raw = logits_for(vocab_size)[:3].half()
        view.copy_(raw)
        targets, labels = make_targets(3, vocab_size, COUNTS), torch.tensor([3, 199, 7])
        own: dict[str, Any] = {"weights": weights, "kd_weights": (1.0, 2.0, 0.5)}
        wanted = call(raw, targets, labels, **own)
        found = call(view, targets, labels, inplace=inplace, **own)
        if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
            raise Wrong(f"rows far apart, in place {inplace}, weights {weights}: not what they give side by side")


def check_two_passes() -> None:
    """The way that a divergence without a Triton twin takes."""
    use_small_tiles(two_passes=True)
    try:
        uneven = (1.0, 0.0, 2.0, 1.5, 0.0, 3.0)
        for options in (
            {"weights": uneven, "logit_scale": 0.7}, {"temperature": 2.0}, {"soft_cap": 8.0, "logit_scale": 0.8},
            {"soft_cap": 8.0, "temperature": 2.0, "missing_mass": "label"},
            {"off_kd": "ce", "kd_weights": KD_OFF, "temperature": 2.0, "ce_weight": 0.0, "z_loss": 0.0},
        ):  # fmt: skip
            check(vocab_size=300, layouts=("in place",), **options)
        for vocab_size in (1, 256, 257):
            check(vocab_size=vocab_size)
    finally:
        use_small_tiles()


OTHER_CHECKS: dict[str, Callable[[], None]] = {
    "rows of no weight": check_rows_of_no_weight,
    "chunks from hidden states": check_chunks_from_hidden_states,
    "ties": check_ties_and_the_largest,
    "minus infinity": check_logits_of_minus_infinity,
    "NaN": check_nan_reaches_the_loss,
    "without a gradient": check_without_a_gradient,
    "columns with strides": check_columns_with_strides,
    "ids beyond the vocabulary": check_ids_beyond_the_vocabulary,
    "rows far apart": check_rows_far_apart,
    "two passes": check_two_passes,
    **TEACHER_CHECKS,
}


def main() -> int:
    patch_once_per_launch()
    use_small_tiles()
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    checks = {**dict(loss_checks()), **OTHER_CHECKS}
    begin = [name for name in sys.argv[1:] if name != "--first"]
    for name, run in ({name: checks[name] for name in begin} | checks).items():
        started = time.monotonic()
        try:
            run()
        except AssertionError as error:  # a Wrong, too
            failed[name] = str(error)
        except Exception:
            failed[name] = f"raised {traceback.format_exc(limit=-4)}"
        seconds[name] = round(time.monotonic() - started, 3)
        if failed and "--first" in sys.argv:
            break
    slow = dict(sorted(seconds.items(), key=lambda item: -item[1])[:8])
    kernels = str(Path(inspect.getfile(one_pass)).parent)
    report = {"kernels": kernels, "checks": len(seconds), "failed": failed, "seconds": sum(seconds.values())}
    # At once: a fault that wrote beside its memory may end the process before Python does.
    print(json.dumps({**report, "slow": slow}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
