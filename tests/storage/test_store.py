"""A store from create to read: round trips of the three kinds, resume, seal, partial reading."""

from __future__ import annotations

import numpy as np
import pytest

from potstill.storage import (
    MismatchError,
    NotAStoreError,
    StoreError,
    StoreReader,
    StoreWriter,
    UnsealedError,
    seal_store,
    store_status,
    verify_store,
)
from tests.storage.stores import (
    make_scores_row,
    make_targets_row,
    make_tokens_row,
    same_targets,
    targets_spec,
    tokens_spec,
    write_targets,
    write_tokens,
)


def test_tokens_round_trip_is_exact_with_a_short_last_row(tmp_path):
    reader = write_tokens(tmp_path / "t", 10, last_tokens=5)
    assert reader.num_rows == 10 and reader.num_tokens == 9 * 32 + 5
    assert reader.row_lengths.tolist() == [32] * 9 + [5]
    for row in range(10):
        wanted = make_tokens_row(row, reader.spec, num_tokens=5 if row == 9 else None)
        found = reader.row(row)
        assert found.row == row
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.doc_lens, wanted.doc_lens)
        assert found.tokens.dtype == np.int32 and found.doc_lens.dtype == np.int32


def test_targets_round_trip_keeps_ids_and_holds_values_to_the_grid(tmp_path):
    tokens = write_tokens(tmp_path / "t", 9)
    reader = write_targets(tmp_path / "d", tokens, temperatures=(2.0, 0.5))
    for row in range(9):
        wanted = make_targets_row(tokens.row(row), reader.spec)
        found = reader.row(row)
        assert found.token_digest == wanted.token_digest
        np.testing.assert_array_equal(found.targets.ids, wanted.targets.ids)
        np.testing.assert_array_equal(found.targets.offsets, wanted.targets.offsets)
        saturated = wanted.targets.logprobs < -15
        error = np.abs(found.targets.logprobs - wanted.targets.logprobs)[~saturated]
        assert error.max() <= 1 / 32 + 1e-6
        np.testing.assert_array_equal(found.targets.label_rank, np.minimum(wanted.targets.label_rank, 255))
        assert found.stats == {"mean_loss": row + 0.5}
    np.testing.assert_array_equal(reader.row_stats["mean_loss"], np.arange(9, dtype=np.float32) + 0.5)


def test_scores_round_trip(tmp_path):
    tokens = write_tokens(tmp_path / "t", 6)
    spec = targets_spec(6, tokens.digest, kind="scores", selection=None, teacher=None)
    writer = StoreWriter.create(tmp_path / "s", spec)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_scores_row(tokens.row(r), spec) for r in writer.unit_rows(unit)])
    seal_store(tmp_path / "s")
    reader = StoreReader(tmp_path / "s")
    for row in range(6):
        wanted, found = make_scores_row(tokens.row(row), spec), reader.row(row)
        assert np.abs(found.label_logprob - wanted.label_logprob).max() <= 1 / 512 + 1e-6
        assert np.abs(found.entropy - wanted.entropy).max() <= 1 / 512 + 1e-6
        np.testing.assert_array_equal(found.label_rank, wanted.label_rank)
        assert found.stats["mean_loss"] == float(np.float32(row / 3))


def test_rows_in_any_order_equal_rows_one_by_one(tmp_path):
    tokens = write_tokens(tmp_path / "t", 11)
    reader = write_targets(tmp_path / "d", tokens)
    order = [10, 3, 3, 0, 7, 2]
    for found, row in zip(reader.rows(order), order, strict=True):
        assert found.row == row and same_targets(found.targets, reader.row(row).targets)
    streamed = list(reader.iter_unit_rows(2, 6))
    assert [r.row for r in streamed] == [2, 3, 4, 5, 6, 7]
    assert all(same_targets(r.targets, reader.row(r.row).targets) for r in streamed)
    with pytest.raises(StoreError, match="row 11 does not exist"):
        reader.row(11)


def test_second_attempt_loses_and_resume_does_only_what_is_missing(tmp_path):
    tokens = write_tokens(tmp_path / "t", 10)
    spec = targets_spec(10, tokens.digest)
    writer = StoreWriter.create(tmp_path / "d", spec)
    rows = {u: [make_targets_row(tokens.row(r), spec) for r in writer.unit_rows(u)] for u in range(3)}
    assert writer.num_units == 3 and writer.todo() == [0, 1, 2]
    assert writer.todo(worker=1, num_workers=2) == [1]
    assert writer.commit_unit(1, rows[1], extra={"seconds": 2.5})
    assert not writer.commit_unit(1, rows[1])
    again = StoreWriter.create(tmp_path / "d", spec)
    assert again.todo() == [0, 2]
    assert again.committed()[1].extra == {"seconds": 2.5} and again.committed()[1].rows == range(4, 8)
    again.record_failure(2, "no memory")
    status = store_status(tmp_path / "d")
    assert (status.num_units, status.committed, status.failed, status.missing, status.sealed) == (3, 1, 1, 2, False)
    with pytest.raises(UnsealedError, match=r"2 of 3 units are missing \(first: \[0, 2\]\)"):
        seal_store(tmp_path / "d")
    for unit in again.todo():
        assert again.commit_unit(unit, rows[unit])
    assert seal_store(tmp_path / "d") == seal_store(tmp_path / "d")
    assert store_status(tmp_path / "d").sealed
    assert len(list((tmp_path / "d" / "units").glob("*.arrow"))) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer_digest", "other"),
        ("vocab_size", 1001),
        ("row_length", 64),
        ("selection", {"mode": "top_k", "k": 15}),
        ("selection", {"mode": "top_p_k", "p": 0.95, "k": 16}),
        ("teacher", {"id": "toy", "weights_digest": "01", "dtype": "float32"}),
        ("input_digest", "another"),
        ("temperatures", (2.0,)),
        ("stats", ()),
        ("info", {"note": 1}),
    ],
)
def test_another_run_in_the_same_folder_is_refused_by_field(tmp_path, field, value):
    StoreWriter.create(tmp_path / "d", targets_spec(8, "in"))
    other = targets_spec(8, "in", **{field: value})
    with pytest.raises(MismatchError, match=rf"stands here: {field}[ .]"):
        StoreWriter.create(tmp_path / "d", other)
    StoreWriter.create(tmp_path / "d", other, force=True)
    assert StoreWriter.create(tmp_path / "d", other).todo() == [0, 1]


def test_unsealed_store_is_refused_and_partial_is_frozen(tmp_path):
    tokens = write_tokens(tmp_path / "t", 12)
    spec = targets_spec(12, tokens.digest)
    writer = StoreWriter.create(tmp_path / "d", spec)

    def commit(unit):
        writer.commit_unit(unit, [make_targets_row(tokens.row(r), spec) for r in writer.unit_rows(unit)])

    commit(0)
    commit(2)
    with pytest.raises(UnsealedError, match="not sealed"):
        StoreReader(tmp_path / "d")
    partial = StoreReader(tmp_path / "d", allow_partial=True)
    assert (partial.num_rows, partial.num_units) == (4, 1)
    commit(1)
    frozen = StoreReader(tmp_path / "d", allow_partial=True, num_units=partial.num_units)
    assert frozen.digest == partial.digest and frozen.num_rows == 4
    assert same_targets(frozen.row(3).targets, partial.row(3).targets)
    more = StoreReader(tmp_path / "d", allow_partial=True)
    assert more.num_rows == 12 and more.digest != partial.digest
    seal_store(tmp_path / "d")
    after = StoreReader(tmp_path / "d", allow_partial=True, num_units=1)
    assert after.digest == partial.digest


def test_digest_depends_on_content_only(tmp_path):
    tokens = write_tokens(tmp_path / "t", 9)
    assert write_tokens(tmp_path / "t2", 9).digest == tokens.digest
    a, b = write_targets(tmp_path / "a", tokens), write_targets(tmp_path / "b", tokens)
    assert a.digest == b.digest
    assert write_targets(tmp_path / "c", tokens, seed=1).digest != a.digest


def test_not_a_store(tmp_path):
    with pytest.raises(NotAStoreError, match=r"does not exist"):
        StoreReader(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(StoreError, match=r"other files \(notes.txt\)"):
        StoreWriter.create(tmp_path / "other", tokens_spec())


def test_zero_rows(tmp_path):
    writer = StoreWriter.create(tmp_path / "d", targets_spec(0, "in"))
    assert writer.todo() == []
    seal_store(tmp_path / "d")
    reader = StoreReader(tmp_path / "d")
    assert reader.num_rows == 0 and reader.row_lengths.shape == (0,)
    assert verify_store(tmp_path / "d", deep=True).ok
    StoreWriter.create(tmp_path / "t", tokens_spec())
    with pytest.raises(UnsealedError, match="nothing to seal"):
        seal_store(tmp_path / "t")


def test_frequency_ranked_ids_give_the_same_rows(tmp_path):
    tokens = write_tokens(tmp_path / "t", 6)
    plain = write_targets(tmp_path / "p", tokens)
    spec = plain.spec
    frequencies = np.random.default_rng(0).integers(0, 100, 1000)
    writer = StoreWriter.create(tmp_path / "f", spec, id_frequencies=frequencies)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_targets_row(tokens.row(r), spec) for r in writer.unit_rows(unit)])
    seal_store(tmp_path / "f")
    ranked = StoreReader(tmp_path / "f")
    assert ranked.digest != plain.digest and verify_store(tmp_path / "f", deep=True).ok
    for row in range(6):
        assert same_targets(ranked.row(row).targets, plain.row(row).targets)
    with pytest.raises(MismatchError, match="id_map_sha256"):
        StoreWriter.create(tmp_path / "f", spec)


def test_verify_deep_accepts_sound_stores(tmp_path):
    tokens = write_tokens(tmp_path / "t", 9)
    write_targets(tmp_path / "d", tokens, temperatures=(2.0,))
    seen = []
    for path in (tmp_path / "t", tmp_path / "d"):
        report = verify_store(path, deep=True, progress=seen.append)
        assert report.ok and report.sealed and report.num_rows == 9, report.format()
    assert sum(seen) == 18


def test_the_rate_is_that_of_work_without_pauses_and_follows_the_workers(tmp_path, monkeypatch):
    """Ten units by one worker, a night, ten by four: 4 rows in 1000 s each."""
    tokens = write_tokens(tmp_path / "t", 88)
    spec = targets_spec(88, tokens.digest)
    writer = StoreWriter.create(tmp_path / "d", spec)
    night = 40_000.0
    ends = [1000.0 * (unit + 1) for unit in range(10)]
    ends += [10_000 + night + 1000 * (1 + number // 4) for number in range(10)]
    for unit, end in enumerate(ends):
        monkeypatch.setattr("time.time", lambda end=end: end)
        rows = [make_targets_row(tokens.row(row), spec) for row in writer.unit_rows(unit)]
        writer.commit_unit(unit, rows, extra={"seconds": 1000.0})
        if unit == 9:
            status = store_status(tmp_path / "d")
            assert status.rate_rows_per_second == pytest.approx(4 / 1000) and status.active_seconds == 10_000
            assert status.eta_seconds == pytest.approx(48 / 0.004)
    status = store_status(tmp_path / "d")
    # The last three units' time: 10 units by four workers in 3000 s, nothing of the night and of the first worker.
    assert status.rate_rows_per_second == pytest.approx(40 / 3000)
    assert status.active_seconds == 13_000 and status.worker_seconds == 20_000
