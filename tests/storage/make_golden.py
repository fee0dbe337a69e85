"""Writes the golden stores of format version 1. Run only to add stores, never to replace them.

python -m tests.storage.make_golden FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from potstill.storage import SparseTargets, StoreWriter, TargetsRow, TokensRow, seal_store, token_digest
from tests.storage.stores import (
    make_scores_row,
    targets_spec,
    tokens_spec,
    write_kept,
    write_masked,
    write_rolled,
    write_targets,
    write_tokens,
)

NUM_ROWS = 5


def sample_row(tokens: TokensRow, vocab_size: int, num_draws: int) -> TargetsRow:
    rng = np.random.default_rng(tokens.row)
    offsets, ids, counts = [0], [], []
    for _ in range(len(tokens.tokens)):
        drawn, times = np.unique(rng.zipf(1.6, num_draws) % vocab_size, return_counts=True)
        order = np.lexsort((drawn, -times))
        ids.append(drawn[order])
        counts.append(times[order])
        offsets.append(offsets[-1] + len(drawn))
    targets = SparseTargets.build(
        offsets=offsets,
        ids=np.concatenate(ids),
        counts=np.concatenate(counts),
        num_draws=num_draws,
        log_tail=rng.uniform(-4, 0, len(tokens.tokens)).astype(np.float32),
        vocab_size=vocab_size,
        strict=True,
    )
    return TargetsRow(tokens.row, token_digest(tokens.tokens, tokens.doc_lens), targets)


def weighted_row(tokens: TokensRow, vocab_size: int, num_draws: int) -> TargetsRow:
    """Weights anywhere on their grid, both ends among them."""
    rng = np.random.default_rng(tokens.row)
    kept = np.append(rng.integers(1, num_draws + 1, len(tokens.tokens) - 1), 0)
    codes = [np.sort(rng.choice([0, 60, 110, 111, 145, 160, 255], size)) for size in kept]
    ids = [rng.choice(vocab_size, size, replace=False) for size in kept]
    ids = [chosen[np.lexsort((chosen, code))] for chosen, code in zip(ids, codes, strict=True)]
    targets = SparseTargets.build(
        offsets=np.append(0, np.cumsum(kept)),
        ids=np.concatenate(ids).astype(np.int32),
        log_weights=(7 - np.concatenate(codes) / 16).astype(np.float32),
        num_draws=num_draws,
        log_tail=np.where(kept > 0, rng.uniform(-4, 0, len(kept)), 0).astype(np.float32),
        vocab_size=vocab_size,
        strict=True,
    )
    return TargetsRow(tokens.row, token_digest(tokens.tokens, tokens.doc_lens), targets)


def main(folder: Path) -> None:
    folder.mkdir()
    tokens = write_tokens(folder / "tokens", NUM_ROWS, last_tokens=11, vocab_size=70_000)
    write_targets(folder / "targets", tokens, temperatures=(2.0, 0.5))
    rows = [TokensRow(0, np.arange(20, dtype=np.int32), np.array([12, 8], np.int32))]
    StoreWriter.create(folder / "tokens_small", tokens_spec(vocab_size=300)).commit_unit(0, rows)
    digest = seal_store(folder / "tokens_small").store_digest
    spec = targets_spec(
        1,
        digest,
        vocab_size=300,
        selection={"mode": "sample", "num_draws": 25, "power": 1.0},
        stats=(),
    )
    writer = StoreWriter.create(folder / "sampled", spec, id_frequencies=np.arange(300) % 37)
    writer.commit_unit(0, [sample_row(rows[0], 300, 25)])
    seal_store(folder / "sampled")
    spec = targets_spec(
        1, digest, vocab_size=300, selection={"mode": "sample", "num_draws": 12, "power": 0.8}, stats=()
    )
    StoreWriter.create(folder / "weighted", spec).commit_unit(0, [weighted_row(rows[0], 300, 12)])
    seal_store(folder / "weighted")
    spec = targets_spec(
        NUM_ROWS, tokens.digest, vocab_size=70_000, kind="scores", selection=None, teacher=None, stats=("mean_loss",)
    )
    writer = StoreWriter.create(folder / "scores", spec)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_scores_row(tokens.row(r), spec) for r in writer.unit_rows(unit)])  # type: ignore[arg-type]
    seal_store(folder / "scores")
    masked = write_masked(folder / "masked", NUM_ROWS + 2, vocab_size=300)
    write_kept(folder / "kept", masked)
    write_rolled(folder / "rolled", masked)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
