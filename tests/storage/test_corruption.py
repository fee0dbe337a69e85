"""Damage of every kind is noticed: flipped bits, truncation, missing, swapped and foreign files, alien versions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from potstill.storage import (
    CorruptError,
    RunSpec,
    StoreError,
    StoreReader,
    StoreWriter,
    VersionError,
    seal_store,
    verify_store,
)
from potstill.storage.files.checked_json import dump_checked, load_checked
from tests.campaign import tell
from tests.storage.stores import make_targets_row, same_targets, targets_spec, write_targets, write_tokens

NUM_ROWS = 10


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch):
    monkeypatch.setattr("potstill.storage.store.reader.RETRY_SECONDS", 0.0)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("corruption")
    tokens = write_tokens(root / "t", NUM_ROWS)
    targets = write_targets(root / "d", tokens, temperatures=(2.0,))
    return Path(targets.url), [targets.row(r) for r in range(NUM_ROWS)]


@pytest.fixture
def store(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "store")
    return tmp_path / "store"


def read_all(path):
    reader = StoreReader(path)
    assert len(reader.row_stats["mean_loss"]) == reader.num_rows
    return [reader.row(r) for r in range(reader.num_rows)]


def same_rows(found, wanted):
    return len(found) == len(wanted) and all(
        a.row == b.row
        and a.token_digest == b.token_digest
        and a.stats == b.stats
        and same_targets(a.targets, b.targets)
        for a, b in zip(found, wanted, strict=True)
    )


def outcome(store, wanted):
    """'noticed' if reading raises a StoreError, 'harmless' if every row is still right, else 'silent'."""
    try:
        found = read_all(store)
    except StoreError:
        return "noticed"
    return "harmless" if same_rows(found, wanted) else "silent"


def unit_files(store):
    return sorted((store / "units").glob("*.arrow"))


@pytest.mark.parametrize("name", ["unit", "index.arrow", "manifest.json", "run.json", "record"])
def test_flipped_bits_are_never_silent(original, store, name):
    """One bit at every 97th byte (every 1000th is too few for these small files): 0 silent, and verify sees all."""
    path = {"unit": unit_files(store)[1], "record": store / "units" / "u0000001.json"}.get(name, store / name)
    data = path.read_bytes()
    outcomes = []
    for place in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        outcomes.append(outcome(store, original[1]))
        if place % (97 * 8) == 0:
            try:
                assert not verify_store(store, deep=True).ok, place
            except StoreError:
                assert name == "run.json"
    path.write_bytes(data)
    assert "silent" not in outcomes and outcome(store, original[1]) == "harmless"
    if name in ("manifest.json", "run.json"):
        assert set(outcomes) == {"noticed"}
    if name in ("unit", "index.arrow"):
        assert outcomes.count("noticed") > len(outcomes) / 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_flips_and_cuts_of_a_large_unit(tmp_path, capsys):
    """One bit at every 1000th byte of every file of a store with megabyte units, and 200 cuts of each: 0 silent."""
    tokens = write_tokens(tmp_path / "t", 6, row_length=4096, rows_per_unit=3, vocab_size=128_256)
    write_targets(tmp_path / "d", tokens, rows_per_unit=3, selection={"mode": "top_k", "k": 100})
    store, counts = tmp_path / "d", {"noticed": 0, "harmless": 0, "silent": 0}
    wanted = read_all(store)
    files = [*unit_files(store), *(store / name for name in ("index.arrow", "manifest.json", "run.json"))]
    for path in files:
        data = path.read_bytes()
        damaged = [(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :]) for i in range(0, len(data), 1000)]
        cuts = [data[:n] for n in np.random.default_rng(0).integers(0, len(data), 200)]
        for content in damaged + cuts:
            path.write_bytes(content)
            counts[outcome(store, wanted)] += 1
        path.write_bytes(data)
    num_bytes = sum(path.stat().st_size for path in files)
    with capsys.disabled():
        told = {"detected": counts["noticed"], "harmless": counts["harmless"], "silent": counts["silent"]}
        tell("flips and cuts of a store", {"tried": sum(counts.values()), **told})
        print(f"\n{num_bytes} bytes in {len(files)} files, {sum(counts.values())} flips and cuts: {counts}")
    assert counts["silent"] == 0 and counts["noticed"] > 0.9 * sum(counts.values())


def test_error_names_file_and_row(store):
    reader = StoreReader(store)
    entry = reader._locate(6)
    path = store / "units" / reader.manifest.units[1].file
    data = bytearray(path.read_bytes())
    data[int(entry["offset"]) + 100] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=rf"{path.name}, row 6: .* crc32; restore"):
        StoreReader(store).row(6)
    assert StoreReader(store).row(9).row == 9


@pytest.mark.parametrize("name", ["unit", "index.arrow", "manifest.json", "run.json"])
def test_truncation_and_trailing_garbage_are_noticed(original, store, name):
    path = unit_files(store)[0] if name == "unit" else store / name
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    lengths = {0, 1, len(data) - 1, *rng.integers(0, len(data), 200).tolist()}
    for length in lengths:
        path.write_bytes(data[:length])
        result = outcome(store, original[1])
        # A unit cut in its footer still holds every row; verify sees it.
        assert result == "noticed" or (name == "unit" and result == "harmless"), length
        if length % 7 == 0 and name != "run.json":
            assert not verify_store(store, deep=False).ok
    path.write_bytes(data + b"garbage")
    assert outcome(store, original[1]) in ("noticed", "harmless")
    if name != "run.json":
        assert not verify_store(store, deep=False).ok


def test_missing_renamed_and_swapped_units(original, store):
    first, second, third = unit_files(store)
    data = first.read_bytes(), second.read_bytes()
    os.rename(first, first.with_suffix(".gone"))
    with pytest.raises(CorruptError, match="file is missing"):
        StoreReader(store).row(0)
    os.rename(first.with_suffix(".gone"), first)
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    assert outcome(store, original[1]) == "noticed"
    report = verify_store(store, deep=True)
    for name in (first.name, second.name):
        assert any(name in p and ("its sha256" in p or "its record says" in p) for p in report.problems)
    first.write_bytes(data[0])
    second.write_bytes(data[1])
    third.unlink()
    assert any("is missing" in problem for problem in verify_store(store, deep=False).problems)


def test_unit_with_valid_checksums_but_other_rows_is_refused(original, store, tmp_path):
    """A record that names the bytes of unit 0 as unit 1: every crc fits, the row numbers do not."""
    records = {u: load_checked((store / "units" / f"u000000{u}.json").read_bytes(), where="") for u in (0, 1)}
    forged = records[0] | {"unit": 1, "first_row": 4}
    forged["file"] = records[1]["file"]
    (store / "units" / forged["file"]).write_bytes((store / "units" / records[0]["file"]).read_bytes())
    (store / "units" / "u0000001.json").write_bytes(dump_checked(forged))
    for name in ("manifest.json", "index.arrow"):
        (store / name).unlink()
    seal_store(store)
    with pytest.raises(CorruptError, match="batch carries row 0, expected row 4"):
        StoreReader(store).row(4)
    assert not verify_store(store, deep=True).ok


def test_unit_of_another_store_is_refused(original, store, tmp_path):
    other = targets_spec(NUM_ROWS, "elsewhere")
    writer = StoreWriter.create(tmp_path / "other", other)
    tokens = write_tokens(tmp_path / "t", NUM_ROWS)
    for unit in writer.todo():
        writer.commit_unit(unit, [make_targets_row(tokens.row(r), other) for r in writer.unit_rows(unit)])
    for name in ("u0000000.json", unit_files(tmp_path / "other")[0].name):
        shutil.copy(tmp_path / "other" / "units" / name, store / "units" / name)
    assert any("readable record" in p for p in verify_store(store, deep=False).problems)
    seal_store(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "manifest.json", store / "manifest.json")
    with pytest.raises(CorruptError, match="belongs to another run"):
        StoreReader(store)


def test_index_that_points_at_another_row_is_refused(store):
    reader = StoreReader(store)
    entry = dict(reader._locate(2))
    batch = reader._read_batch(2, entry)
    entry["position"] = np.uint32(1)
    with pytest.raises(CorruptError, match="batch carries row 1, expected row 2"):
        reader._decode(batch, 2, entry)


def rewrite_run(store, **changes):
    value = load_checked((store / "run.json").read_bytes(), where="")
    (store / "run.json").write_bytes(dump_checked(value | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": {"major": 2, "minor": 0}}, "knows major version 1"),
        ({"required_features": ["planes", "holograms"]}, r"needs the features \['holograms'\]"),
        ({"codec": {"name": "brotli"}}, "codec is"),
        ({"context_policy": "document"}, "context_policy is 'document'"),
        ({"target_convention": "targets[t] predicts tokens[t]"}, "target_convention"),
    ],
)
def test_alien_versions_and_features_are_refused(store, changes, message):
    rewrite_run(store, **changes)
    with pytest.raises(VersionError, match=message):
        StoreReader(store)


def test_run_json_with_missing_or_wrong_fields(store):
    rewrite_run(store, row_length=-5)
    with pytest.raises(CorruptError, match="row_length is -5"):
        StoreReader(store)
    value = load_checked((store / "run.json").read_bytes(), where="")
    (store / "run.json").write_bytes(dump_checked({k: value[k] for k in value if k != "stats"}))
    with pytest.raises(CorruptError, match=r"\['stats'\] are missing"):
        StoreReader(store)


def test_unknown_optional_fields_are_kept_and_ignored(tmp_path):
    spec = RunSpec.from_json({**targets_spec(NUM_ROWS, "in").to_json(), "later_addition": [1]})
    StoreWriter.create(tmp_path / "d", spec)
    assert json.loads((tmp_path / "d" / "run.json").read_text())["later_addition"] == [1]
    assert StoreReader(tmp_path / "d", allow_partial=True).spec.unknown == {"later_addition": [1]}


def test_names_in_records_cannot_leave_the_folder(store):
    record = load_checked((store / "units" / "u0000001.json").read_bytes(), where="")
    for name in ("../../etc/passwd", "/etc/passwd", "u0000001-00.arrow", "u0000002-000000000000.arrow"):
        (store / "units" / "u0000001.json").write_bytes(dump_checked(record | {"file": name}))
        report = verify_store(store, deep=False)
        assert any("unit 1 is sealed but has no readable record" in problem for problem in report.problems)
    manifest = load_checked((store / "manifest.json").read_bytes(), where="")
    units = [["../x.arrow", 1, manifest["units"][0][2]], *manifest["units"][1:]]
    (store / "manifest.json").write_bytes(dump_checked(manifest | {"units": units}))
    with pytest.raises(CorruptError, match="unit entry"):
        StoreReader(store)
    index = manifest["index"] | {"file": "../index.arrow"}
    (store / "manifest.json").write_bytes(dump_checked(manifest | {"index": index}))
    with pytest.raises(CorruptError, match="'index' is damaged"):
        StoreReader(store)


def test_paths_with_spaces_unicode_links_and_chdir(original, tmp_path, monkeypatch):
    folder = tmp_path / ("Brennerei Süß 蒸留 " + "x" * 150)
    folder.mkdir()
    shutil.copytree(original[0], folder / "a store")
    os.symlink(folder / "a store", tmp_path / "link")
    monkeypatch.chdir(folder)
    reader = StoreReader("a store")
    monkeypatch.chdir("/")
    assert same_rows([reader.row(r) for r in range(NUM_ROWS)], original[1])
    assert same_rows(read_all(tmp_path / "link"), original[1])


def test_read_only_store_with_meaningless_times(original, store):
    for path in [store, *store.rglob("*")]:
        os.utime(path, (0, 0))
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert outcome(store, original[1]) == "harmless" and verify_store(store, deep=True).ok
    finally:
        for path in [store, *store.rglob("*")]:
            path.chmod(0o755)
