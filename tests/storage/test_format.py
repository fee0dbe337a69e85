"""The format as docs/format.md tells it: golden stores, and a reader that knows only that page."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from potstill.storage import StoreReader, TargetsRow, TokensRow, verify_store
from potstill.storage.files.unit_file import FULL_BATCH_BYTES, group_rows
from potstill.storage.rows.codec import planes_of
from tests.storage import independent_reader
from tests.storage.stores import targets_spec, write_targets, write_tokens

GOLDEN = Path(__file__).parent / "golden"
# store digest and sha256 of the decoded rows: a newer version must read these stores to the same values without end.
PINNED = {
    "tokens": ("327cfddd1d28367fafc6c31c77a2a8c1009066a77ec283c0829a6311d22571f9", "e06b09153f28cbd0"),
    "targets": ("44ac2f182e7ed4d3b42c80c1b1c126730e5f9b32d6e37eab17a249e464b56ff4", "04b79b091a66bcac"),
    "tokens_small": ("876abdb99a723fc98e01e42c1af2b2449ed68a27906563da16f916e9c67cdf7f", "5063dafdae1ffdee"),
    "sampled": ("2622027a880a1c479d400db7f645e00867bfbbd7b18f859881541e80491e595b", "12939d3570853369"),
    "weighted": ("5b45e23d10d9613ee5b369fd64263f00f4985546cc1d18c26bb390680be67cab", "ca3589c8765f1c7e"),
    "masked": ("dd1302206b6a591cb9c7bf53317fd8c232d21b46105fb954de0c5dfe40667e11", "c7ab570af4045fad"),
    "kept": ("83eca6e322b1a1ec27d17a7f6bcd12f7d032a192c99f57ec3fa222f0b767461d", "419b6fdc3756a546"),
    "rolled": ("1564976facae4e69dc7e1c4c0ab6c2582b7da7026f39ac4e5ad03b79d8e8e76b", "75d8a1e9ca35785b"),
    "scores": ("6f6e2bb015abd6014da36aec30af8696c197071069e2390c5c7c4e536bd0d4a4", "45293128f36e7f96"),
}


def test_golden_stores_stay_small():
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 100_000


@pytest.mark.parametrize("name", sorted(PINNED))
def test_golden_stores_read_to_the_pinned_values(name):
    run, manifest, rows = independent_reader.read_store(GOLDEN / name)
    digest, values = PINNED[name]
    assert manifest["store_digest"] == digest and run["format"] == {"major": 1, "minor": 0}
    assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest().startswith(values)
    reader = StoreReader(GOLDEN / name)
    assert reader.digest == digest and verify_store(GOLDEN / name, deep=True).ok
    assert_same(reader, rows)


def assert_same(reader, rows):
    """The project's reader and the independent one agree on every value."""
    assert reader.num_rows == len(rows)
    for number, other in enumerate(rows):
        row = reader.row(number)
        if isinstance(row, TokensRow):
            assert row.tokens.tolist() == other["tokens"] and row.doc_lens.tolist() == other["doc_lens"]
            mask = np.ones(len(row.tokens), bool) if row.mask is None else row.mask
            assert reader.spec.stores("mask") == ("mask" in other)
            assert mask.tolist() == [bool(bit) for bit in other.get("mask", mask)]
            continue
        assert row.token_digest == other["token_digest"] and dict(row.stats) == other["stats"]
        if isinstance(row, TargetsRow):
            assert_same_targets(row.targets, other)
            continue
        for name in ("label_logprob", "entropy", "label_rank"):
            assert getattr(row, name).tolist() == other[name]
        for name, values in row.more.items():
            assert [None if math.isnan(value) else value for value in values.tolist()] == other[name]


def assert_same_targets(targets, other):
    pieces = list(zip(targets.offsets[:-1], targets.offsets[1:], strict=True))
    assert [targets.ids[a:b].tolist() for a, b in pieces] == other["ids"]
    if targets.logprobs is not None:
        assert [targets.logprobs[a:b].tolist() for a, b in pieces] == other["logprobs"]
    if targets.counts is not None:
        assert [targets.counts[a:b].tolist() for a, b in pieces] == other["draws"]
    if targets.log_weights is not None:
        assert [targets.log_weights[a:b].tolist() for a, b in pieces] == other["log_weights"]
    assert targets.log_tail.tolist() == other["log_tail"]
    for name in ("entropy", "label_logprob", "label_rank"):
        value = getattr(targets, name)
        assert (value.tolist() if value is not None else []) == other[name]
    assert targets.log_tail_at.keys() == other["log_tail_at"].keys()
    for temperature, values in other["log_tail_at"].items():
        np.testing.assert_allclose(targets.log_tail_at[temperature], values, rtol=1e-6)


def test_stores_written_now_read_the_same_way(tmp_path):
    tokens = write_tokens(tmp_path / "t", 7, vocab_size=300)
    reader = write_targets(tmp_path / "d", tokens, temperatures=(4.0,), selection={"mode": "top_k", "k": 200})
    for found in (tokens, reader):
        run, _, rows = independent_reader.read_store(found.url)
        assert run["kind"] == found.spec.kind
        assert_same(found, rows)


def test_the_independent_reader_is_independent_and_short():
    source = Path(independent_reader.__file__).read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported == {"hashlib", "json", "math", "struct", "zlib", "pathlib", "pyarrow"}
    assert len(source.splitlines()) <= 130


def test_documented_tail_formula():
    assert independent_reader.tail_at(0) == -math.inf
    assert independent_reader.tail_at(128) == pytest.approx(math.log(0.5))


def test_rows_of_many_bytes_stand_alone_in_their_record_batch_and_short_ones_together():
    """A row in global order costs its whole batch; a batch of its own costs headers: much for short rows."""
    planes = planes_of(targets_spec(9, "digest"))
    of_entry = sum(plane.width for plane in planes if plane.axis == "entry")
    many, few = (4096, FULL_BATCH_BYTES // of_entry), (4096, 1)
    assert group_rows([many] * 3, planes) == [range(0, 1), range(1, 2), range(2, 3)]
    assert group_rows([few] * 5, planes) == [range(0, 2), range(2, 4), range(4, 5)]
    assert group_rows([few, many, few, few], planes) == [range(0, 2), range(2, 4)]
    assert group_rows([(16, 64)] * 3, planes) == [range(0, 3)]
    assert group_rows([(9000, 0)] * 2, planes) == [range(0, 1), range(1, 2)] and group_rows([], planes) == []
