"""The closed forms against float64 autograd: every divergence, temperature, missing mass and mixture."""

from __future__ import annotations

import pytest
import torch

from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.loss import linear_sparse_loss, sparse_loss
from potstill.kernels.settings import TEMPERATURE_SIDES
from potstill.kernels.types import MISSING_MASS_MODES
from tests.kernels.reference import as_draws, make_targets, reference_loss

N, D = 7, 5
MIXES = {"kd": (1.0, 0.0, 0.0), "ce": (0.6, 0.4, 0.0), "z": (0.7, 0.2, 0.01)}
PAIRS = [
    (name, mode, temperature)
    for name, entry in DIVERGENCES.items()
    for mode in entry.modes
    for temperature in (1.0, 2.0, 0.7)
    if not (entry.needs_counts and temperature != 1.0)
]


def batch(vocab_size: int, counts: list[int], *, draws: bool = False, temperature: float = 2.0):
    generator = torch.Generator().manual_seed(1)
    targets = make_targets(N, vocab_size, counts, temperatures=(2.0, 0.7))
    if draws:
        targets = as_draws(targets, 12)
    labels = torch.randint(0, vocab_size, (N,), generator=generator)
    labels[1] = -100
    labels[2] = targets.ids[int(targets.offsets[2])]  # a label that is a kept id
    weights = torch.rand(N, generator=generator) + 0.5
    weights[4] = 0.0
    kd_weights = torch.rand(N, generator=generator) + 0.5
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    head = torch.randn(vocab_size, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    return targets, labels, weights, kd_weights, [x.requires_grad_() for x in (hidden, head, bias)]


def check(arguments: dict, data, *, tolerance: float = 1e-12, chunk_bytes: int = 8 * 200) -> None:
    """linear_sparse_loss and sparse_loss equal the reference in value, sums and gradients."""
    targets, labels, weights, kd_weights, (hidden, head, bias) = data
    raw = hidden @ head.t() + bias
    reference_arguments = dict(arguments)
    options = reference_arguments.pop("divergence_options", None)
    truth, truth_sums = reference_loss(
        raw,
        targets,
        labels,
        weights=weights,
        kd_weights=kd_weights,
        options=options or DIVERGENCES[arguments.get("divergence", "forward_kl")].options,
        **reference_arguments,
    )
    truth = truth / weights.double().sum()
    expected = torch.autograd.grad(truth, (hidden, head, bias, raw))
    shared = dict(arguments, targets=targets, labels=labels, token_weights=weights, kd_weights=kd_weights)
    loss, sums = linear_sparse_loss(hidden=hidden, weight=head, bias=bias, chunk_bytes=chunk_bytes, **shared)
    torch.testing.assert_close(loss, truth, rtol=tolerance, atol=tolerance)
    for got, want in zip(torch.autograd.grad(loss, (hidden, head, bias)), expected, strict=False):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for name, value in truth_sums.items():
        assert float(getattr(sums, name)) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    logits = raw.detach().requires_grad_()
    loss, _ = sparse_loss(logits=logits, **shared)
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(got, expected[3], rtol=tolerance, atol=tolerance)
    if not arguments.get("z_loss") and arguments.get("soft_cap") is None:
        # Every row's gradient sums to zero: a shift of all logits changes no probability.
        assert got.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("divergence", "missing_mass", "temperature"), PAIRS)
def test_equals_autograd(divergence: str, missing_mass: str, temperature: float, mix: str) -> None:
    alpha, ce_weight, z_loss = MIXES[mix]
    data = batch(40, [3, 5, 0, 9], draws=DIVERGENCES[divergence].needs_counts)
    check(
        {
            "alpha": alpha,
            "ce_weight": ce_weight,
            "z_loss": z_loss,
            "temperature": temperature,
            "divergence": divergence,
            "missing_mass": missing_mass,
        },
        data,
        # Float32 tails of the targets make the reference's p_rest differ in the last digits only.
        tolerance=1e-11,
    )


@pytest.mark.parametrize("mix", ["kd", "z"])
@pytest.mark.parametrize(("divergence", "missing_mass", "temperature"), [pair for pair in PAIRS if pair[2] != 1.0])
def test_teacher_side_equals_autograd(divergence: str, missing_mass: str, temperature: float, mix: str) -> None:
    """The targets at T, the student at 1, and no T^2."""
    alpha, ce_weight, z_loss = MIXES[mix]
    check(
        {
            "alpha": alpha,
            "ce_weight": ce_weight,
            "z_loss": z_loss,
            "temperature": temperature,
            "temperature_side": "teacher",
            "divergence": divergence,
            "missing_mass": missing_mass,
        },
        batch(40, [3, 5, 0, 9]),
        tolerance=1e-11,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("missing_mass", MISSING_MASS_MODES)
@pytest.mark.parametrize("mix", [(1.0, 0.0, 0.0), (0.6, 0.4, 0.0), (0.7, 0.2, 0.01)])
def test_off_kd_equals_autograd(mix: tuple[float, float, float], missing_mass: str, temperature: float) -> None:
    """CE takes over where KD is off: at tokens without entries, and where KD weighs 0. A soft weight changes nothing.

    At alpha 1 CE is in the gradient of no other token, and at T 2 and 0.7 the softmax at 1 is wanted for these alone.
    """
    targets, labels, weights, kd_weights, leaves = batch(40, [3, 5, 0, 9])
    kd_weights[[0, 5]] = 0.0
    alpha, ce_weight, z_loss = mix
    settings = {"alpha": alpha, "ce_weight": ce_weight, "z_loss": z_loss, "missing_mass": missing_mass}
    data = (targets, labels, weights, kd_weights, leaves)
    check({**settings, "off_kd": "ce", "temperature": temperature}, data, tolerance=1e-11)


def test_off_kd_makes_a_token_count_as_without_a_teacher() -> None:
    """With ce_weight 1 - alpha: the gradient where KD is off is that of plain next-token training."""
    targets, labels, weights, kd_weights, (hidden, head, bias) = batch(40, [3, 5, 0, 9])
    kd_weights[[0, 5]] = 0.0
    off = (targets.offsets.diff() == 0) | (kd_weights == 0)
    shared = {"labels": labels, "token_weights": weights, "normalizer": torch.tensor(4.0, dtype=torch.float64)}
    grads = []
    for own in (
        {"targets": targets, "alpha": 0.75, "off_kd": "ce", "kd_weights": kd_weights},
        {"targets": None, "alpha": 0.0},
        {"targets": targets, "alpha": 0.75, "kd_weights": kd_weights},
    ):
        logits = (hidden @ head.t() + bias).detach().requires_grad_()
        loss, _ = sparse_loss(logits=logits, **shared, **own)
        grads.append(torch.autograd.grad(loss, logits)[0])
    assert 0 < int(off.sum()) < N
    assert bool(grads[1][off].any())
    torch.testing.assert_close(grads[0][off], grads[1][off], rtol=1e-13, atol=1e-15)
    assert torch.equal(grads[0][~off], grads[2][~off]), "tokens whose KD is on changed"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("side", TEMPERATURE_SIDES)
@pytest.mark.parametrize("z_loss", [0.0, 0.02])
def test_soft_cap_and_scale(temperature: float, side: str, z_loss: float) -> None:
    settings = {"soft_cap": 3.0, "logit_scale": 0.7, "alpha": 0.5, "ce_weight": 0.5, "temperature_side": side}
    check({**settings, "temperature": temperature, "z_loss": z_loss}, batch(40, [3, 5, 0, 9]))


@pytest.mark.parametrize("divergence", ["skew_forward", "skew_reverse"])
@pytest.mark.parametrize("skew", [0.3, 0.9])
def test_skew_option(divergence: str, skew: float) -> None:
    check({"divergence": divergence, "divergence_options": {"skew": skew}}, batch(40, [3, 5]))


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_jsd_option(beta: float) -> None:
    check({"divergence": "jsd", "divergence_options": {"beta": beta}, "temperature": 2.0}, batch(40, [4]))


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 127, 129, 257])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_any_vocabulary(vocab_size: int, temperature: float) -> None:
    data = batch(vocab_size, [1, min(2, vocab_size), min(9, vocab_size)])
    check({"alpha": 0.5, "ce_weight": 0.5, "temperature": temperature}, data, tolerance=1e-10)


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "sampled"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_vocabulary_is_the_dense_divergence(divergence: str, temperature: float) -> None:
    """k = V: no tail, and the loss is the plain divergence of two softmaxes."""
    vocab_size = 12
    targets, labels, weights, kd_weights, leaves = batch(vocab_size, [vocab_size])
    assert bool((targets.log_tail == -torch.inf).all())
    check(
        {"divergence": divergence, "temperature": temperature},
        (targets, labels, weights, kd_weights, leaves),
        tolerance=1e-11,
    )


def test_every_mode_and_divergence_is_named_somewhere() -> None:
    assert {mode for _, mode, _ in PAIRS} == set(MISSING_MASS_MODES)
    assert {name for name, _, _ in PAIRS} == set(DIVERGENCES)


@pytest.mark.parametrize(
    "divergence", ["forward_kl", "reverse_kl", "skew_forward", "skew_reverse", "jsd", "total_variation"]
)
def test_float32_keeps_its_digits_where_the_student_has_next_to_nothing_on_the_kept_ids(divergence: str) -> None:
    """Rows with one or 17 kept ids of 32000: the gradient of each row, dense part and all, is that of float64.

    a_r - A q_r, taken as a difference, loses three to four digits there (a GPU's test of the divergences saw it first).
    """
    vocab_size = 32000
    targets = make_targets(16, vocab_size, [64, 1, 17])
    labels = torch.full((16,), -100)
    raw = torch.randn(16, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    grads = []
    for values in (raw.double(), raw):
        leaf = values.clone().requires_grad_()
        loss, _ = sparse_loss(logits=leaf, targets=targets, labels=labels, divergence=divergence)
        grads.append(torch.autograd.grad(loss, leaf)[0].double())
    error, size = (grads[1] - grads[0]).norm(dim=1), grads[0].norm(dim=1)
    assert bool((size > 0).all()) and float((error / size).max()) < 5e-6
