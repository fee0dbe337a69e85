"""The head op inside what a trainer puts around it: ZeRO, tied heads, compile, checkpointing, autocast."""

from __future__ import annotations

import math

import pytest
import torch

from potstill.kernels.loss import SelfCheckError, linear_sparse_loss, self_check
from tests.dist_harness import run_ranks
from tests.kernels import zero_worker
from tests.kernels.reference import make_targets


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.xdist_group("ranks")
def test_two_ranks_step_like_one(stage: int, tied: bool) -> None:
    want = zero_worker.step_alone(tied)
    start = zero_worker.build(tied=tied).state_dict()
    results = run_ranks(zero_worker.step_on_rank, stage, tied, world=2)
    for got in results:
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(torch.from_numpy(got[name]), value, rtol=1e-5, atol=1e-6)
            # Without the exchange of gradients the first half alone would have moved it.
            assert float((value - start[name]).abs().max()) > 1e-4, name


def gradients(model: torch.nn.Module, run) -> list[torch.Tensor]:
    batch = zero_worker.whole_batch()
    loss = run(batch, batch["weights"].sum())
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("tied", [False, True])
def test_activation_checkpointing_changes_nothing(tied: bool) -> None:
    plain, recomputed = (zero_worker.build(tied=tied, checkpoint=flag) for flag in (False, True))
    torch.testing.assert_close(gradients(plain, plain), gradients(recomputed, recomputed), rtol=0, atol=0)


def test_compiled_module_meets_the_op_at_a_graph_break() -> None:
    model = zero_worker.build(tied=True)
    # "eager" traces as any compiler does, without a C++ build: the graph break is what is at stake.
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(gradients(model, compiled), gradients(model, model), rtol=1e-6, atol=1e-7)


def test_tied_head_gets_both_gradients() -> None:
    model, batch = zero_worker.build(tied=True), zero_worker.whole_batch()
    model(batch, batch["weights"].sum()).backward()
    untied = zero_worker.build(tied=False)
    untied.embedding.weight.data.copy_(model.embedding.weight.data)
    untied.head.weight.data.copy_(model.embedding.weight.data)
    untied.head.bias.data.zero_()
    untied(batch, batch["weights"].sum()).backward()
    both = untied.embedding.weight.grad + untied.head.weight.grad
    torch.testing.assert_close(model.embedding.weight.grad, both, rtol=1e-6, atol=1e-8)


def test_autocast_runs_in_its_dtype_and_returns_full_gradients() -> None:
    model = zero_worker.build(tied=False)
    truth = gradients(model, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = gradients(model, model)
    assert low[0].dtype == torch.float32
    for got, want in zip(low, truth, strict=True):
        assert got.dtype == torch.float32
        assert float((got - want).norm()) < 2e-2 * float(want.norm())
        assert not torch.equal(got, want)


def test_frozen_parts_get_no_gradient() -> None:
    hidden = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(20, 6)
    targets, labels = make_targets(4, 20, [3]), torch.arange(4)
    loss, _ = linear_sparse_loss(hidden=hidden, weight=weight, targets=targets, labels=labels)
    loss.backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        loss, _ = linear_sparse_loss(hidden=hidden, weight=weight, targets=targets, labels=labels)
    assert not loss.requires_grad


def check_arguments(dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(40, 16, generator=generator).to(dtype).requires_grad_(),
        "weight": torch.randn(90, 16, generator=generator).to(dtype).requires_grad_(),
        "targets": make_targets(40, 90, [7, 0]),
        "labels": torch.randint(0, 90, (40,), generator=generator),
        "token_weights": (torch.arange(40) % 3).float(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "alpha": 0.5, "soft_cap": 20.0},
        {"temperature": 2.0, "alpha": 0.5, "temperature_side": "teacher"},
        {"temperature": 1e-20, "temperature_side": "teacher", "missing_mass": "renorm"},
    ],
)
def test_self_check_passes_on_the_real_path(dtype: torch.dtype, options: dict) -> None:
    given = check_arguments(dtype)
    figures = self_check(**given, **options)
    assert set(figures) == {"loss", "hidden gradient", "weight gradient"}
    assert given["weight"].grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        self_check(**check_arguments(), **options)
    assert self_check(**{**given, "token_weights": torch.zeros(40)}) == {}


def test_self_check_covers_the_bias_and_plain_training() -> None:
    given = check_arguments()
    bias = torch.randn(90, requires_grad=True)
    assert set(self_check(**given, bias=bias)) == {"loss", "hidden gradient", "weight gradient", "bias gradient"}
    assert max(self_check(**{**given, "targets": None}, alpha=0.0).values()) < 1e-5


def test_self_check_takes_a_student_that_is_nearly_its_teacher() -> None:
    """A student with its teacher's weights: the store's grid leaves 3e-4 nats, of which float32 has three digits."""
    import dataclasses

    given = check_arguments()
    with torch.no_grad():
        log_p = (given["hidden"].double() @ given["weight"].double().t()).log_softmax(1)
    best = log_p.topk(30)
    shift = 1 / 32 * (-1.0) ** torch.arange(30, dtype=torch.float64)
    rest = log_p.exp().scatter(1, best.indices, 0.0).sum(1).log()
    targets = dataclasses.replace(
        make_targets(40, 90, [30]),
        ids=best.indices.int().flatten(),
        logprobs=(best.values + shift).float().flatten(),
        log_tail=rest.float(),
    )
    given |= {"targets": targets}
    loss, _ = linear_sparse_loss(**given)
    assert 0 < float(loss.detach()) < 1e-3
    assert self_check(**given)["loss"] < 3e-5


def knows_every_label(loss: float) -> dict:
    """Labels alone, and a student whose every other id is as far below as makes this loss a token."""
    labels = torch.arange(40) % 16
    weight = torch.zeros(90, 16)
    weight[:16] = torch.eye(16)
    scale = math.log(89.0 / math.expm1(loss))
    hidden = scale * torch.nn.functional.one_hot(labels, 16).float()
    leaves = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    return {**leaves, "labels": labels, "token_weights": (torch.arange(40) % 3).float(), "targets": None, "alpha": 0.0}


@pytest.mark.parametrize("loss", [1e-2, 1e-4, 1e-6, 1e-7])
def test_self_check_takes_a_student_that_knows_every_label(loss: float) -> None:
    """Of q - 1 float32 keeps no digit at 1e-7: a run that has learned its task was refused when it was resumed."""
    given = knows_every_label(loss)
    wide = {name: given[name].detach().double() for name in ("hidden", "weight")}
    found, _ = linear_sparse_loss(**{**given, **wide})
    assert float(found) == pytest.approx(loss, rel=1e-5)
    assert max(self_check(**given).values()) < 5e-5


@pytest.mark.parametrize("loss", [1.0, 1e-2, 1e-3])
def test_self_check_catches_an_error_of_a_thousandth_of_a_small_gradient(
    monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    """Above a loss of a hundredth an error counts as ever; below, as one of a hundredth, or of what rounding may do."""
    from potstill.kernels import self_check as checks

    true_loss, given = checks.linear_loss, knows_every_label(loss)
    share = 1e-3 * max(1.0, checks.small_loss(float(given["hidden"].detach().max()), torch.float32) / loss)
    assert share < 0.2
    monkeypatch.setattr(checks, "linear_loss", lambda *a: ((1 + share) * (got := true_loss(*a))[0], got[1]))
    with pytest.raises(SelfCheckError, match="gradient"):
        self_check(**given)


def test_self_check_catches_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake others made: only the kept ids get a gradient, the dense part is dropped."""
    import dataclasses

    from potstill.kernels import backends, rows_torch

    def sparse_only(slab, state, stats, terms, fix, settings):
        none = torch.zeros_like(terms.dense_t)
        terms = dataclasses.replace(terms, dense_t=none, dense_1=none)
        return rows_torch.row_gradient(slab, state, stats, terms, fix, settings)

    two_passes = dataclasses.replace(backends.TORCH.slab_pass, row_gradient=sparse_only)
    broken = dataclasses.replace(backends.TORCH, slab_pass=two_passes)
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda n, d, t: broken if t == torch.float32 else choose(n, d, t))
    with pytest.raises(SelfCheckError, match=r"hidden gradient \d\.\d+e.*limit for float32"):
        self_check(**check_arguments())


def test_self_check_refuses_nonsense_targets() -> None:
    given = check_arguments()
    targets = given["targets"]
    targets.ids[1] = targets.ids[0]
    with pytest.raises(ValueError, match="twice"):
        self_check(**given)
    given = check_arguments()
    with torch.no_grad():
        given["hidden"][:] = float("nan")
    with pytest.raises(SelfCheckError, match="loss inf"):
        self_check(**given)
