"""Draws: the published generator, its independence of the batch, and unbiased counts."""

from __future__ import annotations

import torch

from potstill.kernels.counter_random import philox, uniforms
from potstill.kernels.topk import select_sample

SEED = 0x1234567890ABCDEF


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


def test_philox_gives_the_published_vectors() -> None:
    """Known answers of philox4x32-10 from the Random123 distribution (kat_vectors)."""
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in known:
        assert tuple(int(word) for word in philox(words(*counter), key)) == expected


def test_uniforms_hang_on_nothing_but_their_key() -> None:
    rows = torch.tensor([0, 0, 7, 2**40 + 3])
    positions = torch.tensor([0, 5, 5, 4095])
    whole = uniforms(seed=SEED, rows=rows, positions=positions, num_draws=50)
    assert whole.shape == (4, 50) and float(whole.min()) > 0 and float(whole.max()) < 1
    for n in range(4):
        one = uniforms(seed=SEED, rows=rows[n : n + 1], positions=positions[n : n + 1], num_draws=7)
        assert torch.equal(one[0], whole[n, :7])
    assert not torch.equal(whole, uniforms(seed=SEED + 1, rows=rows, positions=positions, num_draws=50))
    assert not torch.equal(whole, uniforms(seed=SEED ^ (1 << 40), rows=rows, positions=positions, num_draws=50))
    many = uniforms(seed=1, rows=torch.arange(2000), positions=torch.zeros(2000, dtype=torch.int64), num_draws=8)
    assert abs(float(many.mean()) - 0.5) < 0.01 and abs(float(many.var()) - 1 / 12) < 0.002


def sample(logits: torch.Tensor, order: torch.Tensor, chunk_bytes: int, num_draws: int = 50):
    rows, positions = torch.arange(logits.shape[0]) // 3, torch.arange(logits.shape[0]) % 3
    return select_sample(
        logits=logits[order],
        num_draws=num_draws,
        seed=SEED,
        rows=rows[order],
        positions=positions[order],
        labels=torch.zeros(logits.shape[0], dtype=torch.int64),
        chunk_bytes=chunk_bytes,
    )


def test_order_and_chunks_of_the_batch_do_not_matter() -> None:
    logits = torch.randn(9, 700, generator=torch.Generator().manual_seed(0)) * 3
    base = sample(logits, torch.arange(9), 1 << 20)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    other = sample(logits, order, 4 * 704 * 2)
    picked = base.targets.select(order)
    for name in ("offsets", "ids", "counts", "log_tail"):
        assert torch.equal(getattr(picked, name), getattr(other.targets, name)), name
    assert torch.equal(base.lse[order], other.lse)


def test_entries_are_distinct_ordered_and_sum_to_the_draws() -> None:
    logits = torch.randn(9, 700, generator=torch.Generator().manual_seed(0)) * 3
    targets = sample(logits, torch.arange(9), 1 << 20).targets
    for n in range(9):
        a, b = targets.offsets[n : n + 2].tolist()
        ids, counts = targets.ids[a:b].long(), targets.counts[a:b]
        assert int(counts.sum()) == 50 and len(set(ids.tolist())) == b - a
        keys = [(-float(c), int(i)) for c, i in zip(counts, ids, strict=True)]
        assert keys == sorted(keys)
        kept = float(logits[n].double().softmax(0)[ids].sum())
        assert abs(float(targets.log_tail[n].exp()) - (1 - kept)) < 1e-5


def test_counts_are_unbiased() -> None:
    """Mean share over 4000 tokens with one distribution: within four standard errors for every id."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625 - 1e-6, 1e-6])
    num_tokens, num_draws = 4000, 20
    place = torch.arange(num_tokens)
    targets = select_sample(
        logits=p.log().expand(num_tokens, -1), num_draws=num_draws, seed=3, rows=place, positions=place
    ).targets
    share = torch.zeros(6).index_add_(0, targets.ids.long(), targets.counts) / (num_tokens * num_draws)
    error = (p * (1 - p) / (num_tokens * num_draws)).sqrt()
    assert bool(((share - p).abs() <= 4 * error + 1e-9).all())


def test_ids_without_mass_and_padding_are_never_drawn() -> None:
    logits = torch.full((50, 200), -1e4)
    logits[:, 130] = 0.0
    place = torch.arange(50)
    valid = place % 2 == 0
    drawn = select_sample(
        logits=logits, vocab_size=140, num_draws=9, seed=3, rows=place, positions=place, valid=valid
    ).targets
    assert set(drawn.ids.tolist()) == {130}
    assert torch.equal(drawn.offsets.diff(), valid.long())
    assert bool((drawn.log_tail[~valid] == 0).all())
