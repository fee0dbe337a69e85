"""No call waits for the GPU: a train loop that stops to ask it runs at the speed of the slower of the two.

Skips itself without a CUDA device. Run: PYTHONPATH=src python -m pytest tests/gpu -n 8 --dist loadgroup -q
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from potstill.kernels.loss import linear_sparse_loss, sparse_loss, token_statistics
from tests.gpu import place
from tests.gpu.place import BACKEND, DEVICE
from tests.kernels.reference import as_draws, as_weights

pytestmark = place.marks
# As in test_loss_modes_gpu.py, for which the kernels are compiled already: kept on disk, they serve all processes.
TOKENS, VOCAB = 64, place.size(32000, 4096)
COUNTS = (64, 1, 0, 17, 255)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "z-loss": {"z_loss": 1e-3},
    "temperature": {"temperature": 2.0},
    "teacher's temperature": {"temperature": 2.0, "temperature_side": "teacher"},
    "cap": {"soft_cap": 15.0},
    "cap and scale at 2": {"soft_cap": 15.0, "logit_scale": 0.5, "temperature": 2.0},
    "label": {"missing_mass": "label"},
    "raw": {"missing_mass": "raw"},
    "renorm": {"missing_mass": "renorm"},
    "support at 2": {"missing_mass": "support", "temperature": 2.0},
    "reverse_kl": {"divergence": "reverse_kl"},
    "skew_forward": {"divergence": "skew_forward"},
    "jsd": {"divergence": "jsd"},
    "total_variation": {"divergence": "total_variation"},
    "mse_logprobs": {"divergence": "mse_logprobs", "missing_mass": "raw"},
    "mse_probs": {"divergence": "mse_probs"},
    "draws": {"divergence": "sampled"},
    "log weights": {"divergence": "sampled"},
    "labels alone": {"alpha": 0.0},
}


def options_of(name: str, *, weighted: bool) -> dict[str, Any]:
    targets = place.targets_of(TOKENS, VOCAB, COUNTS).to("cpu")
    if name == "draws":
        targets = as_draws(targets, 300)
    elif name == "log weights":
        targets = as_weights(targets)
    options = {"alpha": 0.5, "targets": targets.to(DEVICE), "labels": place.labels_of(TOKENS, VOCAB), **SETTINGS[name]}
    if name == "labels alone":
        options["targets"] = None
    if weighted:
        number = torch.arange(TOKENS, device=DEVICE)
        options |= {"token_weights": (number % 4).float(), "num_active": TOKENS * 3 // 4}
        options |= {"kd_weights": 0.5 + (number % 2)}
    options |= {"normalizer": torch.full((), 40.0, device=DEVICE), "backend": BACKEND}
    return options


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_losses_and_gradients(name: str, weighted: bool) -> None:
    options = options_of(name, weighted=weighted)
    hidden = torch.randn(TOKENS, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(VOCAB, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    raw = torch.randn(TOKENS, VOCAB, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        loss, _ = linear_sparse_loss(hidden=hidden, weight=weight, bias=bias, chunk_bytes=20 * 2 * VOCAB, **options)
        other, _ = sparse_loss(logits=raw, **options)
        (loss + other).backward()

    step()  # compiles the kernels, which may wait
    with place.no_wait_for_the_device():
        step()
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (hidden, weight, bias, raw))


@pytest.mark.parametrize("name", ["plain", "temperature", "label", "cap", "jsd"])
def test_statistics(name: str) -> None:
    options = options_of(name, weighted=False)
    del options["normalizer"]
    hidden = torch.randn(TOKENS, 64, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(VOCAB, 64, device=DEVICE, dtype=torch.bfloat16)
    token_statistics(hidden=hidden, weight=weight, chunk_bytes=20 * 2 * VOCAB, **options)
    with place.no_wait_for_the_device():
        found = token_statistics(hidden=hidden, weight=weight, chunk_bytes=20 * 2 * VOCAB, **options)
    assert bool(found.entropy.isfinite().all())


@place.only_on_a_gpu
def test_a_wait_would_be_seen() -> None:
    with pytest.raises(RuntimeError), place.no_wait_for_the_device():
        torch.ones((), device=DEVICE).item()
