"""Draws from p^power: how far the estimate is from the teacher at equal draws, and what a token costs in the store.

python -m benchmarks.proposals [--powers 0.5 0.8 1 1.2 --draws 50]

The teachers are made up: per token a Zipf law over shuffled ids, its exponent uniform between two bounds. `expected`
is the mean of sum_i (t_i - p_i)^2 by its formula, `measured` that of the draws as they come back from the store's grid.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from potstill.kernels.topk import select_sample
from potstill.storage import RunSpec, SparseTargets, TargetsRow
from potstill.storage.files.unit_file import encode_unit


@dataclass(frozen=True)
class Figures:
    """One power: squared errors of the estimate, distinct ids, and bytes per token of the entries and the tail."""

    power: float
    expected: float
    measured: float
    entries: float
    bytes_per_token: float


def expected_squared_error(log_p: Tensor, *, power: float, num_draws: int) -> Tensor:
    """E sum_i (t_i - p_i)^2 [N] of t = (count / n) p / pi, pi ~ p^power, before any rounding (log_p float64 [N, V])."""
    log_pi = (power * log_p).log_softmax(-1)
    # Var(count_i) = n pi_i (1 - pi_i), so Var(t_i) = p_i^2 (1 - pi_i) / (n pi_i).
    return ((2 * log_p - log_pi).exp() * (1 - log_pi.exp())).sum(-1) / num_draws


def zipf_logits(num_tokens: int, vocab_size: int, *, low: float, high: float) -> Tensor:
    """float32 [N, V]: -s ln(rank) for exponents s uniform in [low, high], ids shuffled in each row."""
    generator = torch.Generator().manual_seed(0)
    exponent = low + (high - low) * torch.rand(num_tokens, 1, generator=generator)
    ranks = torch.rand(num_tokens, vocab_size, generator=generator).argsort(1) + 1
    return -exponent * ranks.float().log()


def measure(logits: Tensor, *, power: float, num_draws: int) -> Figures:
    """Draw once per row of `logits` [N, V], put the draws in a unit file, and compare."""
    num_tokens, vocab_size = logits.shape
    place = torch.arange(num_tokens)
    drawn = select_sample(
        logits=logits, num_draws=num_draws, power=power, seed=0, rows=torch.zeros_like(place), positions=place
    ).targets
    log_p = logits.double().log_softmax(1)
    token = torch.repeat_interleave(place, drawn.offsets.diff())
    columns = {name: value.numpy() for name, value in drawn.columns.items() if isinstance(value, Tensor)}
    if drawn.counts is not None:
        columns["counts"] = columns["counts"].astype(np.uint8)
    targets = SparseTargets.build(
        offsets=drawn.offsets.numpy(), num_draws=num_draws, vocab_size=vocab_size, strict=True, **columns
    )
    weights = torch.from_numpy(targets.entry_mass(np.float64)[1])
    p = log_p[token, drawn.ids.long()].exp()
    # All ids, drawn or not: sum p^2, with the drawn ones replaced.
    squares = log_p.exp().square().sum() + ((weights - p).square() - p.square()).sum()
    spec = RunSpec(
        kind="targets",
        row_length=num_tokens,
        rows_per_unit=1,
        num_rows=1,
        vocab_size=vocab_size,
        tokenizer_digest="none",
        input_digest="none",
        selection={"mode": "sample", "num_draws": num_draws, "power": power},
    )
    unit = encode_unit([TargetsRow(0, 0, targets, {})], spec=spec, unit=0, id_map=None)
    return Figures(
        power=power,
        expected=round(float(expected_squared_error(log_p, power=power, num_draws=num_draws).mean()), 6),
        measured=round(float(squares) / num_tokens, 6),
        entries=round(len(token) / num_tokens, 2),
        bytes_per_token=round(len(unit.data) / num_tokens, 2),
    )


def main() -> None:
    """Run and print one line per power, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--powers", type=float, nargs="+", default=[0.5, 0.8, 1.0, 1.2])
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=8_000)
    parser.add_argument("--exponents", type=float, nargs=2, default=[1.2, 3.0])
    options = parser.parse_args()
    low, high = options.exponents
    logits = zipf_logits(options.tokens, options.vocab_size, low=low, high=high)
    log_p = logits.double().log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    found = [measure(logits, power=power, num_draws=options.draws) for power in options.powers]
    for figures in found:
        print(figures)
    figures_of = [vars(figures) for figures in found]
    print(json.dumps({**vars(options), "entropy": round(float(entropy), 3), "powers": figures_of}))


if __name__ == "__main__":
    main()
