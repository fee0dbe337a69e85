"""Figures by group of tokens: each group's are those of a call on its tokens alone, whatever the other tokens hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from potstill.kernels.loss import KernelInputError, LossSums, linear_sparse_loss, sparse_loss
from tests.kernels.reference import make_targets

N, V, D = 9, 40, 6
GROUPS = torch.tensor([0, 2, 2, 0, 3, 0, 2, 3, 0])  # 1 has no token


def given() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(N, generator=generator) + 0.5
    weights[[2, 5]] = 0.0  # left out before the first product: the rows of the table are a list then
    return {
        "hidden": torch.randn(N, D, generator=generator, dtype=torch.float64).requires_grad_(),
        "weight": torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_(),
        "targets": make_targets(N, V, [4, 0, 7]),
        "labels": torch.arange(N) - 1,
        "token_weights": weights,
        "alpha": 0.6,
    }


@pytest.mark.parametrize("is_linear", [True, False])
def test_each_group_has_the_figures_of_its_own_tokens(is_linear: bool) -> None:
    call, sums = given(), torch.full((4, 14), -1.0, dtype=torch.float64)
    loss, whole = linear_sparse_loss(**call, groups=GROUPS, group_sums=sums, chunk_bytes=3 * V * 8)
    plain, plain_sums = linear_sparse_loss(**call, chunk_bytes=3 * V * 8)
    assert torch.equal(loss, plain) and torch.equal(whole.stack(), plain_sums.stack())
    if not is_linear:
        logits = (call["hidden"] @ call["weight"].t()).detach().requires_grad_()
        rest = {name: value for name, value in call.items() if name not in ("hidden", "weight")}
        sparse_loss(logits=logits, groups=GROUPS, group_sums=sums, **rest)
    for group in range(4):
        mine = (group == GROUPS).nonzero()[:, 0]
        if len(mine) == 0:
            assert not sums[group].any()
            continue
        own = {**call, "hidden": call["hidden"][mine], "labels": call["labels"][mine]}
        own |= {"targets": call["targets"].select(mine), "token_weights": call["token_weights"][mine]}
        torch.testing.assert_close(sums[group], linear_sparse_loss(**own)[1].stack(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(sums.sum(0), whole.stack(), rtol=1e-12, atol=1e-13)


def test_a_nan_stays_in_its_group() -> None:
    call, sums = given(), torch.zeros(4, 14, dtype=torch.float64)
    hidden = call["hidden"].detach().clone()
    hidden[1] = torch.nan
    linear_sparse_loss(**{**call, "hidden": hidden}, groups=GROUPS, group_sums=sums)
    ce = LossSums.names().index("ce")
    assert sums[:, ce].isnan().tolist() == [False, False, True, False]


def test_groups_that_do_not_fit_are_refused() -> None:
    call, sums = given(), torch.zeros(4, 14, dtype=torch.float64)
    for wrong, message in (
        ({"groups": GROUPS}, "group_sums go together"),
        ({"groups": GROUPS[:3], "group_sums": sums}, "groups has shape"),
        ({"groups": GROUPS, "group_sums": sums[:, :3]}, "group_sums has shape"),
        ({"groups": GROUPS, "group_sums": sums.float()}, "group_sums"),
    ):
        with pytest.raises(KernelInputError, match=message):
            linear_sparse_loss(**call, **wrong)
