"""LossSettings: one field per option, checked when made, the same loss whole or in keywords; one entry per backend."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from potstill.kernels import backends
from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.loss import (
    CallOptions,
    KernelInputError,
    LossSettings,
    linear_sparse_loss,
    self_check,
    sparse_loss,
    token_statistics,
)
from potstill.kernels.soft_cap import cap_slope, scale_and_cap_
from tests.kernels.reference import as_draws, make_targets

N, V, D = 6, 30, 8
CHOSEN = {
    "alpha": 0.6,
    "ce_weight": 0.3,
    "off_kd": "ce",
    "temperature": 2.0,
    "temperature_side": "teacher",
    "divergence": "jsd",
    "divergence_options": {"beta": 0.3},
    "missing_mass": "label",
    "z_loss": 0.01,
    "soft_cap": 5.0,
    "logit_scale": 0.7,
}


def given() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(N, D, generator=generator).requires_grad_(),
        "weight": torch.randn(V, D, generator=generator).requires_grad_(),
        "targets": make_targets(N, V, [5, 0, 3]),
        "labels": torch.arange(N),
    }


def test_the_example_names_every_field() -> None:
    assert set(CHOSEN) == {field.name for field in dataclasses.fields(LossSettings)}
    assert all(CHOSEN[field.name] != field.default for field in dataclasses.fields(LossSettings))


@pytest.mark.parametrize("options", [LossSettings, CallOptions])
def test_every_field_is_explained(options: type) -> None:
    assert all(re.search(rf"\b{field.name}\b", str(options.__doc__)) for field in dataclasses.fields(options))


def test_settings_whole_are_the_keywords_bit_for_bit() -> None:
    """Each option matters, so that none can be lost on the way: leaving one out changes the loss."""
    call = given()
    loss, sums = linear_sparse_loss(**call, **CHOSEN)
    whole, whole_sums = linear_sparse_loss(**call, settings=LossSettings(**CHOSEN))
    assert torch.equal(loss, whole) and torch.equal(sums.stack(), whole_sums.stack())
    grads, again = (torch.autograd.grad(value, (call["hidden"], call["weight"])) for value in (loss, whole))
    assert all(map(torch.equal, grads, again))
    for name in CHOSEN:
        kept = {other: value for other, value in CHOSEN.items() if other != name}
        if name == "divergence":
            kept.pop("divergence_options")
        other, _ = linear_sparse_loss(**call, settings=LossSettings(**kept))
        assert float((other - loss).detach().abs()) > 1e-4, name


def test_every_door_takes_them_whole() -> None:
    call, settings = given(), LossSettings(**CHOSEN)
    logits = (call["hidden"] @ call["weight"].t()).detach()
    shared = {"targets": call["targets"], "labels": call["labels"]}
    loss, _ = sparse_loss(logits=logits, settings=settings, **shared)
    assert torch.equal(loss, sparse_loss(logits=logits, **shared, **CHOSEN)[0])
    figures, same = token_statistics(**call, settings=settings), token_statistics(**call, **CHOSEN)
    assert torch.equal(figures.divergence, same.divergence) and torch.equal(figures.entropy, same.entropy)
    assert self_check(**call, settings=settings) == self_check(**call, **CHOSEN)


def test_an_option_beside_the_settings_is_refused() -> None:
    with pytest.raises(TypeError, match=r"\['alpha'\] given beside settings"):
        linear_sparse_loss(**given(), settings=LossSettings(), alpha=0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "ce_weight is -0.5"),
        ({"temperature": 1e-20}, "on both sides"),
        ({"missing_mass": "raw", "divergence": "reverse_kl"}, "no finite or sensible value"),
        ({"divergence": "sampled", "temperature": 2.0}, "draws hold at T = 1 only"),
        ({"divergence_options": {"beta": 0.5}}, "divergence_options names 'beta'; 'forward_kl' knows none"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
        ({"off_kd": "label"}, "off_kd is 'label'; expected one of"),
    ],
)
def test_checked_when_made_and_when_changed(change: dict, message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        LossSettings(**change)
    with pytest.raises(KernelInputError, match=message):
        dataclasses.replace(LossSettings(), **change)


def test_the_label_weight_follows_alpha_until_it_is_given() -> None:
    settings = LossSettings(alpha=0.9)
    assert settings.label_weight == 1.0 - 0.9
    assert dataclasses.replace(settings, alpha=0.25).label_weight == 0.75
    assert LossSettings(alpha=0.9, ce_weight=2).label_weight == 2.0


def test_ce_in_place_of_kd_needs_the_softmax_at_1() -> None:
    alone = LossSettings(alpha=1.0, temperature=2.0)
    assert not alone.plain_gradient and alone.off_weight == 0.0
    settings = dataclasses.replace(alone, alpha=0.9, ce_weight=0.0, off_kd="ce")
    assert settings.plain_gradient and settings.off_weight == 0.9
    assert not dataclasses.replace(settings, alpha=0.0).plain_gradient


def test_the_student_is_tempered_on_both_sides_only() -> None:
    assert LossSettings(temperature=2).student_temperature == 2.0
    assert LossSettings(temperature=2, temperature_side="teacher").student_temperature == 1.0


@pytest.mark.parametrize(("off_kd", "beyond"), [("nothing", 0.0), ("ce", CHOSEN["alpha"])])
def test_without_the_kd_term_it_is_the_loss_on_labels(off_kd: str, beyond: float) -> None:
    call, settings = given(), LossSettings(**{**CHOSEN, "off_kd": off_kd})
    call["targets"] = None
    label = {"ce_weight": CHOSEN["ce_weight"] + beyond}
    plain, _ = linear_sparse_loss(**call, **label, alpha=0.0, z_loss=0.01, soft_cap=5.0, logit_scale=0.7)
    assert torch.equal(linear_sparse_loss(**call, settings=settings.without_kd())[0], plain)


def test_draws_and_log_probabilities_are_told_apart() -> None:
    call = given()
    draws = as_draws(call["targets"], 9)
    neither = dataclasses.replace(call["targets"], logprobs=None)
    for targets, divergence, message in (
        (call["targets"], "sampled", "needs targets.counts or targets.log_weights"),
        (draws, "forward_kl", "use divergence='sampled'"),
        (neither, "sampled", "none of logprobs, counts and log_weights"),
    ):
        with pytest.raises(KernelInputError, match=message):
            linear_sparse_loss(**{**call, "targets": targets}, divergence=divergence)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_the_slope_is_that_of_the_cap(cap: float | None, scale: float) -> None:
    raw = torch.linspace(-40, 40, 81, dtype=torch.float64).requires_grad_()
    z = scale_and_cap_(raw.clone(), logit_scale=scale, soft_cap=cap)
    wanted = scale * raw if cap is None else cap * torch.tanh(scale * raw / cap)
    torch.testing.assert_close(z, wanted, rtol=1e-15, atol=0)
    (slope,) = torch.autograd.grad(wanted.sum(), raw)
    found = torch.as_tensor(cap_slope(z.detach(), logit_scale=scale, soft_cap=cap), dtype=torch.float64)
    torch.testing.assert_close(found.expand(81), slope, rtol=1e-9, atol=1e-13)


def test_a_backend_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slab pass of another make, entered in the table, serves the loss by its name, and nothing else changes."""
    slabs: list[tuple[int, ...]] = []

    def one_launch(slab, tokens, **given):
        slabs.append(tuple(slab.shape))
        backends.TORCH.slab_pass(slab, tokens, **given)

    other = dataclasses.replace(backends.TORCH, name="one_launch", slab_pass=one_launch)
    monkeypatch.setattr(backends, "BACKENDS", {**backends.BACKENDS, "one_launch": lambda: other})
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    call = given()
    loss, _ = linear_sparse_loss(**call, backend="one_launch", chunk_bytes=4 * V * 4)
    assert slabs == [(3, V), (3, V)]
    plain, _ = linear_sparse_loss(**call, chunk_bytes=4 * V * 4)
    assert torch.equal(loss, plain) and len(slabs) == 2
    with pytest.raises(KernelInputError, match=r"expected one of .*'one_launch'"):
        linear_sparse_loss(**call, backend="two_launches")


def test_every_divergence_has_settings() -> None:
    for name, entry in DIVERGENCES.items():
        assert all(LossSettings(divergence=name, missing_mass=mode).entry is entry for mode in entry.modes)
        assert LossSettings(divergence=name).constants == dict(entry.options)
