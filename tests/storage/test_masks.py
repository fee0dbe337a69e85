"""Masks of tokens: one bit each, one form for each row, refused where they do not fit, seen by whoever looks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.storage import (
    COLUMNS,
    TOKENS_COLUMNS,
    CorruptError,
    EpochPlan,
    Loader,
    MismatchError,
    RunSpec,
    StoreError,
    StoreReader,
    StoreWriter,
    TargetsRow,
    TokensColumn,
    TokensRow,
    VersionError,
    check_alignment,
    check_places,
    format_row,
    seal_store,
    store_stats,
    token_digest,
    verify_store,
)
from potstill.storage.files.unit_file import DecodedBatch, encode_unit
from potstill.storage.rows.tokens_columns import pack_mask
from tests.storage.stores import (
    make_masked_row,
    make_targets,
    targets_spec,
    tokens_spec,
    write_masked,
    write_tokens,
)

NUM_ROWS = 7
SPEC = tokens_spec(columns=("mask",))
MASK = TOKENS_COLUMNS["mask"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    return write_masked(tmp_path_factory.mktemp("masks") / "t", NUM_ROWS)


def row_of(mask: Any, num_tokens: int = 20) -> TokensRow:
    return TokensRow(0, np.arange(num_tokens, dtype=np.int32), np.array([num_tokens], np.int32), mask)


def commit(path: Path, row: TokensRow, spec: RunSpec = SPEC) -> StoreReader:
    StoreWriter.create(path, spec).commit_unit(0, [row])
    seal_store(path)
    return StoreReader(path)


def test_rows_come_back_with_their_masks(masked: StoreReader) -> None:
    for row in masked.tokens_rows(range(NUM_ROWS)):
        given_row = make_masked_row(row.row, masked.spec)
        np.testing.assert_array_equal(row.tokens, given_row.tokens)
        if given_row.mask is None or given_row.mask.all():
            assert row.mask is None
        else:
            assert row.mask is not None and row.mask.dtype == np.bool_
            np.testing.assert_array_equal(row.mask, given_row.mask)
        labels, wanted = row.labels(), row.has_target()
        assert ((labels >= 0) == wanted).all() and not wanted[np.cumsum(row.doc_lens) - 1].any()
        if row.mask is not None:
            assert not wanted[:-1][~row.mask[1:]].any()
    assert masked.spec.required_features == ["planes", "loss_mask"] and masked.spec.stores("mask")
    assert verify_store(masked.url, deep=True).ok
    assert RunSpec.from_json(masked.spec.to_json()) == masked.spec


@given(bits=st.lists(st.booleans(), min_size=1, max_size=70))
@settings(max_examples=100, deadline=None)
def test_any_mask_survives_in_one_bit_a_token(bits: list[bool]) -> None:
    mask = np.array(bits)
    plane = MASK.to_bytes(mask)
    found = MASK.from_bytes(plane, num_tokens=len(bits))
    if all(bits):
        assert not plane.size and found is None
        return
    assert len(plane) == -(-len(bits) // 8) and found is not None and found.tolist() == bits
    # As docs/format.md says: token 8b + i is bit i of byte b.
    assert [bool(plane[n // 8] >> n % 8 & 1) for n in range(len(bits))] == bits


def test_equal_rows_have_equal_bytes() -> None:
    def digest(mask: Any) -> str:
        return encode_unit([row_of(mask)], spec=SPEC, unit=0, id_map=None).sha256

    one_off = np.arange(20) != 7
    assert digest(None) == digest(np.ones(20, np.bool_)) != digest(one_off)
    # The order of bytes in memory is no part of the row.
    assert digest(one_off) == digest(np.repeat(one_off, 2)[::2])


def test_the_digest_of_tokens_does_not_see_the_mask_and_that_of_the_store_does(tmp_path: Path) -> None:
    stores = [commit(tmp_path / str(n), row_of(np.arange(20) != n)) for n in (7, 8)]
    first, second = (store.tokens_rows([0])[0] for store in stores)
    assert token_digest(first.tokens, first.doc_lens) == token_digest(second.tokens, second.doc_lens)
    assert stores[0].digest != stores[1].digest


@pytest.mark.parametrize(
    ("row", "spec", "message"),
    [
        (row_of(np.zeros(20, np.bool_)), tokens_spec(), "row 0: mask does not fit: the run does not name the column"),
        (row_of(np.zeros(20, np.uint8)), SPEC, "row 0: mask: found uint8 of shape .* expected bool"),
        (row_of(np.zeros(19, np.bool_)), SPEC, r"mask: found bool of shape \(19,\), expected bool of shape \(20,\)"),
        (row_of(np.zeros((20, 1), np.bool_)), SPEC, r"mask: found bool of shape \(20, 1\)"),
        (replace(row_of(None), more={"mask": np.zeros(20, np.bool_)}), SPEC, r"more: no columns \['mask'\]"),
        (replace(row_of(None), more={"turn": np.zeros(20, np.int8)}), SPEC, r"more: no columns \['turn'\]"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, row: TokensRow, spec: RunSpec, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        StoreWriter.create(tmp_path / "t", spec).commit_unit(0, [row])


def test_a_reader_that_knows_no_masks_refuses_the_store(masked: StoreReader, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=r"skip: \['mask'\] are not among"):
        StoreReader(masked.url, skip=("mask",))
    value = masked.spec.to_json()
    with pytest.raises(VersionError, match="mask and the feature loss_mask come together"):
        RunSpec.from_json(value | {"required_features": ["planes"]})
    with pytest.raises(VersionError, match="mask and the feature loss_mask come together"):
        RunSpec.from_json({name: field for name, field in value.items() if name != "columns"})
    with pytest.raises(StoreError, match=r"columns \('mask',\) must be distinct and among \[\] in a targets store"):
        targets_spec(1, "in", columns=("mask",))
    monkeypatch.delitem(TOKENS_COLUMNS, "mask")
    with pytest.raises(VersionError, match=r"needs the features \['loss_mask'\], which this reader does not know"):
        StoreReader(masked.url)


def bits_behind_the_end(mask: Any) -> Any:
    plane = pack_mask(mask)
    plane[-1] |= 0x80
    return plane


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        ({"encode": bits_behind_the_end}, "plane mask has bits behind the last of 20 tokens"),
        ({"encode": lambda mask: pack_mask(np.ones_like(mask))}, "plane mask spells out what an empty one says"),
        ({"encode": lambda mask: pack_mask(mask)[:-1]}, "plane mask has 2 bytes, expected 3"),
        ({"encode": lambda mask: pack_mask(np.append(mask, np.zeros(8, bool)))}, "offsets of plane mask are damaged"),
    ],
)
def test_bytes_that_no_writer_makes_are_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: dict[str, Any], message: str
) -> None:
    """Every checksum fits: another program wrote them so."""
    monkeypatch.setitem(TOKENS_COLUMNS, "mask", replace(MASK, **writer))
    commit(tmp_path / "t", row_of(np.arange(20) % 3 == 0))
    monkeypatch.setitem(TOKENS_COLUMNS, "mask", MASK)
    with pytest.raises(CorruptError, match=rf"u0000000-.*, row 0: {message}"):
        StoreReader(tmp_path / "t").row(0)
    assert any(message in problem for problem in verify_store(tmp_path / "t", deep=True).problems)


def test_a_flipped_bit_never_changes_a_mask_in_silence(masked: StoreReader) -> None:
    """Even behind a checksum of the message that fits: that of the plane does not."""
    entry = masked._locate(0)
    data = (Path(masked.url) / "units" / masked.manifest.units[0].file).read_bytes()
    message = data[int(entry["offset"]) : int(entry["offset"]) + int(entry["length"])]
    wanted = masked.tokens_rows(range(4))
    noticed = 0
    for place in range(0, len(message), 3):
        damaged = bytearray(message)
        damaged[place] ^= 1 << place % 8
        try:
            batch = DecodedBatch(bytes(damaged), spec=masked.spec, where="here")
            found = [batch.decode(row, row=row, stats={}, id_map=None) for row in range(4)]
        except CorruptError:
            noticed += 1
            continue
        for row, given_row in zip(found, wanted, strict=True):
            assert isinstance(row, TokensRow)
            np.testing.assert_array_equal(row.mask, given_row.mask)
            np.testing.assert_array_equal(row.tokens, given_row.tokens)
    assert noticed > len(message) / 3 / 4


def test_the_loader_hands_masks_out(masked: StoreReader) -> None:
    with Loader(EpochPlan(NUM_ROWS, global_batch=4, seed=0, joined=[]), masked, {}) as loader:
        for _ in range(2):
            for row in next(loader).tokens:
                found = masked.tokens_rows([row.row])[0].mask
                assert (row.mask is None) == (found is None)
                np.testing.assert_array_equal(row.mask, found)


def test_a_store_is_not_resumed_with_or_without_masks(tmp_path: Path) -> None:
    StoreWriter.create(tmp_path / "t", SPEC).commit_unit(0, [make_masked_row(row, SPEC) for row in range(4)])
    with pytest.raises(MismatchError, match=r'columns is \["mask"\] in the store, null is wanted now'):
        StoreWriter.create(tmp_path / "t", tokens_spec())


@pytest.fixture
def taught(masked: StoreReader, tmp_path: Path) -> Any:
    """Writes targets over the masked rows, at the positions that a function of the row chooses."""

    def write(places: Any) -> StoreReader:
        spec = targets_spec(NUM_ROWS, masked.digest, stats=())
        writer = StoreWriter.create(tmp_path / "d", spec)
        for unit in writer.todo():
            rows = []
            for row in masked.tokens_rows(writer.unit_rows(unit)):
                targets = make_targets(row.row, len(row.tokens), places=places(row))
                rows.append(TargetsRow(row.row, token_digest(row.tokens, row.doc_lens), targets))
            writer.commit_unit(unit, rows)
        seal_store(tmp_path / "d")
        return StoreReader(tmp_path / "d")

    return write


def test_a_target_where_nothing_is_trained_on_is_found(masked: StoreReader, taught: Any) -> None:
    def one_too_many(row: TokensRow) -> Any:
        places = row.has_target()
        if row.row == 1:
            places[2] = True  # predicts token 3, which is off
        return places

    targets = taught(one_too_many)
    row = masked.tokens_rows([1])[0]
    assert row.mask is not None and not row.mask[3] and row.doc_lens[0] > 4
    for check in (check_places, check_alignment):
        with pytest.raises(MismatchError, match=r"row 1, position 2 holds .* token 3 is not trained on \(its mask is"):
            check(masked, targets)
    text = format_row(masked, targets, 1, str, 32, 3)
    assert text.splitlines()[0].startswith("row 1: 28 tokens, 13 of them trained on")


def test_targets_where_something_is_trained_on_pass(masked: StoreReader, taught: Any) -> None:
    targets = taught(TokensRow.has_target)
    check_places(masked, targets)
    found = store_stats(targets.url)
    wanted = sum(int(row.has_target().sum()) for row in masked.tokens_rows(range(NUM_ROWS)))
    assert found.histograms["kept mass"].total == wanted


def test_a_target_at_the_end_of_a_document_is_found(masked: StoreReader, taught: Any) -> None:
    row = masked.tokens_rows([0])[0]
    end = int(row.doc_lens[0]) - 1
    with pytest.raises(MismatchError, match=rf"row 0, position {end} holds .* token {end} ends its document"):
        check_places(masked, taught(lambda row: np.ones(len(row.tokens), np.bool_)))


def test_a_row_in_a_terminal_marks_what_is_not_trained_on(masked: StoreReader) -> None:
    row = masked.tokens_rows([1])[0]
    lines = format_row(masked, None, 1, lambda ids: "x", 99, 3).splitlines()
    assert row.mask is not None
    assert [line[6] == "-" for line in lines[1:]] == (~row.mask).tolist()
    assert "trained on" not in format_row(masked, None, 0, str, 9, 3)


def test_statistics_say_what_is_trained_on_and_how_full_rows_are(masked: StoreReader, tmp_path: Path) -> None:
    rows = masked.tokens_rows(range(NUM_ROWS))
    found = store_stats(masked.url)
    assert found.rows is not None and found.rows.masked
    tokens = sum(len(row.tokens) for row in rows)
    trained = sum(len(row.tokens) if row.mask is None else int(row.mask.sum()) for row in rows)
    assert found.rows.trained_share == trained / tokens and found.rows.filled_share == tokens / (32 * NUM_ROWS)
    assert (found.rows.num_short, found.rows.num_without_target) == (3, 2)
    assert "mask" in found.column_bytes
    text = found.format()
    assert "of 7 rows 3 are shorter, 2 have nothing to predict" in text and "% of the tokens are trained on" in text
    plain = store_stats(write_tokens(tmp_path / "p", 3).url)
    assert plain.rows is not None and plain.rows.trained_share == 1 and "all tokens trained on" in plain.format()
    assert store_stats(write_tokens(tmp_path / "one", 1, last_tokens=1).url).rows.num_without_target == 1  # type: ignore[union-attr]


def test_a_column_that_is_not_optional_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = TokensColumn(
        name="kind",
        axis="row",
        dtype=np.uint8,
        encode=lambda values: values,
        decode=lambda plane, num_tokens: plane,
        feature="kinds",
    )
    monkeypatch.setitem(TOKENS_COLUMNS, "kind", kind)
    spec = tokens_spec(columns=("kind",))
    with pytest.raises(StoreError, match="row 0: kind is missing, and the run names it"):
        StoreWriter.create(tmp_path / "t", spec).commit_unit(0, [row_of(None)])
    with pytest.raises(StoreError, match=r"kind: found uint8 of shape \(20,\), expected uint8 of shape \(1,\)"):
        commit(tmp_path / "t", replace(row_of(None), more={"kind": np.zeros(20, np.uint8)}), spec)
    found = commit(tmp_path / "t", replace(row_of(None), more={"kind": np.array([9], np.uint8)}), spec)
    assert found.tokens_rows([0])[0].column("kind") == [9]

    def below_nine(values: Any) -> None:
        if values[0] >= 9:
            raise StoreError(f"kind: found {values[0]}, expected less than 9")

    monkeypatch.setitem(TOKENS_COLUMNS, "kind", replace(kind, check=below_nine))
    [problem] = verify_store(found.url, deep=True).problems
    assert "row 0: kind: found 9, expected less than 9" in problem


def test_columns_of_tokens_and_of_targets_may_share_a_name(
    masked: StoreReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_targets = replace(COLUMNS["entropy"], name="mask", stored=None, feature="other_masks")
    monkeypatch.setitem(COLUMNS, "mask", of_targets)
    assert masked.spec.required_features == ["planes", "loss_mask"]
    assert targets_spec(1, "in", columns=("mask",)).required_features == ["planes", "other_masks"]
