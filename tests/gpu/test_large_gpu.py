"""Sizes that only a GPU has room for: logits of more than 2^31 elements, and the peak of memory at the design's shape.

Each needs about 10 GB: `--dist loadgroup` (the tests' processes, `-n 8`) runs those of the group "large" one by one.
Skips itself without a CUDA device. Run: PYTHONPATH=src python -m pytest tests/gpu -n 8 --dist loadgroup -q
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from potstill.kernels.loss import linear_sparse_loss, sparse_loss
from tests.gpu import place
from tests.gpu.place import BACKEND, DEVICE, size

pytestmark = [*place.marks, pytest.mark.xdist_group("large")]
TOKENS, VOCAB = size(17000, 170), size(128256, 1282)  # 2.18e9 elements
# On both sides of element 2^31 of contiguous rows, and the ends.
KEPT = size([0, 1, 16743, 16744, 16745, 16998, 16999], [0, 1, 100, 168, 169])
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 2.0},
    "cap": {"soft_cap": 8.0},
    "scale": {"logit_scale": 0.7},
    "label": {"missing_mass": "label"},
    "jsd": {"divergence": "jsd"},
}


@pytest.fixture(autouse=True)
def _give_memory_back() -> Iterator[None]:
    """What torch keeps for later would be missing to the tests of other processes."""
    yield
    if not place.ON_CPU:
        torch.cuda.empty_cache()


def inputs() -> tuple[torch.Tensor, dict[str, Any]]:
    raw = torch.randn(TOKENS, VOCAB, device=DEVICE, dtype=torch.bfloat16, generator=place.generator(0)).mul_(2)
    targets = place.targets_of(TOKENS, VOCAB, (64, 5, 17), period=7)
    labels = torch.arange(TOKENS, device=DEVICE) * 7 % VOCAB
    return raw, {"alpha": 0.5, "z_loss": 1e-3, "targets": targets, "labels": labels}


def expected(raw: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """The gradient of the kept rows alone, in float64."""
    keep = torch.tensor(KEPT, device=DEVICE)
    own = {"targets": options["targets"].select(keep), "labels": options["labels"][keep]}
    if "token_weights" in options:
        own["token_weights"] = options["token_weights"][keep]
    return place.from_logits(raw[keep].double(), backend="torch", **{**options, **own}).grads[0]


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    found = got[torch.tensor(KEPT, device=DEVICE)].double()
    assert bool(((found - want).abs() <= 2.0**-8 * want.abs() + 1e-5 * want.norm(dim=1, keepdim=True)).all())


@pytest.mark.parametrize("mode", list(MODES))
def test_rows_beyond_int32_offsets(mode: str) -> None:
    raw, options = inputs()
    options |= MODES[mode]
    want = expected(raw, options)
    leaf = raw.requires_grad_()
    one = torch.ones((), device=DEVICE)
    loss, _ = sparse_loss(logits=leaf, inplace=True, normalizer=one, backend=BACKEND, **options)
    (got,) = torch.autograd.grad(loss, leaf)
    check(got, want)
    assert bool(loss.isfinite())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_list_of_rows_beyond_int32_offsets(inplace: bool) -> None:
    """Rows are read where they lie and written where they belong; those of weight 0 become 0."""
    raw, options = inputs()
    weights = (torch.arange(TOKENS, device=DEVICE) % 3 != 2).float()
    weights[KEPT] = torch.linspace(0.5, 2.0, len(KEPT), device=DEVICE)
    options |= {"token_weights": weights, "temperature": 2.0}
    want = expected(raw, options)
    leaf = raw.requires_grad_()
    one = torch.ones((), device=DEVICE)
    loss, _ = sparse_loss(logits=leaf, inplace=inplace, normalizer=one, backend=BACKEND, **options)
    (got,) = torch.autograd.grad(loss, leaf)
    check(got, want)
    unused = (weights == 0).nonzero()[:, 0]
    assert not bool(got[unused[-50:]].any()) and not bool(got[unused[:50]].any())


def test_a_row_stride_beyond_int32() -> None:
    """Two rows more than 2^31 elements apart, as rows of a far larger tensor may be."""
    apart = size((1 << 31) + 4096, 1 << 20)
    vocab_size = 1024  # whole 32 bytes, as the stride: kernels for other alignments are compiled apart
    storage = torch.zeros(apart + vocab_size, dtype=torch.bfloat16, device=DEVICE)
    view = storage.as_strided((2, vocab_size), (apart, 1))
    view.copy_(torch.randn(2, vocab_size, device=DEVICE, generator=place.generator(1)) * 3)
    targets = place.targets_of(2, vocab_size, (17, 3))
    options = {"targets": targets, "labels": torch.tensor([5, 900], device=DEVICE), "alpha": 0.5}
    want = place.from_logits(view.contiguous(), backend=BACKEND, **options)
    for inplace in (False, True):
        got = place.from_logits(view, backend=BACKEND, inplace=inplace, **options)
        place.assert_close(got, want, view.dtype)  # a stride of 64 bits is a kernel of its own too


@pytest.mark.parametrize("mode", ["plain", "temperature", "weights"])
def test_peak_of_memory_at_the_design_s_shape(mode: str) -> None:
    """Over the inputs: the head's gradient in float32 and 0.75 GiB, whatever the number of tokens."""
    num_tokens, vocab_size, width = size((8192, 128256, 2048), (64, 1000, 32))
    random = place.generator(2)
    hidden = torch.randn(num_tokens, width, device=DEVICE, generator=random).bfloat16().requires_grad_()
    weight = torch.randn(vocab_size, width, device=DEVICE, generator=random).mul_(0.02).bfloat16().requires_grad_()
    targets = place.targets_of(num_tokens, vocab_size, (64,), period=7)
    options: dict[str, Any] = {"alpha": 0.5, "targets": targets, "backend": BACKEND}
    options |= {"labels": torch.arange(num_tokens, device=DEVICE) * 7 % vocab_size}
    if mode == "weights":
        options |= {"token_weights": (torch.arange(num_tokens, device=DEVICE) % 8 != 0).float()}
        options |= {"num_active": num_tokens * 7 // 8}
    elif mode == "temperature":
        options |= {"temperature": 2.0}

    def step() -> None:
        loss, _ = linear_sparse_loss(hidden=hidden, weight=weight, **options)
        loss.backward()

    step()  # kernels and the products' workspace are there now
    hidden.grad = weight.grad = None
    if place.ON_CPU:
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= weight.numel() * 4 + 0.75 * 2**30, f"peak over inputs {peak / 2**30:.3f} GiB"
