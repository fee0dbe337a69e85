"""Tiny stores whose teacher is the process that made the text: a bigram chain over a small vocabulary."""

from __future__ import annotations

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

VOCAB = 48
ROW_LENGTH = 32
ROWS_PER_UNIT = 8
TOKENIZER = "a" * 64
TOP_K = 6
STATS = ("mean_loss", "mean_entropy", "salt_median_zero", "salt_median_drop")


def transition(seed: int = 0, sharpness: float = 2.0) -> np.ndarray:
    """Log-probabilities [V, V] of the chain."""
    logits = np.random.default_rng(seed).normal(size=(VOCAB, VOCAB)) * sharpness
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def token_rows(num_rows: int, *, seed: int = 1, last_length: int = ROW_LENGTH) -> list[TokensRow]:
    """Rows of chain text cut in documents of random length; the last row may be shorter."""
    rng = np.random.default_rng(seed)
    chain = np.exp(transition())
    rows = []
    for number in range(num_rows):
        length = last_length if number == num_rows - 1 else ROW_LENGTH
        cuts = np.sort(rng.choice(np.arange(2, length - 1), size=2, replace=False))
        lens = np.diff([0, *cuts, length]).astype(np.int32)
        tokens = np.empty(length, np.int32)
        for start, size in zip(np.cumsum(lens) - lens, lens, strict=True):
            tokens[start] = rng.integers(VOCAB)
            for t in range(start + 1, start + size):
                tokens[t] = rng.choice(VOCAB, p=chain[tokens[t - 1]])
        rows.append(TokensRow(number, tokens, lens))
    return rows


def label_mask(row: TokensRow) -> np.ndarray:
    """Positions that predict a token: the next one of their document, if it is trained on."""
    return row.has_target()


def side_columns(row: TokensRow, table: np.ndarray) -> dict[str, np.ndarray]:
    """label_logprob, label_rank and entropy [n] of a bigram model."""
    mask, log_p = label_mask(row), table[row.tokens]
    labels = np.append(row.tokens[1:], 0)
    label = log_p[np.arange(len(labels)), labels]
    rank = (log_p > label[:, None]).sum(1)
    entropy = -(np.exp(log_p) * log_p).sum(1)
    return {
        "label_logprob": np.where(mask, label, 0.0).astype(np.float32),
        "label_rank": np.where(mask, rank, 255).astype(np.int32),
        "entropy": np.where(mask, entropy, 0.0).astype(np.float32),
    }


def row_statistics(row: TokensRow, columns: dict[str, np.ndarray]) -> dict[str, float]:
    """The per-row statistics that a scores store keeps."""
    mask = label_mask(row)
    loss, rank = -columns["label_logprob"][mask], columns["label_rank"][mask]
    learnable = loss[rank < 10]
    return {
        "mean_loss": float(loss.mean()),
        "mean_entropy": float(columns["entropy"][mask].mean()),
        "salt_median_zero": float(np.median(np.where(rank < 10, loss, 0.0))),
        "salt_median_drop": float(np.median(learnable)) if len(learnable) else 0.0,
    }


def targets_row(row: TokensRow, table: np.ndarray, *, temperatures: tuple[float, ...]) -> TargetsRow:
    """Top-k targets with exact tails."""
    mask, log_p = label_mask(row), table[row.tokens]
    ids = np.argsort(-log_p, axis=1, kind="stable")[:, :TOP_K]
    offsets = np.concatenate([[0], np.cumsum(np.where(mask, TOP_K, 0))]).astype(np.int64)
    kept = np.take_along_axis(log_p, ids, 1)

    def tail(temperature: float) -> np.ndarray:
        scaled = log_p / temperature
        scaled = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        mass = 1.0 - np.exp(np.take_along_axis(scaled, ids, 1)).sum(1)
        return np.where(mask, np.log(np.maximum(mass, 1e-30)), 0.0).astype(np.float32)

    columns = side_columns(row, table)
    targets = SparseTargets.build(
        offsets=offsets,
        ids=ids[mask].reshape(-1).astype(np.int32),
        logprobs=kept[mask].reshape(-1).astype(np.float32),
        log_tail=tail(1.0),
        log_tail_at={t: tail(t) for t in temperatures},
        vocab_size=table.shape[1],
        **columns,
    )
    stats = {name: row_statistics(row, columns)[name] for name in ("mean_loss", "mean_entropy")}
    return TargetsRow(row.row, token_digest(row.tokens, row.doc_lens), targets, stats)


def sampled_row(row: TokensRow, table: np.ndarray, *, num_draws: int) -> TargetsRow:
    """Draw counts instead of log-probabilities."""
    rng = np.random.default_rng(1000 + row.row)
    mask, p = label_mask(row), np.exp(table[row.tokens])
    offsets, ids, counts = [0], [], []
    for t in range(len(row.tokens)):
        if mask[t]:
            draws = rng.multinomial(num_draws, p[t] / p[t].sum())
            chosen = np.flatnonzero(draws)
            chosen = chosen[np.lexsort((chosen, -draws[chosen]))]
            ids.append(chosen)
            counts.append(draws[chosen])
        offsets.append(offsets[-1] + (len(ids[-1]) if mask[t] else 0))
    targets = SparseTargets.build(
        offsets=np.array(offsets, np.int64),
        ids=np.concatenate(ids).astype(np.int32),
        counts=np.concatenate(counts).astype(np.uint8),
        num_draws=num_draws,
        log_tail=np.zeros(len(row.tokens), np.float32),
        vocab_size=VOCAB,
        **side_columns(row, table),
    )
    return TargetsRow(row.row, token_digest(row.tokens, row.doc_lens), targets)


def write_store(path: Path, spec: RunSpec, rows: list[Any]) -> StoreReader:
    """Write, seal and open a store."""
    writer = StoreWriter.create(path, spec)
    for unit in range(-(-len(rows) // spec.rows_per_unit)):
        writer.commit_unit(unit, rows[unit * spec.rows_per_unit : (unit + 1) * spec.rows_per_unit])
    seal_store(path)
    return StoreReader(path)


def spec_of(kind: str, **options: Any) -> RunSpec:
    """A RunSpec of the tiny size."""
    size = {"row_length": ROW_LENGTH, "rows_per_unit": ROWS_PER_UNIT, "vocab_size": VOCAB}
    return RunSpec(kind=kind, **{**size, "tokenizer_digest": TOKENIZER, **options})


def write_targets(
    path: Path, tokens: StoreReader, rows: list[TokensRow], table: np.ndarray, **options: Any
) -> StoreReader:
    """A top-k targets store of a bigram teacher."""
    temperatures = options.pop("temperatures", (2.0,))
    spec = spec_of(
        "targets",
        num_rows=len(rows),
        input_digest=tokens.digest,
        selection={"mode": "top_k", "k": TOP_K},
        temperatures=temperatures,
        stats=("mean_loss", "mean_entropy"),
        teacher={"id": "bigram", "weights_digest": "0" * 64, "dtype": "float32", "engine": "table", **options},
    )
    return write_store(path, spec, [targets_row(row, table, temperatures=temperatures) for row in rows])


def write_all(folder: Path, *, num_rows: int = 40, last_length: int = 20) -> dict[str, Path]:
    """tokens, two teachers, sampled targets, scores, held-out tokens and targets; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    true, rough = transition(), 0.6 * transition() + 0.4 * transition(5)
    rough -= np.log(np.exp(rough).sum(1, keepdims=True))
    rows = token_rows(num_rows, last_length=last_length)
    tokens = write_store(folder / "tokens", spec_of("tokens", num_rows=None), rows)
    write_targets(folder / "teacher", tokens, rows, true, temperatures=(1.3333, 1.6667, 2.0))
    write_targets(folder / "early_teacher", tokens, rows, rough, checkpoint_step=100)
    sampled = spec_of(
        "targets",
        num_rows=num_rows,
        input_digest=tokens.digest,
        selection={"mode": "sample", "num_draws": 20, "power": 1.0},
        teacher={"id": "bigram", "weights_digest": "0" * 64, "dtype": "float32", "engine": "table"},
    )
    write_store(folder / "sampled", sampled, [sampled_row(row, true, num_draws=20) for row in rows])
    scores = []
    for row in rows:
        columns = side_columns(row, rough)
        stats = row_statistics(row, columns)
        scores.append(ScoresRow(row.row, token_digest(row.tokens, row.doc_lens), **columns, stats=stats))
    teacher = {"id": "rough", "weights_digest": "1" * 64, "dtype": "float32", "engine": "table"}
    spec = spec_of("scores", num_rows=num_rows, input_digest=tokens.digest, stats=STATS, teacher=teacher)
    write_store(folder / "scores", spec, scores)
    heldout_rows = token_rows(11, seed=2)
    heldout = write_store(folder / "heldout", spec_of("tokens", num_rows=None), heldout_rows)
    write_targets(folder / "heldout_teacher", heldout, heldout_rows, true)
    names = ("tokens", "teacher", "early_teacher", "sampled", "scores", "heldout", "heldout_teacher")
    return {name: folder / name for name in names}


STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def config_tree(stores: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    """A small training configuration as plain values; `changes` replace whole groups or, for dicts, merge into them."""
    tree: dict[str, Any] = {
        "run": {"output_dir": str(output), "seed": 3, "max_steps": 8, "num_threads": 1},
        "model": {"config": dict(STUDENT)},
        "data": {
            "tokens": str(stores["tokens"]),
            "heldout": str(stores["heldout"]),
            "heldout_targets": str(stores["heldout_teacher"]),
            "targets": {"teacher": str(stores["teacher"])},
            "scores": {"slm": str(stores["scores"])},
            "global_batch_rows": 4,
            "micro_batch_rows": 2,
        },
        "objective": {"alpha": 0.5},
        "curriculum": [{"targets": "teacher"}],
        "optimizer": {"lr": 3e-3},
        "schedule": {"kind": "wsd", "warmup": 2, "decay": 2},
        "logging": {"every_steps": 2},
        "zero_stage": 0,
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return tree
