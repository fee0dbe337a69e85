"""Which way a slab goes, on which device; that compiled code serves every number of entries. No kernel runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from potstill.kernels import one_pass, rows_torch, rows_triton
from potstill.kernels.backend import SlabTokens
from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.divergences_triton import TWINS
from potstill.kernels.loss import LossSettings, SparseTargetTensors, linear_sparse_loss, self_check
from potstill.kernels.one_pass import LaunchShape, OnePass, launch_shape
from potstill.kernels.two_passes import TwoPasses
from tests.kernels import aot_rows
from tests.kernels.current_device import Current
from tests.kernels.reference import make_targets

V = 60


def between(compiler: Any) -> TwoPasses:
    one = rows_triton.compiled(compiler).slab_pass
    assert isinstance(one, OnePass) and isinstance(one.otherwise, TwoPasses)
    return one.otherwise


def test_compiled_steps_are_compiled_once_for_every_number_of_entries() -> None:
    """The number of entries changes at every step; past 8 variants torch falls back in silence, or fails.

    64 tokens, and 5 entries or more: torch takes two sizes that are equal at first (with 3 entries, the 4 columns and
    the 4 factors) for one, and compiles once more when they part.
    """
    torch.compiler.reset()
    counter = CompileCounter()
    steps, settings = between(counter), LossSettings(alpha=0.5)
    factors, weights = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.ones(64)
    for k in range(5, 41):
        targets, labels = make_targets(64, V, [k, k - 2, 0, 1], seed=k), torch.arange(64) % V - 1
        fix = steps.build_fix_set(
            targets, labels, torch.arange(64), settings, width=k, vocab_size=V, dtype=torch.float32
        )
        slab = torch.randn(64, V, generator=torch.Generator().manual_seed(k))
        stats, _ = rows_torch.row_stats(slab, fix, settings, keep_exp=False)
        terms = steps.row_terms(stats, fix, settings, factors=factors, weights=weights, kd_weights=weights)
        assert terms.fix_grad.shape == (64, k + 1)
    assert counter.frame_count == 2, "one graph for each of the two functions"
    torch.compiler.reset()


def test_each_divergence_has_a_twin() -> None:
    assert TWINS.keys() == DIVERGENCES.keys()
    assert all(len(entry.options) <= 1 for entry in DIVERGENCES.values()), "the kernel takes one constant"


def without_entries(max_entries: int | None) -> SparseTargetTensors:
    empty = make_targets(6, V, [0])
    return SparseTargetTensors(offsets=empty.offsets, columns=empty.columns, axes=empty.axes, max_entries=max_entries)


def test_targets_without_any_entry_give_the_loss_of_the_labels_alone() -> None:
    """Every document of a batch may lie between the windows that a teacher saw."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (6, V))
    labels = torch.arange(6)
    common = {"hidden": hidden, "weight": weight, "labels": labels, "ce_weight": 0.5}
    alone, _ = linear_sparse_loss(targets=None, alpha=0.0, **common)
    for mode in ("tail", "label"):
        found, sums = linear_sparse_loss(targets=without_entries(9), alpha=0.5, missing_mass=mode, **common)
        torch.testing.assert_close(found, alone)
        assert float(sums.num_targets) == 0.0


def test_the_self_check_may_choose_tokens_without_entries() -> None:
    """It takes every so many tokens: here the ones between those with entries."""
    counts = [0, 5]
    targets = make_targets(32, V, counts)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(32, 8, generator=generator), torch.randn(V, 8, generator=generator)
    errors = self_check(
        hidden=hidden, weight=weight, labels=torch.arange(32), targets=targets, alpha=0.5, backend="torch"
    )
    assert max(errors.values()) < 1e-5


def fake_call(divergence: str, index: int) -> None:
    """One slab of 3 tokens on a GPU that is not there."""
    settings = LossSettings(alpha=0.5, divergence=divergence)
    with FakeTensorMode():
        device = torch.device("cuda", index)
        vector = torch.ones(3, device=device)
        slab, out = torch.empty(3, V, device=device, dtype=torch.bfloat16), torch.empty(15, 3, device=device)
        tokens = SlabTokens(settings, None, torch.ones(3, dtype=torch.int64, device=device), vector, vector,
                            torch.ones(3, device=device), 0, None, 0, 3)  # fmt: skip
        one = OnePass(otherwise=lambda slab, tokens, **options: one_pass.row_kernel[0](), shape=lambda *_: shape)
        shape = launch_shape(V, torch.bfloat16)
        one(slab, tokens, out=out, with_gradient=True)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("divergence", ["forward_kl", "made_up"])
def test_launches_go_to_the_slab_s_device(index: int, divergence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever device is current: a launch elsewhere would hand it pointers of another GPU."""
    current = Current()
    current.stands_in(monkeypatch)
    monkeypatch.setitem(DIVERGENCES, "made_up", DIVERGENCES["jsd"])
    monkeypatch.setattr(one_pass, "row_kernel", current.kernel("row_kernel"))
    fake_call(divergence, index)
    assert current.launches == [("row_kernel", index)]


def test_what_is_compiled_ahead_of_time_is_what_is_launched() -> None:
    large = launch_shape(128256, torch.bfloat16)
    assert large == LaunchShape() and large.num_warps * large.warp_size == aot_rows.THREADS
    assert (large.loads, large.backwards) == (aot_rows.LOADS, aot_rows.BACKWARDS)
