"""Draws of another power than 1: log weights in the store, exact, and shut to readers that do not know them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from potstill.storage import (
    RunSpec,
    SparseTargets,
    StoreError,
    StoreReader,
    StoreWriter,
    TargetsRow,
    VersionError,
    concatenate,
    format_row,
    seal_store,
    store_stats,
    token_digest,
    verify_store,
)
from potstill.storage.files.checked_json import canonical
from potstill.storage.rows.codec import decode_targets, encode_targets
from potstill.storage.rows.columns import COLUMNS
from potstill.storage.rows.value_grid import LEAST_LOG_WEIGHT, WEIGHT_TOP
from tests.storage import independent_reader
from tests.storage.stores import same_targets, targets_spec, write_tokens
from tests.storage.test_format import GOLDEN, assert_same

WEIGHTED = {"mode": "sample", "num_draws": 9, "power": 0.8}


def weighted_targets(seed: int, num_tokens: int, vocab_size: int = 1000) -> SparseTargets:
    """Weights anywhere on the grid, its two ends and ties among them; the last token has none."""
    rng = np.random.default_rng(seed)
    kept = np.append(rng.integers(1, 10, num_tokens - 1), 0)
    ids, codes = [], []
    for size in kept:
        chosen = rng.choice(vocab_size, size, replace=False)
        code = rng.choice([0, 7, 100, 101, 255], size)
        order = np.lexsort((chosen, code))
        ids.append(chosen[order])
        codes.append(code[order])
    return SparseTargets.build(
        offsets=np.append(0, np.cumsum(kept)),
        ids=np.concatenate(ids).astype(np.int32),
        log_weights=(WEIGHT_TOP - np.concatenate(codes) / 16).astype(np.float32),
        num_draws=9,
        log_tail=np.where(kept > 0, -2, 0).astype(np.float32),
        vocab_size=vocab_size,
        strict=True,
    )


@pytest.fixture
def stores(tmp_path):
    """(tokens, targets with weights), six rows each."""
    tokens = write_tokens(tmp_path / "t", 6)
    run = targets_spec(6, tokens.digest, selection=WEIGHTED)
    writer = StoreWriter.create(tmp_path / "d", run)
    for unit in writer.todo():
        rows = []
        for r in writer.unit_rows(unit):
            row = tokens.row(r)
            digest = token_digest(row.tokens, row.doc_lens)
            rows.append(TargetsRow(r, digest, weighted_targets(r, len(row.tokens)), {"mean_loss": 0.0}))
        writer.commit_unit(unit, rows)
    seal_store(tmp_path / "d")
    return tokens, StoreReader(tmp_path / "d")


def test_weights_come_back_exactly(stores):
    _, reader = stores
    for row in range(6):
        found = reader.row(row).targets
        assert same_targets(found, weighted_targets(row, 32)) and found.num_draws == 9
        assert found.counts is None and found.logprobs is None
    assert verify_store(reader.url, deep=True).ok
    _, _, rows = independent_reader.read_store(reader.url)
    assert_same(reader, rows)


def test_weights_are_cut_and_joined_with_their_tokens():
    whole = weighted_targets(0, 32)
    assert same_targets(concatenate([whole.slice(0, 5), whole.slice(5, 32)]), whole)
    sides = {"entropy": None, "label_logprob": None, "label_rank": None}
    empty = replace(SparseTargets.empty(3, spec=targets_spec(1, "in", selection=WEIGHTED)), **sides)
    joined = concatenate([empty, whole])
    assert joined.counts is None and np.array_equal(joined.log_weights, whole.log_weights)
    drawn = targets_spec(1, "in", selection=WEIGHTED | {"power": 1.0})
    with pytest.raises(StoreError, match="some parts have counts"):
        concatenate([replace(SparseTargets.empty(3, spec=drawn), **sides), whole])


def test_an_older_reader_refuses_the_store(stores):
    _, reader = stores
    assert reader.spec.to_json()["required_features"] == ["planes", "importance_weights"]
    table = dict(COLUMNS)
    del COLUMNS["log_weights"]
    try:
        with pytest.raises(VersionError, match=r"needs the features \['importance_weights'\]"):
            StoreReader(reader.url)
    finally:  # in its order, which is that of the files
        COLUMNS.clear()
        COLUMNS.update(table)


@pytest.mark.parametrize(
    ("selection", "features"),
    [(WEIGHTED, ["planes"]), (WEIGHTED | {"power": 1.0}, ["planes", "importance_weights"])],
)
def test_power_and_feature_go_together(selection, features):
    value = targets_spec(1, "in", selection=selection).to_json() | {"required_features": features}
    with pytest.raises(VersionError, match="do not go together"):
        RunSpec.from_json(value)


def test_draws_at_power_one_keep_their_bytes():
    """run.json and planes of the golden store of draws, written before there were weights, come out the same."""
    text = (GOLDEN / "sampled" / "run.json").read_bytes()[:-21] + b"}"
    reader = StoreReader(GOLDEN / "sampled")
    assert canonical(reader.spec.to_json()).encode() == text
    assert reader.spec.fingerprint == hashlib.sha256(text).hexdigest() and json.loads(text)["selection"]["power"] == 1.0
    targets = reader.row(0).targets
    planes = encode_targets(targets, spec=reader.spec)
    assert list(planes) == ["count", "id0", "id1", "draws", "tail", "entropy", "label", "label_rank"]
    assert np.array_equal(planes["draws"], targets.counts)
    assert same_targets(decode_targets(planes, spec=reader.spec, num_entries=targets.num_entries), targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_weights": [0.0, -0.3]}, "multiples of 1/16"),
        ({"log_weights": [WEIGHT_TOP + 1 / 16, 0.0]}, "multiples of 1/16 in [-8.9375, 7.0]"),
        ({"log_weights": [0.0, LEAST_LOG_WEIGHT - 1 / 16]}, "entry 1 holds -9.0 (id 5)"),
        ({"log_weights": [0.0, np.nan]}, "stochastic rounding"),
        ({"log_weights": [-1.0, 0.0]}, "sorted by weight descending"),
        ({"ids": [5, 3], "log_weights": [0.0, 0.0]}, "then id ascending"),
        ({"log_weights": [0.0]}, "log_weights: found 1 values for 2 entries"),
        ({"num_draws": None}, "come with num_draws"),
        ({"counts": np.uint8([5, 4])}, "neither logprobs nor counts"),
        ({"logprobs": np.float32([-1, -2])}, "neither logprobs nor counts"),
    ],
)
def test_bad_weights_are_refused(change, message):
    values = {
        "offsets": [0, 2],
        "ids": [3, 5],
        "log_weights": [0.5, -1.0],
        "num_draws": 9,
        "log_tail": np.float32([-2]),
    }
    values |= change
    values["log_weights"] = np.float32(values["log_weights"])
    with pytest.raises(StoreError, match=re.escape(message)):
        SparseTargets.build(**values, vocab_size=10)


def test_a_sum_above_one_is_no_error():
    """The weights of a token sum to 1 in the mean over draws only."""
    SparseTargets.build(
        offsets=[0, 1], ids=[3], log_weights=np.float32([2.0]), num_draws=9, log_tail=np.float32([-2]), vocab_size=10
    )


@pytest.mark.parametrize("selection", [WEIGHTED | {"power": 1.0}, {"mode": "top_k", "k": 9}])
def test_weights_in_a_store_of_something_else_are_refused(selection, tmp_path):
    tokens = write_tokens(tmp_path / "t", 1)
    writer = StoreWriter.create(tmp_path / "d", targets_spec(1, tokens.digest, selection=selection))
    row = tokens.row(0)
    digest = token_digest(row.tokens, row.doc_lens)
    with pytest.raises(StoreError, match=r"row 0: .* do(es)? not fit|row 0: num_draws is 9"):
        writer.commit_unit(0, [TargetsRow(0, digest, weighted_targets(0, 32), {"mean_loss": 0.0})])


def test_counts_in_a_store_of_weights_are_refused(tmp_path):
    tokens = write_tokens(tmp_path / "t", 1)
    writer = StoreWriter.create(tmp_path / "d", targets_spec(1, tokens.digest, selection=WEIGHTED))
    row = tokens.row(0)
    targets = SparseTargets.build(
        offsets=np.arange(33), ids=np.full(32, 3), counts=np.full(32, 9), num_draws=9,
        log_tail=np.full(32, -2, np.float32), vocab_size=1000,
    )  # fmt: skip
    with pytest.raises(StoreError, match="log_weights do not fit"):
        writer.commit_unit(0, [TargetsRow(0, token_digest(row.tokens, row.doc_lens), targets, {"mean_loss": 0.0})])


def test_weights_are_shown(stores):
    tokens, reader = stores
    weight = np.exp(reader.row(0).targets.log_weights[0])
    assert f" w{weight:.3f}" in format_row(tokens, reader, 0, str, 2, 2)
    sums = store_stats(reader.url).histograms["sum of weights"]
    expected = [np.exp(reader.row(r).targets.log_weights.astype(np.float64)).sum() for r in range(6)]
    assert sums.total == 6 * 31 and sums.mean * sums.total == pytest.approx(sum(expected))
