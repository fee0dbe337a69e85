"""Small seeded stores for the tests of this room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from potstill.storage import (
    RunSpec,
    ScoresRow,
    SparseTargets,
    StoreReader,
    StoreWriter,
    TargetsRow,
    TokensRow,
    seal_store,
    token_digest,
)


def distinct_ids(rng: np.random.Generator, vocab_size: int, count: int) -> np.ndarray:
    """`count` distinct ids in random order, without shuffling a large vocabulary."""
    some = np.unique(rng.integers(0, vocab_size, 3 * count + 8))
    return rng.permutation(some if len(some) >= count else vocab_size)[:count]


def make_targets(
    seed: int,
    num_tokens: int,
    vocab_size: int = 1000,
    *,
    k: int = 16,
    temperatures: tuple[float, ...] = (),
    last: bool = True,
    places: np.ndarray | None = None,
) -> SparseTargets:
    """Softmax targets of a seeded random teacher with `k` entries at most; the last token has none if `last`.

    `places` bool [num_tokens]: where there may be a target at all.
    """
    rng = np.random.default_rng(seed)
    k = min(k, vocab_size)
    kept = rng.integers(1, k + 1, num_tokens)
    if last:
        kept[-1] = 0
    if places is not None:
        kept[~places] = 0
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    ids, logprobs = [], []
    tail = np.zeros(num_tokens, np.float32)
    for n, count in enumerate(kept):
        if not count:
            continue
        p = np.sort(rng.dirichlet(np.full(count + 1, 0.3)) + 1e-7)[::-1]
        p = p / p.sum()
        ids.append(distinct_ids(rng, vocab_size, int(count)))
        logprobs.append(np.log(p[:count]).astype(np.float32))
        # Equal values must come by ascending id.
        ids[-1] = ids[-1][np.lexsort((ids[-1], -logprobs[-1]))]
        tail[n] = np.log(p[count])
    labels = rng.uniform(0, 8, num_tokens).astype(np.float32)
    return SparseTargets.build(
        offsets=offsets,
        ids=np.concatenate([*ids, np.zeros(0, np.int64)]).astype(np.int32),
        logprobs=np.concatenate([*logprobs, np.zeros(0)]).astype(np.float32),
        log_tail=tail,
        entropy=np.where(kept > 0, rng.uniform(0, 4, num_tokens), 0).astype(np.float32),
        label_logprob=np.where(kept > 0, -labels, 0).astype(np.float32),
        label_rank=np.where(kept > 0, rng.integers(0, 300, num_tokens), 255).astype(np.int32),
        log_tail_at={t: np.where(kept > 0, tail * 0.5 - 1e-3, 0).astype(np.float32) for t in temperatures},
        vocab_size=vocab_size,
        strict=True,
    )


def tokens_spec(**changes: Any) -> RunSpec:
    values: dict[str, Any] = {
        "kind": "tokens",
        "row_length": 32,
        "rows_per_unit": 4,
        "num_rows": None,
        "vocab_size": 1000,
        "tokenizer_digest": "tok",
    }
    return RunSpec(**(values | changes))


def targets_spec(num_rows: int, tokens_digest: str, **changes: Any) -> RunSpec:
    values: dict[str, Any] = {
        "kind": "targets",
        "row_length": 32,
        "rows_per_unit": 4,
        "num_rows": num_rows,
        "vocab_size": 1000,
        "tokenizer_digest": "tok",
        "input_digest": tokens_digest,
        "selection": {"mode": "top_k", "k": 16},
        "stats": ("mean_loss",),
        "teacher": {"id": "toy", "weights_digest": "00", "dtype": "float32"},
    }
    return RunSpec(**(values | changes))


def make_tokens_row(row: int, spec: RunSpec, *, num_tokens: int | None = None) -> TokensRow:
    rng = np.random.default_rng([7, row])
    n = spec.row_length if num_tokens is None else num_tokens
    first = int(rng.integers(1, n + 1))
    lengths = [first, n - first] if first < n else [n]
    return TokensRow(row, rng.integers(0, spec.vocab_size, n).astype(np.int32), np.array(lengths, np.int32))


def make_masked_row(row: int, spec: RunSpec) -> TokensRow:
    """Rows by turns without a mask, with prompts that are off, all off, all on; every other one is short."""
    tokens = make_tokens_row(row, spec, num_tokens=spec.row_length - (row % 2) * (3 + row))
    n, kind = len(tokens.tokens), row % 4
    prompts = tokens.position_ids() % 9 >= 4  # what is trained on comes in pieces of any offset to the bytes
    masks = {0: None, 1: prompts, 2: np.zeros(n, np.bool_), 3: np.ones(n, np.bool_)}
    return replace(tokens, mask=masks[kind])


def write_masked(path: Path | str, num_rows: int, **changes: Any) -> StoreReader:
    """A sealed tokens store of `make_masked_row`s."""
    spec = tokens_spec(columns=("mask",), **changes)
    writer = StoreWriter.create(path, spec)
    for unit in range(-(-num_rows // spec.rows_per_unit)):
        writer.commit_unit(unit, [make_masked_row(row, spec) for row in writer.unit_rows(unit) if row < num_rows])
    seal_store(path)
    return StoreReader(path)


def make_rolled_row(tokens: TokensRow, spec: RunSpec) -> ScoresRow:
    """Scores with a pass rate and a grade for each document; of every third document nothing is known."""
    rng = np.random.default_rng([10, tokens.row])
    known = (np.arange(len(tokens.doc_lens)) + tokens.row) % 3 != 2
    values = {"pass_rate": rng.integers(0, 9, len(known)) / 8, "greedy_score": rng.random(len(known))}
    more = {name: np.where(known, values[name], np.nan).astype(np.float32) for name in spec.columns}
    return replace(make_scores_row(tokens, spec), more=more)


def write_rolled(
    path: Path | str, tokens: StoreReader, *, columns: tuple[str, ...] = ("pass_rate", "greedy_score"), **changes: Any
) -> StoreReader:
    """A sealed scores store of `make_rolled_row`s."""
    spec = targets_spec(
        tokens.num_rows,
        tokens.digest,
        kind="scores",
        selection=None,
        teacher=None,
        stats=("mean_pass_rate",),
        columns=columns,
        vocab_size=tokens.spec.vocab_size,
        **changes,
    )
    writer = StoreWriter.create(path, spec)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_rolled_row(row, spec) for row in tokens.tokens_rows(writer.unit_rows(unit))])
    seal_store(path)
    return StoreReader(path)


def kept_only(targets: SparseTargets) -> SparseTargets:
    """The targets as a renormalising writer leaves them: entries that sum to 1, nothing known of the rest."""
    assert targets.logprobs is not None
    counts = np.diff(targets.offsets)
    mass = [np.exp(piece).sum() for piece in np.split(targets.logprobs, targets.offsets[1:-1])]
    columns: dict[str, Any] = {
        **dict.fromkeys(("entropy", "label_logprob", "label_rank")),
        "logprobs": (targets.logprobs - np.log(np.repeat(mass, counts))).astype(np.float32),
        "log_tail": np.where(counts > 0, -np.inf, 0).astype(np.float32),
    }
    return replace(targets, **columns)


def write_kept(path: Path | str, tokens: StoreReader, **changes: Any) -> StoreReader:
    """A sealed store of targets relative to their entries alone, at the positions that have one."""
    sizes = {"row_length": tokens.spec.row_length, "vocab_size": tokens.spec.vocab_size}
    spec = targets_spec(tokens.num_rows, tokens.digest, **({"normaliser": "kept", "stats": ()} | sizes | changes))
    writer = StoreWriter.create(path, spec)
    for unit in writer.todo():
        rows = []
        for row in tokens.tokens_rows(writer.unit_rows(unit)):
            made = make_targets(row.row, len(row.tokens), spec.vocab_size, places=row.has_target())
            rows.append(TargetsRow(row.row, token_digest(row.tokens, row.doc_lens), kept_only(made)))
        writer.commit_unit(unit, rows)
    seal_store(path)
    return StoreReader(path)


def make_targets_row(tokens: TokensRow, spec: RunSpec, *, seed: int = 0) -> TargetsRow:
    targets = make_targets(
        seed * 1_000_003 + tokens.row,
        len(tokens.tokens),
        spec.vocab_size,
        k=spec.max_entries,
        temperatures=spec.temperatures,
    )
    return TargetsRow(
        tokens.row,
        token_digest(tokens.tokens, tokens.doc_lens),
        targets,
        {name: float(tokens.row) + 0.5 for name in spec.stats},
    )


def make_scores_row(tokens: TokensRow, spec: RunSpec) -> ScoresRow:
    rng = np.random.default_rng([9, tokens.row])
    n = len(tokens.tokens)
    return ScoresRow(
        row=tokens.row,
        token_digest=token_digest(tokens.tokens, tokens.doc_lens),
        label_logprob=-rng.uniform(0, 9, n).astype(np.float32),
        label_rank=rng.integers(0, 255, n).astype(np.int32),
        entropy=rng.uniform(0, 9, n).astype(np.float32),
        stats={name: float(tokens.row) / 3 for name in spec.stats},
    )


def write_tokens(path: Path | str, num_rows: int, *, last_tokens: int | None = None, **changes: Any) -> StoreReader:
    spec = tokens_spec(**changes)
    writer = StoreWriter.create(path, spec)
    for unit in range(-(-num_rows // spec.rows_per_unit)):
        rows = [r for r in writer.unit_rows(unit) if r < num_rows]
        lengths = {num_rows - 1: last_tokens}
        assert writer.commit_unit(unit, [make_tokens_row(r, spec, num_tokens=lengths.get(r)) for r in rows])
    seal_store(path)
    return StoreReader(path)


def write_targets(path: Path | str, tokens: StoreReader, *, seed: int = 0, **changes: Any) -> StoreReader:
    values = {"row_length": tokens.spec.row_length, "vocab_size": tokens.spec.vocab_size}
    spec = targets_spec(tokens.num_rows, tokens.digest, **(values | changes))
    writer = StoreWriter.create(path, spec)
    for unit in writer.todo():
        rows = [make_targets_row(tokens.row(r), spec, seed=seed) for r in writer.unit_rows(unit)]  # type: ignore[arg-type]
        assert writer.commit_unit(unit, rows)
    seal_store(path)
    return StoreReader(path)


def same_targets(a: SparseTargets, b: SparseTargets) -> bool:
    """Equality of every array, bit for bit."""
    names = (
        "offsets",
        "ids",
        "logprobs",
        "counts",
        "log_weights",
        "log_tail",
        "entropy",
        "label_logprob",
        "label_rank",
    )
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and (x.dtype != y.dtype or not np.array_equal(x, y))):
            return False
    same_keys = a.log_tail_at.keys() == b.log_tail_at.keys() and a.num_draws == b.num_draws
    return same_keys and all(np.array_equal(a.log_tail_at[t], b.log_tail_at[t]) for t in a.log_tail_at)
