"""Every mode of the loss on a GPU, at a vocabulary of today's size, beside torch in float64.

Skips itself without a CUDA device. Run: PYTHONPATH=src python -m pytest tests/gpu -n 8 --dist loadgroup -q
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from potstill.kernels.loss import KernelInputError, LossSums, self_check, token_statistics
from tests.gpu import place
from tests.gpu.place import DEVICE, size
from tests.kernels.reference import as_draws, as_weights, reference_loss

pytestmark = place.marks
VOCAB, TOKENS = size(128256, 1000), size(48, 26)
COUNTS = (64, 1, 0, 17, 255)
TEACHER_ALONE = {"temperature": 2.0, "temperature_side": "teacher"}

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "KD alone": {"alpha": 1.0, "ce_weight": 0.0, "z_loss": 0.0},
    "label": {"missing_mass": "label"},
    "label at 2": {"missing_mass": "label", "temperature": 2.0},
    "raw": {"missing_mass": "raw"},
    "raw at 2": {"missing_mass": "raw", "temperature": 2.0},
    "renorm": {"missing_mass": "renorm"},
    "support": {"missing_mass": "support", "temperature": 2.0},
    "temperature": {"temperature": 2.0},
    "teacher's temperature": TEACHER_ALONE,
    "cap": {"soft_cap": 8.0},
    "cap and scale at 2": {"soft_cap": 8.0, "logit_scale": 0.7, "temperature": 2.0},
    "scale": {"logit_scale": 0.7},
    "reverse_kl": {"divergence": "reverse_kl"},
    "skew_forward": {"divergence": "skew_forward"},
    "skew_reverse": {"divergence": "skew_reverse"},
    "jsd at 2": {"divergence": "jsd", "temperature": 2.0},
    "total_variation": {"divergence": "total_variation"},
    "mse_logprobs": {"divergence": "mse_logprobs", "missing_mass": "raw"},
    "mse_probs": {"divergence": "mse_probs"},
}
COMMON: dict[str, Any] = {"alpha": 0.6, "ce_weight": 0.3, "z_loss": 1e-3}


def logits_of(dtype: torch.dtype, *, num_tokens: int = TOKENS, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return (torch.randn(num_tokens, vocab_size, device=DEVICE, generator=place.generator(seed)) * 3).to(dtype)


def weights_of(num_tokens: int = TOKENS) -> dict[str, Any]:
    """Uneven weights, every fourth token's 0; other weights of the divergence."""
    place_of = torch.arange(num_tokens, device=DEVICE)
    return {"token_weights": (place_of % 4) * 0.5, "kd_weights": 0.25 + (place_of % 3).float()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", list(MODES))
def test_each_mode(mode: str, dtype: torch.dtype) -> None:
    targets = place.targets_of(TOKENS, VOCAB, COUNTS)
    options: dict[str, Any] = {
        **COMMON,
        **MODES[mode],
        "targets": targets,
        "labels": place.labels_of(TOKENS, VOCAB, targets),
    }
    raw = logits_of(dtype)
    place.check_from_logits(raw, **options)
    if dtype == torch.bfloat16:
        place.check_from_logits(raw, **options, **weights_of())


@pytest.mark.parametrize("kind", ["draws", "draws of the teacher's own number", "weights", "weights that sum to 1"])
def test_sampled_targets(kind: str) -> None:
    targets = place.targets_of(TOKENS, VOCAB, COUNTS).to("cpu")
    made = (as_draws(targets, 300) if kind.startswith("draws") else as_weights(targets)).to(DEVICE)
    mode = {"missing_mass": "renorm"} if "sum" in kind else {}
    options: dict[str, Any] = {**COMMON, "divergence": "sampled", "targets": made, **mode}
    place.check_from_logits(logits_of(torch.bfloat16), labels=place.labels_of(TOKENS, VOCAB, targets), **options)


@pytest.mark.parametrize("targets", ["none", "of no weight"])
@pytest.mark.parametrize("soft_cap", [None, 8.0])
def test_labels_alone(soft_cap: float | None, targets: str) -> None:
    given = None if targets == "none" else place.targets_of(TOKENS, VOCAB, COUNTS)
    options: dict[str, Any] = {"alpha": 0.0, "ce_weight": 0.8, "z_loss": 1e-3, "soft_cap": soft_cap, "targets": given}
    labels = place.labels_of(TOKENS, VOCAB)
    place.check_from_logits(logits_of(torch.bfloat16), labels=labels, **options, **weights_of())


@pytest.mark.parametrize("vocab_size", [size(2000, 200), 255])
def test_every_id_is_kept(vocab_size: int) -> None:
    targets = place.targets_of(TOKENS, vocab_size, (vocab_size,))
    labels = place.labels_of(TOKENS, vocab_size, targets)
    raw = logits_of(torch.float32, vocab_size=vocab_size)
    for mode in ("plain", "temperature", "label", "jsd at 2"):
        place.check_from_logits(raw, targets=targets, labels=labels, **COMMON, **MODES[mode])


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 4095, 4097, 32769, 65537, 151937, 262144])
def test_odd_vocabularies(vocab_size: int) -> None:
    """Rows that start at any address and end anywhere in a block."""
    vocab_size = min(vocab_size, size(vocab_size, 5000))
    targets = place.targets_of(TOKENS, vocab_size, COUNTS, period=5)
    labels = place.labels_of(TOKENS, vocab_size, targets)
    raw = logits_of(torch.bfloat16, vocab_size=vocab_size)
    place.check_from_logits(raw, targets=targets, labels=labels, **COMMON)


@pytest.mark.parametrize("mode", ["plain", "temperature", "label", "reverse_kl", "cap"])
def test_an_independent_reference(mode: str) -> None:
    """Float64 autograd through the definitions, token by token, with no code of the kernels room in it."""
    num_tokens = 7
    targets = place.targets_of(num_tokens, VOCAB, COUNTS, period=7)
    labels = place.labels_of(num_tokens, VOCAB, targets)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 3.0, 1.0])
    options: dict[str, Any] = {**COMMON, **MODES[mode]}
    raw = logits_of(torch.float32, num_tokens=num_tokens)
    leaf = raw.double().cpu().requires_grad_()
    loss, sums = reference_loss(leaf, targets.to("cpu"), labels.cpu(), weights=weights, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    got = place.from_logits(
        raw, backend=place.BACKEND, targets=targets, labels=labels, token_weights=weights.to(DEVICE), **options
    )
    assert float(got.loss.cpu() - loss.detach()) == pytest.approx(0, abs=1e-5 * float(loss.detach()))
    assert bool(((got.grads[0].cpu() - grad).abs() <= 2e-6 * grad.abs() + 1e-5 * grad.norm(dim=1, keepdim=True)).all())
    names = LossSums.names()
    for name, value in sums.items():
        assert float(got.sums[names.index(name)]) == pytest.approx(value, rel=2e-5, abs=2e-5), name


def test_tokens_of_no_weight_are_not_read() -> None:
    targets = place.targets_of(TOKENS, VOCAB, COUNTS)
    labels, raw = place.labels_of(TOKENS, VOCAB, targets), logits_of(torch.bfloat16)
    options: dict[str, Any] = {**COMMON, "targets": targets, "labels": labels, **weights_of()}
    clean = place.from_logits(raw, backend=place.BACKEND, **options)
    unused = options["token_weights"] == 0
    for value in (math.nan, math.inf, -math.inf):
        spoilt = raw.masked_fill(unused[:, None], value)
        found = place.from_logits(spoilt, backend=place.BACKEND, **options)
        place.assert_same_bits(found, clean)
        assert bool((found.grads[0][unused] == 0).all())


def test_logits_of_minus_infinity() -> None:
    """An id that a student rules out has no mass: nothing that is summed may become NaN."""
    targets = place.targets_of(TOKENS, VOCAB, (17, 0, 3))
    raw, finite = logits_of(torch.bfloat16), logits_of(torch.bfloat16)
    out = torch.zeros(TOKENS, VOCAB, dtype=torch.bool, device=DEVICE)
    out[:, ::3] = True
    token = torch.repeat_interleave(torch.arange(TOKENS, device=DEVICE), targets.offsets.diff())
    out[token, targets.ids.long()] = False
    labels = torch.arange(TOKENS, device=DEVICE) * 3 + 1
    raw[out], finite[out] = -math.inf, -1e4
    options: dict[str, Any] = {**COMMON, "targets": targets, "labels": labels, "backend": place.BACKEND}
    place.assert_close(place.from_logits(raw, **options), place.from_logits(finite, **options), torch.bfloat16)


@pytest.mark.parametrize("mode", ["plain", "temperature", "label"])
def test_no_entries_at_all_but_a_bound_above_0(mode: str) -> None:
    few = place.targets_of(TOKENS, VOCAB, (0,))
    targets = few.each(lambda axis, value: value, max_entries=20)
    place.check_from_logits(
        logits_of(torch.float32), targets=targets, labels=place.labels_of(TOKENS, VOCAB), **COMMON, **MODES[mode]
    )


@pytest.mark.parametrize("mode", ["plain", "temperature", "label", "cap"])
def test_ids_beyond_the_vocabulary_touch_nothing(mode: str) -> None:
    """Such a token's loss is NaN, which stops a run; what lies beside the logits stays as it is, and so do others.

    On a CPU, where a look at the values is free, the call refuses them.
    """
    space = 64
    wide = torch.full((TOKENS, VOCAB + space), 42.0, dtype=torch.bfloat16, device=DEVICE)
    raw = logits_of(torch.bfloat16)
    targets = place.targets_of(TOKENS, VOCAB, (17, 3))
    labels = place.labels_of(TOKENS, VOCAB)
    options: dict[str, Any] = {
        **COMMON,
        **MODES[mode],
        "normalizer": torch.ones((), device=DEVICE),
        "backend": place.BACKEND,
    }
    clean = place.from_logits(raw, targets=targets, labels=labels, **options)
    ids = targets.ids.clone()
    bad_tokens = [5, 8, 11]
    for n, bad in zip(bad_tokens, (VOCAB, VOCAB + space - 1, -1), strict=True):
        ids[targets.offsets[n]] = bad
    bad_labels = labels.clone()
    bad_labels[20] = VOCAB + 1
    bad_targets = replace(targets, columns={**targets.columns, "ids": ids})
    view = wide[:, :VOCAB]
    for name, given in (("ids", (bad_targets, labels)), ("labels", (targets, bad_labels))):
        view.copy_(raw)
        if place.ON_CPU:
            with pytest.raises(KernelInputError):
                place.from_logits(view, targets=given[0], labels=given[1], inplace=True, **options)
            continue
        found = place.from_logits(view, targets=given[0], labels=given[1], inplace=True, **options)
        assert bool(found.loss.isnan()), name
        assert bool((wide[:, VOCAB:] == 42.0).all()), name
        good = torch.ones(TOKENS, dtype=torch.bool, device=DEVICE)
        good[bad_tokens if name == "ids" else [20]] = False
        assert torch.equal(found.grads[0][good], clean.grads[0][good]), name


def linear_inputs(dtype: torch.dtype, vocab_size: int, num_tokens: int) -> tuple[torch.Tensor, ...]:
    random = place.generator(vocab_size)
    shapes = ((num_tokens, 128), (vocab_size, 128), (vocab_size,))
    hidden, weight, bias = (torch.randn(*shape, device=DEVICE, generator=random) for shape in shapes)
    return hidden.to(dtype), (weight * 0.1).to(dtype), bias.to(dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mode", ["plain", "temperature", "label", "cap", "jsd at 2", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_hidden_states(dtype: torch.dtype, mode: str, with_bias: bool) -> None:
    """Three chunks and a part of one; all gradients beside float64, row by row."""
    num_tokens, vocab_size = size(460, 37), size(32000, 500)
    hidden, weight, bias = linear_inputs(dtype, vocab_size, num_tokens)
    targets = place.targets_of(num_tokens, vocab_size, COUNTS)
    options: dict[str, Any] = {**COMMON, "targets": targets, "labels": place.labels_of(num_tokens, vocab_size, targets)}
    options |= weights_of(num_tokens) if mode == "weights" else MODES[mode]
    inputs = (hidden, weight, *([bias] if with_bias else []))
    want = place.from_hidden(*(x.double() for x in inputs), backend="torch", **options)
    chunk_bytes = size(128, 10) * vocab_size * dtype.itemsize
    got = place.from_hidden(*inputs, backend=place.BACKEND, chunk_bytes=chunk_bytes, **options)
    # bfloat16 logits of size 10 are off by 2^-6, and their probabilities by as much of themselves.
    place.assert_rows_close(got, want, 1e-4 if dtype == torch.float32 else 4e-2)
    if "token_weights" in options:
        assert bool((got.grads[0][options["token_weights"] == 0] == 0).all())


def test_autocast_takes_its_dtype_and_gives_back_float32() -> None:
    num_tokens, vocab_size = size(100, 20), size(32000, 500)
    hidden, weight, _ = linear_inputs(torch.float32, vocab_size, num_tokens)
    targets = place.targets_of(num_tokens, vocab_size, COUNTS)
    options: dict[str, Any] = {
        **COMMON,
        "targets": targets,
        "labels": place.labels_of(num_tokens, vocab_size),
        "temperature": 2.0,
    }
    low = place.from_hidden(hidden.bfloat16(), weight.bfloat16(), backend=place.BACKEND, **options)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = place.from_hidden(hidden, weight, backend=place.BACKEND, **options)
    place.assert_same_bits(found, low)
    leaf = hidden.detach().requires_grad_()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss, _ = place.linear_sparse_loss(hidden=leaf, weight=weight, **options)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.dtype == grad.dtype == torch.float32


@pytest.mark.parametrize("mode", ["plain", "temperature", "label", "reverse_kl", "cap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_statistics(dtype: torch.dtype, mode: str) -> None:
    num_tokens, vocab_size = size(300, 37), size(32000, 500)
    hidden, weight, _ = linear_inputs(dtype, vocab_size, num_tokens)
    targets = place.targets_of(num_tokens, vocab_size, COUNTS)
    options: dict[str, Any] = {
        "targets": targets,
        "labels": place.labels_of(num_tokens, vocab_size, targets),
        **MODES[mode],
    }
    want = token_statistics(hidden=hidden.double(), weight=weight.double(), backend="torch", **options)
    chunk_bytes = size(128, 10) * vocab_size * dtype.itemsize
    got = token_statistics(hidden=hidden, weight=weight, backend=place.BACKEND, chunk_bytes=chunk_bytes, **options)
    limit = 2e-4 if dtype == torch.float32 else 6e-2
    for name in ("label_logprob", "entropy", "divergence", "student_mass"):
        found, wanted = getattr(got, name).double(), getattr(want, name)
        assert found.shape == (num_tokens,)
        assert bool(((found - wanted).abs() <= limit * (1 + wanted.abs())).all()), name


@pytest.mark.parametrize("mode", list(MODES))
def test_self_check_passes_at_each_mode(mode: str) -> None:
    num_tokens, vocab_size = size(64, 20), size(32000, 500)
    hidden, weight, bias = linear_inputs(torch.bfloat16, vocab_size, num_tokens)
    # Tokens 0, 4, 8 .. are chosen: without any entry where the bound of entries is above 0.
    targets = place.targets_of(num_tokens, vocab_size, (0, 17, 3, 255), period=8)
    labels = place.labels_of(num_tokens, vocab_size, targets)
    options: dict[str, Any] = {**COMMON, **MODES[mode], "targets": targets, "labels": labels, "backend": place.BACKEND}
    for bound in (None, bias):
        figures = self_check(hidden=hidden, weight=weight, bias=bound, **options)
        assert set(figures) >= {"loss", "hidden gradient", "weight gradient"}
