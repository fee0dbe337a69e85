"""Small stores for the tests of the command: prepared from text by the command itself, targets made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potstill.launch.cli import main
from potstill.storage import RunSpec, SparseTargets, StoreReader, StoreWriter, TargetsRow, TokensRow, token_digest

VOCAB = 300


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 short documents as JSON lines."""
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    words = ["the", "still", "runs", "and", "the", "pot", "is", "hot", "so", "the", "spirit", "rises", "and", "falls"]
    lines = [
        '{"text": "' + " ".join(words[(7 * line + word) % len(words)] for word in range(30)) + '"}'
        for line in range(40)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def data(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with train/, heldout/ and tokenizer/, made by `potstill prepare`."""
    folder = tmp_path_factory.mktemp("data") / "d"
    words = f"prepare --input {text} --output {folder} --vocab-size {VOCAB} --row-length 32 --rows-per-unit 4"
    assert main([*words.split(), "--heldout-fraction", "0.2"]) == 0
    return folder


def write_targets(tokens: Path, path: Path, *, units: int | None = None) -> StoreWriter:
    """Commit the first `units` units (None: all) of a targets store over a tokens store: three entries per target."""
    reader = StoreReader(tokens)
    spec = RunSpec(
        kind="targets",
        row_length=reader.spec.row_length,
        rows_per_unit=reader.spec.rows_per_unit,
        num_rows=reader.num_rows,
        vocab_size=reader.spec.vocab_size,
        tokenizer_digest=reader.spec.tokenizer_digest,
        input_digest=reader.digest,
        selection={"mode": "top_k", "k": 3},
        stats=("mean_loss",),
        teacher={"id": "made-up", "weights_digest": "0" * 64, "dtype": "float32", "engine": "none"},
    )
    writer = StoreWriter.create(path, spec)
    assert writer.num_units is not None
    for unit in range(writer.num_units if units is None else units):
        writer.commit_unit(
            unit, [made_up_row(row, spec.vocab_size) for row in reader.rows(list(writer.unit_rows(unit)))]
        )
    return writer


def made_up_row(row: object, vocab_size: int) -> TargetsRow:
    """Targets whose first candidate is the label, with p = 1/2, 1/4, 1/8 and a tail of 1/8."""
    assert isinstance(row, TokensRow)
    has_target = row.has_target()
    labels = np.roll(row.tokens, -1)
    ids = np.stack([labels, (labels + 1) % vocab_size, (labels + 2) % vocab_size], axis=1)[has_target]
    targets = SparseTargets.build(
        offsets=np.concatenate([[0], np.cumsum(3 * has_target)]),
        ids=ids.ravel(),
        logprobs=np.tile(np.log([0.5, 0.25, 0.125]), has_target.sum()),
        log_tail=np.where(has_target, np.log(0.125), 0.0),
        entropy=np.where(has_target, 1.0, 0.0),
        label_logprob=np.where(has_target, np.log(0.5), 0.0),
        label_rank=np.where(has_target, 0, 255),
        vocab_size=vocab_size,
    )
    digest = token_digest(row.tokens, row.doc_lens)
    return TargetsRow(row=row.row, token_digest=digest, targets=targets, stats={"mean_loss": 0.7})
