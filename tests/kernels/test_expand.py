"""Expansion of the store's planes on a device equals the store's own decoder bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from potstill.kernels.expand import expand_targets
from potstill.storage.rows import codec, grid
from potstill.storage.store.spec import RunSpec
from tests.kernels.reference import as_draws, as_weights, make_targets


def store_of(vocab_size: int, values: str):
    """(spec, planes of every column) of random targets, through the store's encoder."""
    from potstill.storage import SparseTargets

    tensors = make_targets(40, vocab_size, [12, 0, 1, 30], temperatures=(2.0, 4.0), scale=6.0)
    selection: dict[str, object] = {"mode": "top_k", "k": 30}
    if values == "draws":
        tensors = as_draws(tensors, 50)
        selection = {"mode": "sample", "num_draws": 50, "power": 1.0}
    if values == "weights":
        tensors = as_weights(tensors)
        selection = {"mode": "sample", "num_draws": 50, "power": 0.8}
    temperatures = (2.0, 4.0) if values == "gaps" else ()
    spec = RunSpec(
        kind="targets",
        row_length=40,
        rows_per_unit=1,
        num_rows=1,
        vocab_size=vocab_size,
        tokenizer_digest="0" * 64,
        input_digest="0" * 64,
        selection=selection,
        temperatures=temperatures,
        stats=(),
        teacher={"id": "t", "weights_digest": "0", "dtype": "float32", "engine": "hf", "padded_vocab_size": vocab_size},
        info={},
    )
    targets = SparseTargets(
        offsets=tensors.offsets.numpy(),
        ids=tensors.ids.numpy(),
        logprobs=None if tensors.logprobs is None else tensors.logprobs.numpy(),
        counts=None if tensors.counts is None else tensors.counts.numpy().astype(np.uint8),
        log_weights=None if tensors.log_weights is None else tensors.log_weights.clamp_min(-8.9375).numpy(),
        num_draws=tensors.num_draws,
        log_tail=tensors.log_tail.numpy(),
        entropy=None,
        label_logprob=None,
        label_rank=None,
        log_tail_at={t: tensors.log_tail_at[t].numpy() for t in temperatures},
    )
    return spec, codec.encode_targets(targets, spec=spec), targets


def same_bits(tensor: torch.Tensor, array: np.ndarray) -> bool:
    return tensor.numpy().tobytes() == np.ascontiguousarray(array).astype(tensor.numpy().dtype).tobytes()


@pytest.mark.parametrize("vocab_size", [300, 70_000])
@pytest.mark.parametrize("values", ["gaps", "draws", "weights"])
@pytest.mark.parametrize("ranked", [False, True])
def test_equals_the_decoder(vocab_size: int, values: str, ranked: bool) -> None:
    spec, planes, targets = store_of(vocab_size, values)
    id_of_rank = None
    if ranked:
        id_of_rank = np.random.default_rng(0).permutation(vocab_size).astype(np.int32)
    want = codec.decode_targets(planes, spec=spec, num_entries=len(targets.ids), id_of_rank=id_of_rank)
    tensors = {name: torch.from_numpy(np.array(plane)) for name, plane in planes.items()}
    got = expand_targets(
        count=tensors["count"],
        id_planes=[tensors[name] for name in ("id0", "id1", "id2") if name in tensors],
        gaps=tensors.get("val"),
        draws=tensors.get("draws"),
        weights=tensors.get("weight"),
        num_draws=spec.num_draws,
        tail=tensors["tail"],
        tail_table=torch.from_numpy(grid.decode_tail(np.arange(256, dtype=np.uint8))),
        tails_at={t: tensors[f"tail_at{i}"] for i, t in enumerate(spec.temperatures)},
        odds_table=torch.from_numpy(grid.decode_odds(np.arange(256, dtype=np.uint8), np.ones(256, dtype=np.uint8))),
        id_of_rank=None if id_of_rank is None else torch.from_numpy(id_of_rank),
    )
    assert same_bits(got.offsets, want.offsets) and same_bits(got.ids, want.ids)
    assert same_bits(got.log_tail, want.log_tail)
    for name, plane in (("logprobs", "val"), ("counts", "draws"), ("log_weights", "weight")):
        assert (getattr(got, name) is not None) == (plane in planes) == (getattr(want, name) is not None)
        assert plane not in planes or same_bits(getattr(got, name), getattr(want, name))
    assert got.num_draws == want.num_draws
    for temperature in spec.temperatures:
        assert same_bits(got.log_tail_at[temperature], want.log_tail_at[temperature])


def test_long_runs_do_not_lose_bits() -> None:
    """The running sum over all entries passes 2^24, where float32 sums would round."""
    counts = np.full(4000, 255, np.uint8)
    gaps = np.full(4000 * 255, 255, np.uint8)
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    from potstill.kernels.expand import decode_gaps

    got = decode_gaps(torch.from_numpy(gaps), torch.from_numpy(offsets))
    assert same_bits(got, grid.decode_gaps(gaps, counts, offsets))


def test_planes_of_another_type_are_refused() -> None:
    from potstill.kernels.types import KernelInputError

    one = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(KernelInputError, match="exactly one of gaps, draws and weights"):
        expand_targets(count=one, id_planes=[one, one], gaps=None, tail=one, tail_table=torch.zeros(256))
    with pytest.raises(KernelInputError, match="plane count has dtype"):
        expand_targets(count=one.int(), id_planes=[one, one], gaps=one, tail=one, tail_table=torch.zeros(256))
