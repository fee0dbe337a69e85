"""What a call launches on a GPU and that it never waits for one, counted on a CPU in Triton's interpreter.

A launch costs the host up to 30 us, as long as a GPU takes for a hundred rows of 128k logits: a hundred of them per
chunk are a fifth of a step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.launches import HostWaitError, count_launches, no_host_waits
from tests.kernels.test_triton import run_worker

pytest.importorskip("triton")
# Per chunk: logits, slab, two gradients; the gather and the scatter of a list of rows; the bias added to the logits and
# its gradient. Per call, forward and backward: the normaliser, sums, the loss, the gradient of 1 that backward starts
# from, two scales or three; a list of rows is made by five, and its hidden gradient starts as 0.
LIMITS = {"common": (4, 7), "common rows": (6, 13), "common bias": (7, 8)}
# What the one kernel lacks takes two passes and what is between them.
ANY_PER_CHUNK = 40


def check(found: dict[str, Any]) -> None:
    for name, (per_chunk, per_call) in LIMITS.items():
        assert found[name]["per_chunk"] <= per_chunk, (name, found[name]["chunk"])
        assert found[name]["per_call"] <= per_call, (name, found[name]["call"])
    for name, figures in found["any"].items():
        assert figures["per_chunk"] <= ANY_PER_CHUNK, (name, figures["chunk"])
        assert figures["per_call"] <= LIMITS["common"][1], (name, figures["call"])
    assert not {name: wait for name, wait in found["waits"].items() if wait}


def test_launches_and_waits_of_the_common_losses() -> None:
    found = run_worker("launches_worker.py")
    assert len(found["any"]) == 3 and len(found["waits"]) == 7
    check(found)
    # Labels and ids beyond the vocabulary, unread: the loss of their token is NaN, and no other's.
    for changes, unusual in found["beyond"].items():
        assert [number for number, value in enumerate(unusual) if value] == [2 if "label" in changes else 3], changes


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_launches_and_waits_of_every_loss() -> None:
    check(run_worker("launches_worker.py", "all"))


def test_the_counter_counts_kernels_and_no_views() -> None:
    x = torch.randn(4, 6)
    assert not count_launches(lambda: torch.empty(3).new_empty(2))
    assert not count_launches(lambda: x[1:, :3].t().unsqueeze(0).detach())
    assert count_launches(lambda: (x + 1).sum()) == {"add": 1, "sum": 1}
    assert count_launches(lambda: x.t().contiguous()) == {"clone": 1}
    assert count_launches(lambda: torch.where(x > 0, x, 0.0)) == {"gt": 1, "where": 1}
    assert sum(count_launches(lambda: torch.logsumexp(x, 1)).values()) > 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: 1 if x[0] > 0 else 0,
        lambda x: x.nonzero(),
        lambda x: torch.nonzero(x),
        lambda x: x[x > 0],
        lambda x: x.clone().index_put_((x > 0,), torch.tensor(0.0)),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.unique(x),
        lambda x: torch.repeat_interleave(x, x.abs().long()),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.as_tensor([1]),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
    ],
)
def test_every_way_to_wait_is_seen(wait) -> None:
    x = torch.arange(1.0, 5.0)
    with pytest.raises(HostWaitError), no_host_waits():
        wait(x)
    with no_host_waits():
        torch.where(x > 0, x, 0.0)[torch.arange(2)].sum()
        torch.repeat_interleave(x, (x * 0 + 2).long(), output_size=8)
