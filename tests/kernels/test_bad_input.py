"""Wrong arguments are refused by name, and odd ones have a defined result."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from potstill.kernels.loss import KernelInputError, linear_sparse_loss, sparse_loss, token_statistics
from potstill.kernels.topk import select_sample, select_top_k, select_top_p_k, teacher_topk
from tests.kernels.reference import as_draws, make_targets

N, V, D = 4, 20, 6


def arguments() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(N, D, generator=generator, requires_grad=True),
        "weight": torch.randn(V, D, generator=generator, requires_grad=True),
        "targets": make_targets(N, V, [3]),
        "labels": torch.tensor([1, 2, -100, 4]),
    }


def replaced(**changes):
    def change(given: dict) -> None:
        given["targets"] = dataclasses.replace(given["targets"], **changes)

    return change


def with_entry(name: str, index: int, value) -> object:
    def change(given: dict) -> None:
        column = getattr(given["targets"], name).clone()
        column[index] = value
        given["targets"] = dataclasses.replace(given["targets"], **{name: column})

    return change


BAD = [
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": 3.0}, r"temperature is 3.0, but the targets carry tails for \[2.0\]"),
    (
        {"temperature": 3.0, "temperature_side": "teacher"},
        r"temperature is 3.0, but the targets carry tails for \[2.0\]",
    ),
    ({"temperature_side": "student"}, r"temperature_side is 'student'; expected one of \('both', 'teacher'\)"),
    ({"temperature": 1e-20, "missing_mass": "renorm"}, "1e-20 on both sides; .* Use temperature_side='teacher'"),
    (
        {"temperature": 0.009, "temperature_side": "teacher", "divergence": "mse_logprobs", "missing_mass": "renorm"},
        "temperature is 0.009 with temperature_side 'teacher' and divergence 'mse_logprobs'; expected at least 0.01",
    ),
    ({"alpha": -0.1}, "alpha is -0.1"),
    ({"alpha": 1.5}, "ce_weight is -0.5"),
    ({"z_loss": math.inf}, "z_loss is inf"),
    ({"soft_cap": 0.0}, "soft_cap is 0.0"),
    ({"logit_scale": 0.0}, "logit_scale is 0.0"),
    ({"divergence": "kl"}, "divergence is 'kl'"),
    ({"missing_mass": "ghost"}, "missing_mass is 'ghost'"),
    ({"divergence": "reverse_kl", "missing_mass": "renorm"}, "no finite or sensible value"),
    ({"divergence": "sampled"}, "needs targets.counts"),
    ({"divergence_options": {"skew": 0.1}}, "divergence_options names 'skew'"),
    ({"divergence": "jsd", "divergence_options": {"beta": 1.0}}, "beta is 1.0"),
    ({"targets": None}, "targets is None with alpha 1.0"),
    ({"labels": torch.zeros(N + 1, dtype=torch.int64)}, r"labels has shape \[5\]; expected \[4\]"),
    ({"labels": torch.zeros(N, dtype=torch.int32)}, "labels has dtype int32"),
    ({"labels": torch.full((N,), V)}, "labels hold 20"),
    ({"token_weights": torch.ones(N - 1)}, "token_weights has shape"),
    ({"token_weights": torch.ones(N, dtype=torch.int64)}, "token_weights has dtype int64"),
    ({"kd_weights": torch.ones(N, device="meta")}, "kd_weights is on meta"),
    ({"hidden": torch.zeros(2, 2, D)}, r"hidden has shape \[2, 2, 6\]"),
    ({"hidden": torch.zeros(N, D, dtype=torch.int64)}, "hidden has dtype"),
    ({"hidden": torch.zeros(N, D, dtype=torch.bfloat16)}, "weight has dtype float32; expected bfloat16"),
    ({"weight": torch.zeros(0)}, "under ZeRO-3"),
    ({"bias": torch.zeros(V - 1)}, "bias has shape"),
    ({"normalizer": torch.ones(2)}, "normalizer has shape"),
    ({"chunk_bytes": 0}, "chunk_bytes is 0"),
    ({"num_active": N + 1, "token_weights": torch.ones(N)}, "num_active is 5"),
    ({"backend": "cuda"}, "backend is 'cuda'"),
    ({"backend": "triton"}, "asked for tensors on a CPU"),
    (replaced(offsets=torch.zeros(3, dtype=torch.int64)), "targets.offsets has shape"),
    (replaced(ids=torch.zeros(12, dtype=torch.int64)), "targets.ids has dtype int64"),
    (replaced(logprobs=torch.zeros(3)), "targets.logprobs has shape"),
    (replaced(logprobs=None, counts=torch.ones(12)), "use divergence='sampled'"),
    (replaced(log_tail=torch.zeros(N, dtype=torch.float64)), "targets.log_tail has dtype float64"),
    (with_entry("ids", 4, V), "targets.ids go from"),
    (with_entry("ids", 4, -1), "targets.ids go from -1"),
]
EXPENSIVE = [
    (with_entry("logprobs", 0, 0.5), "targets of token 0 have mass"),
    (with_entry("logprobs", 4, math.nan), "targets of token 1 have mass nan"),
    (with_entry("log_tail", 2, math.nan), "log_tail holds NaN"),
    (with_entry("offsets", 2, 100), "offsets do not run"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refused_by_name(change, message: str) -> None:
    given = arguments()
    change(given) if callable(change) else given.update(change)
    with pytest.raises(KernelInputError, match=message):
        linear_sparse_loss(**given)


@pytest.mark.parametrize(("change", "message"), EXPENSIVE)
def test_refused_on_demand(change, message: str) -> None:
    given = arguments()
    change(given)
    with pytest.raises(KernelInputError, match=message):
        linear_sparse_loss(**given, validate=True)


def test_duplicate_ids_are_found_on_demand() -> None:
    given = arguments()
    with_entry("ids", 4, int(given["targets"].ids[3]))(given)
    with pytest.raises(KernelInputError, match=f"targets of token 1 name id {int(given['targets'].ids[3])} twice"):
        linear_sparse_loss(**given, validate=True)
    linear_sparse_loss(**arguments(), validate=True)


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"'temprature'; did you mean 'temperature'"):
        linear_sparse_loss(**arguments(), temprature=2.0)


def test_options_without_a_meaning_are_refused() -> None:
    given = arguments()
    with pytest.raises(KernelInputError, match="token_weights is given"):
        token_statistics(**given, token_weights=torch.ones(N))
    draws = as_draws(given["targets"], 9)
    with pytest.raises(KernelInputError, match="draws hold at T = 1 only"):
        linear_sparse_loss(**{**given, "targets": draws}, divergence="sampled", temperature=2.0)
    options = {"divergence": "sampled", "temperature": 2.0, "temperature_side": "teacher"}
    with pytest.raises(KernelInputError, match="draws hold at T = 1 only"):
        linear_sparse_loss(**{**given, "targets": draws}, **options)


def test_no_tokens_give_zero() -> None:
    hidden = torch.zeros(0, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    empty = make_targets(N, V, [3]).select(torch.zeros(0, dtype=torch.int64))
    none = torch.zeros(0, dtype=torch.int64)
    loss, sums = linear_sparse_loss(hidden=hidden, weight=weight, targets=empty, labels=none)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert float(loss.detach()) == 0.0 and float(sums.weight) == 0.0 and bool((grads[1] == 0).all())
    value, _ = sparse_loss(logits=torch.zeros(0, V, requires_grad=True), targets=empty, labels=none)
    value.backward()
    assert token_statistics(hidden=hidden, weight=weight, labels=none).entropy.shape == (0,)
    assert teacher_topk(hidden=hidden, weight=weight, k=3, temperatures=(2.0,)).log_tail_at[2.0].shape == (0,)


@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "jsd", "mse_logprobs", "mse_probs", "total_variation"]
)
def test_tokens_without_entries_have_no_kd_loss(divergence: str) -> None:
    given = arguments() | {"targets": make_targets(N, V, [0])}
    loss, sums = linear_sparse_loss(**given, divergence=divergence)
    assert float(loss.detach()) == 0.0 and int(sums.num_targets) == 0 and float(sums.kd_weight) == 0.0
    assert bool((torch.autograd.grad(loss, given["hidden"])[0] == 0).all())


def test_nan_with_a_weight_shows() -> None:
    """A NaN in a token that counts must reach the loss, where the trainer stops on it."""
    given = arguments()
    given["hidden"] = given["hidden"].detach().clone()
    given["hidden"][1, 0] = math.nan
    loss, _ = linear_sparse_loss(**given)
    assert bool(loss.isnan())


def test_alpha_zero_ignores_an_infinite_divergence() -> None:
    given = arguments()
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(1))
    logits[0, int(given["targets"].ids[0])] = -math.inf
    logits.requires_grad_()
    loss, _ = sparse_loss(logits=logits, targets=given["targets"], labels=given["labels"], alpha=0.0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert bool(loss.isfinite()) and bool(grad.isfinite().all())


TEACHER = [
    ({"k": 0}, "k is 0"),
    ({"k": 21}, "k is 21; expected 1 .. 20"),
    ({"k": 3, "vocab_size": 21}, "vocab_size is 21"),
    ({"k": 3, "temperatures": (0.0,)}, "temperatures is 0.0"),
    ({"k": 3, "labels": torch.full((N,), V)}, "labels hold 20"),
    ({"k": 3, "logits": torch.zeros(N, V)}, "both logits and hidden"),
    ({"k": 3, "hidden": None}, "neither logits nor hidden"),
    ({"k": 3, "hidden": torch.zeros(N, D, dtype=torch.int32)}, "hidden has dtype"),
    ({"k": 3, "weight": torch.zeros(V, D + 1)}, r"weight \[20, 7\]"),
    ({"k": 3, "chunk_bytes": 0}, "chunk_bytes is 0"),
]


@pytest.mark.parametrize(("change", "message"), TEACHER)
def test_teacher_refuses_by_name(change: dict, message: str) -> None:
    given = {"hidden": torch.zeros(N, D), "weight": torch.zeros(V, D)} | change
    with pytest.raises(KernelInputError, match=message):
        teacher_topk(**given)


def test_selections_refuse_by_name() -> None:
    best = teacher_topk(logits=torch.randn(N, V), k=5)
    with pytest.raises(KernelInputError, match="k is 6"):
        select_top_k(best, 6)
    with pytest.raises(KernelInputError, match=r"p is 1.5"):
        select_top_p_k(best, 1.5, 5)
    with pytest.raises(KernelInputError, match="valid has dtype"):
        select_top_k(best, 3, valid=torch.ones(N))
    place = torch.arange(N)
    with pytest.raises(KernelInputError, match="num_draws is 256"):
        select_sample(logits=torch.randn(N, V), num_draws=256, seed=0, rows=place, positions=place)
    with pytest.raises(KernelInputError, match="rows has shape"):
        select_sample(logits=torch.randn(N, V), num_draws=5, seed=0, rows=place[:1], positions=place)


def test_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import potstill.kernels.loss, potstill.kernels.topk, torch\n"
        "from potstill.kernels import backends\n"
        "assert backends.choose('auto', torch.device('cpu'), torch.float32).name == 'torch'\n"
        "print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "fine", done.stderr
