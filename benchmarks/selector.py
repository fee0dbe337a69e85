"""What selecting half of the positions saves: the whole step, and the head alone, over training on all of them.

python -m benchmarks.selector [--vocab-size 8192 --hidden-size 256 ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import Found, Kind, measure, parse, told
from potstill.kernels.loss import linear_sparse_loss
from potstill.kernels.types import SparseTargetTensors
from potstill.student_train.model.parameters import DTYPES
from potstill.student_train.run.engine import stop_distributed


def head_seconds(options: argparse.Namespace, share: float, *, repeats: int = 7) -> float:
    """Median seconds of loss and gradients of the head alone, with a random `share` of the positions weighted 1."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    num_tokens, top_k, vocab = options.micro_batch_rows * options.row_length, options.top_k, options.vocab_size
    dtype = DTYPES[options.dtype]
    hidden = torch.randn(num_tokens, options.hidden_size, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocab, options.hidden_size, generator=generator)).to(device, dtype).requires_grad_()
    starts = torch.randint(vocab, (num_tokens, 1), generator=generator)
    mass = 1.0 / torch.arange(1, top_k + 1)
    targets = SparseTargetTensors(
        offsets=torch.arange(num_tokens + 1) * top_k,
        ids=((starts + 7 * torch.arange(top_k)) % vocab).int().flatten(),
        logprobs=(0.95 * mass / mass.sum()).log().repeat(num_tokens),
        counts=None,
        num_draws=None,
        log_tail=torch.full((num_tokens,), 0.05).log(),
    ).to(device)
    labels = torch.randint(vocab, (num_tokens,), generator=generator).to(device)
    chosen = (torch.rand(num_tokens, generator=generator) < share).float().to(device)
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        loss, _ = linear_sparse_loss(
            hidden=hidden, weight=weight, targets=targets, labels=labels, token_weights=chosen, alpha=0.9
        )
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def selector_figures(found: Found) -> dict[str, Any]:
    """Steps with half of the positions over the step with all, as far as they were measured."""
    if "all" not in found:
        return {}
    whole = found["all"].seconds
    # The student's own entropy (half_by_student) needs a forward of the head over all positions first.
    shares = {
        f"{name}_step_over_all": round(found[kind].seconds / whole, 4)
        for name, kind in (("half_selected", "half"), ("half_by_student", "half_by_student"))
        if kind in found
    }
    return {**shares, "all_step_seconds": round(whole, 5)}


def main() -> None:
    """Run and print one JSON line."""
    load = os.getloadavg()[0]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = parse(parser)
    half = {"policy": "random", "share": 0.5}
    kinds = {
        "all": Kind({"targets": "teacher"}),
        "half": Kind({"targets": "teacher", "tokens": half}),
        "half_by_student": Kind({"targets": "teacher", "tokens": {"policy": "top_entropy", "share": 0.5}}),
    }
    of_head = round(head_seconds(options, 0.5) / head_seconds(options, 1.0), 4)
    figures: dict[str, Any] = {"half_selected_head_over_all": of_head}

    def news(found: Found) -> None:
        told({**selector_figures(found), **figures}, options, load=load)

    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, kinds, Path(folder), news=news)
    stop_distributed()
    print(told({**selector_figures(found), **figures}, options, load=load))


if __name__ == "__main__":
    main()
