"""What people see: a row in a terminal, statistics, alignment, student checks, garbage."""

from __future__ import annotations

import numpy as np
import pytest

from potstill.storage import (
    MismatchError,
    SparseTargets,
    StoreError,
    StoreReader,
    StoreWriter,
    TargetsRow,
    UnsealedError,
    check_alignment,
    check_student,
    collect_garbage,
    format_row,
    seal_store,
    store_stats,
    token_digest,
)
from tests.storage.stores import (
    make_scores_row,
    targets_spec,
    tokens_spec,
    write_targets,
    write_tokens,
)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """Targets whose label column is that of the entries; label among the entries for most tokens."""
    root = tmp_path_factory.mktemp("looking")
    tokens = write_tokens(root / "t", 6)
    spec = targets_spec(6, tokens.digest)
    writer = StoreWriter.create(root / "d", spec)
    for unit in writer.todo():
        writer.commit_unit(unit, [with_labels(tokens.row(r), spec) for r in writer.unit_rows(unit)])
    seal_store(root / "d")
    return tokens, StoreReader(root / "d")


def with_labels(tokens, spec, shift=0):
    """`shift` moves the targets by whole tokens, as an off-by-one would."""
    n = len(tokens.tokens)
    rng = np.random.default_rng(tokens.row)
    ends = set((np.cumsum(tokens.doc_lens) - 1).tolist())
    offsets, ids, logs, label_logprob = [0], [], [], np.zeros(n, np.float32)
    for t in range(n):
        if t in ends:
            offsets.append(offsets[-1])
            continue
        label = int(tokens.tokens[(t + 1 + shift) % n])
        chosen = np.unique(np.append(rng.integers(0, spec.vocab_size, 5), label))
        p = rng.dirichlet(np.ones(len(chosen) + 1))[:-1].astype(np.float32) + 1e-4
        values = np.log(p / (p.sum() + 0.05)).astype(np.float32)
        order = np.lexsort((chosen, -values))
        ids.append(chosen[order])
        logs.append(values[order])
        offsets.append(offsets[-1] + len(chosen))
        label_logprob[t] = values[np.flatnonzero(chosen == label)[0]]
    kept = np.diff(offsets)
    targets = SparseTargets.build(
        offsets=offsets,
        ids=np.concatenate(ids),
        logprobs=np.concatenate(logs),
        log_tail=np.where(kept > 0, np.log(0.04), 0).astype(np.float32),
        entropy=np.where(kept > 0, 1.5, 0).astype(np.float32),
        label_logprob=label_logprob,
        label_rank=np.where(kept > 0, 2, 255).astype(np.int32),
        vocab_size=spec.vocab_size,
    )
    return TargetsRow(tokens.row, token_digest(tokens.tokens, tokens.doc_lens), targets, {"mean_loss": 1.25})


def test_alignment_check_passes_and_catches_a_shift_by_one(aligned, tmp_path):
    tokens, targets = aligned
    report = check_alignment(tokens, targets, num_rows=3)
    assert report.num_rows == 4 or report.num_rows == 3
    assert report.num_labels > 50 and report.num_kept == report.num_agreeing == report.num_labels
    spec = targets.spec
    for shift in (1, -1):
        writer = StoreWriter.create(tmp_path / f"shift{shift}", spec)
        for unit in writer.todo():
            rows = [with_labels(tokens.row(r), spec, shift=shift) for r in writer.unit_rows(unit)]
            writer.commit_unit(unit, rows)
        seal_store(tmp_path / f"shift{shift}")
        with pytest.raises(MismatchError, match="shifted or belong to other tokens"):
            check_alignment(tokens, StoreReader(tmp_path / f"shift{shift}"))


def test_student_checks(aligned):
    _, targets = aligned
    good = {"vocab_size": 1024, "tokenizer_digest": "tok", "context_length": 32}
    check_student(targets, **good)
    for change, message in [
        ({"vocab_size": 999}, "ids go to 999, the student has 999 outputs"),
        ({"tokenizer_digest": "tok2"}, "tokenizer digest tok is not the student's tok2"),
        ({"context_length": 16}, "rows of 32 tokens, the student reads 16"),
    ]:
        with pytest.raises(MismatchError, match=message):
            check_student(targets, **(good | change))


def test_format_row_shows_tokens_and_candidates(aligned):
    tokens, targets = aligned
    text = format_row(tokens, targets, 1, lambda ids: f"<{ids[0]}\x1b>", 5, 2)
    lines = text.splitlines()
    assert lines[0].startswith("row 1: 32 tokens") and "mean_loss 1.2500" in lines[1]
    assert "... 27 more tokens" in lines[-1] and len(lines) == 8
    assert "\x1b" not in text and "\\x1b" in text
    row = tokens.row(1).tokens
    assert f"<{row[0]}" in lines[2] and "p(label)" in lines[2] and "tail 0.0" in lines[2] and ", +" in lines[2]
    assert sum("*" in line for line in format_row(tokens, targets, 1, str, 32, 99).splitlines()) >= 29
    assert format_row(tokens, None, 0, str, 3, 2).count("\n") == 4 - 1 + 1


def test_format_row_of_scores_and_foreign_stores(aligned, tmp_path):
    tokens, _ = aligned
    spec = targets_spec(6, tokens.digest, kind="scores", selection=None, teacher=None)
    writer = StoreWriter.create(tmp_path / "s", spec)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_scores_row(tokens.row(r), spec) for r in writer.unit_rows(unit)])
    seal_store(tmp_path / "s")
    assert "p(label)" in format_row(tokens, StoreReader(tmp_path / "s"), 2, str, 4, 2)
    other = write_tokens(tmp_path / "t2", 6, row_length=31)
    with pytest.raises(MismatchError, match="hold different tokens"):
        format_row(other, StoreReader(tmp_path / "s"), 2, str, 4, 2)
    with pytest.raises(StoreError, match="kind tokens"):
        format_row(tokens, tokens, 2, str, 4, 2)


def test_stats_count_what_is_there(aligned):
    _, targets = aligned
    stats = store_stats(targets.url)
    kept = np.concatenate([np.diff(targets.row(r).targets.offsets) for r in range(6)])
    assert stats.histograms["kept count"].total == len(kept) == stats.num_tokens
    assert stats.histograms["kept count"].counts[0] == int((kept == 0).sum())
    assert stats.histograms["kept count"].mean == pytest.approx(kept.mean())
    assert stats.histograms["entropy (nats)"].counts[3] == int((kept > 0).sum())
    assert 0 < sum(stats.column_bytes.values()) < stats.num_bytes
    assert {"count", "id0", "id1", "val", "tail", "label"} <= set(stats.column_bytes)
    text = stats.format()
    assert "kept mass: mean" in text and "B/token" in text and "label rank" in text


def test_stats_of_all_kinds(aligned, tmp_path):
    tokens, _ = aligned
    assert store_stats(tokens.url).format().startswith(tokens.url)
    sampled = write_sampled(tmp_path, tokens)
    assert store_stats(sampled.url, max_rows=2).sampled_rows == 2


def write_sampled(tmp_path, tokens):
    spec = targets_spec(6, tokens.digest, selection={"mode": "sample", "num_draws": 9})
    writer = StoreWriter.create(tmp_path / "sampled", spec)
    for unit in writer.todo():
        rows = []
        for r in writer.unit_rows(unit):
            row = tokens.row(r)
            targets = SparseTargets.build(
                offsets=np.arange(33) * 2,
                ids=np.tile([3, 5], 32),
                counts=np.tile([6, 3], 32),
                num_draws=9,
                log_tail=np.full(32, -2, np.float32),
                vocab_size=1000,
            )
            rows.append(TargetsRow(r, token_digest(row.tokens, row.doc_lens), targets, {"mean_loss": 0.0}))
        writer.commit_unit(unit, rows)
    seal_store(tmp_path / "sampled")
    return StoreReader(tmp_path / "sampled")


def test_sampled_rows_are_shown_as_counts(aligned, tmp_path):
    tokens, _ = aligned
    text = format_row(tokens, write_sampled(tmp_path, tokens), 0, str, 2, 2)
    assert "6/9" in text and "3/9" in text


def test_skipped_columns_are_not_decoded(tmp_path):
    tokens = write_tokens(tmp_path / "t", 4)
    whole = write_targets(tmp_path / "d", tokens, temperatures=(2.0,)).row(1).targets
    part = StoreReader(tmp_path / "d", skip=("entropy", "label", "label_rank", "tail_at")).row(1).targets
    assert part.entropy is None and part.label_logprob is None and part.label_rank is None and part.log_tail_at == {}
    np.testing.assert_array_equal(part.logprobs, whole.logprobs)
    np.testing.assert_array_equal(part.log_tail, whole.log_tail)
    with pytest.raises(StoreError, match=r"skip: \['ids'\]"):
        StoreReader(tmp_path / "d", skip=("ids",))


def test_gc_leaves_unsealed_stores_alone(tmp_path):
    writer = StoreWriter.create(tmp_path / "t", tokens_spec())
    with pytest.raises(UnsealedError, match="may still be in use"):
        collect_garbage(tmp_path / "t", dry_run=True)
    assert writer.spec.kind == "tokens"


def test_gc_removes_only_what_the_manifest_does_not_name(aligned, tmp_path):
    tokens = write_tokens(tmp_path / "t", 4)
    reader = write_targets(tmp_path / "d", tokens)
    orphan = tmp_path / "d" / "units" / "u0000000-aaaaaaaaaaaa.arrow"
    orphan.write_bytes(b"123")
    (tmp_path / "d" / "tmp" / "left").write_bytes(b"45")
    (tmp_path / "d" / "units" / "keep.txt").write_text("not ours")
    dry = collect_garbage(tmp_path / "d", dry_run=True)
    assert dry.num_bytes == 5 and orphan.exists() and "would remove 2 files, 5 bytes" in dry.format()
    assert collect_garbage(tmp_path / "d", dry_run=False).files == dry.files
    assert not orphan.exists() and (tmp_path / "d" / "units" / "keep.txt").exists()
    assert StoreReader(tmp_path / "d").row(0).row == reader.row(0).row
