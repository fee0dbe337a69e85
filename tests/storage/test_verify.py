"""verify tells all that is wrong with a store in one pass, one line for each unit, whatever is in the way."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from potstill.launch.cli import main
from potstill.storage import StoreError, StoreReader, StoreWriter, seal_store, verify_store
from potstill.storage.files.checked_json import dump_checked, load_checked
from potstill.storage.files.ipc_layout import parse_footer
from potstill.storage.files.unit_file import encode_unit
from potstill.storage.store.finding import KINDS, PARTS
from tests.storage.stores import write_targets, write_tokens

NUM_ROWS = 20  # five units


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    return Path(write_targets(root / "d", write_tokens(root / "t", NUM_ROWS)).url)


@pytest.fixture
def store(original, tmp_path):
    shutil.copytree(original, tmp_path / "store")
    return tmp_path / "store"


def unit_file(store, unit):
    return next((store / "units").glob(f"u{unit:07d}-*.arrow"))


def flip(path, place=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 4
    path.write_bytes(data)


def test_a_flipped_byte_is_one_problem_and_no_warning(store, caplog):
    offset = int(StoreReader(store)._locate(9)["offset"])
    flip(unit_file(store, 2), offset + 50)
    with caplog.at_level(logging.WARNING):
        report = verify_store(store, deep=True)
    assert len(report.findings) == 1 and caplog.records == []
    found = report.findings[0]
    assert (found.part, found.kind, found.unit, found.rows) == ("unit", "bytes", 2, ((8, 11),))
    assert "rows 8..11 are lost" in found.text and unit_file(store, 2).name in found.text
    assert report.num_rows == NUM_ROWS and f"potstill repair {store}" in report.format()


def test_a_flip_outside_of_the_batches_leaves_the_rows(store):
    flip(unit_file(store, 2), -20)
    (found,) = verify_store(store, deep=True).findings
    assert found.rows == () and "every row of it can still be read" in found.text
    assert StoreReader(store).row(8).row == 8


def test_everything_is_told_in_one_pass(store):
    flip(unit_file(store, 0))
    unit_file(store, 1).unlink()
    record = store / "units" / "u0000002.json"
    record.write_bytes(record.read_bytes()[:-5])
    unit_file(store, 3).write_bytes(unit_file(store, 3).read_bytes()[:-5])
    flip(store / "index.arrow")
    flip(store / "manifest.json")
    report = verify_store(store, deep=True)
    told = {(found.part, found.unit): found.kind for found in report.findings}
    assert told == {
        ("manifest", None): "bytes",
        ("unit", 0): "bytes",
        ("unit", 1): "missing",
        ("unit", 2): "record",
        ("unit", 3): "size",
    }
    assert report.sealed and report.num_units == 4  # those with a record
    flip(store / "manifest.json")
    again = {(found.part, found.unit): found.kind for found in verify_store(store, deep=True).findings}
    assert again == {**{key: kind for key, kind in told.items() if key[0] == "unit"}, ("index", None): "bytes"}


@pytest.mark.parametrize("what", ["folder", "loop"])
@pytest.mark.parametrize("name", ["unit", "u0000002.json", "index.arrow", "manifest.json"])
def test_what_cannot_be_read_is_a_finding_beside_the_others(store, name, what, caplog):
    """A folder or a circle of links in the place of a file: the system refuses to read it, and the rest is read."""
    path = unit_file(store, 2) if name == "unit" else store / name
    if name.startswith("u0"):
        path = store / "units" / name
    flip(unit_file(store, 0))
    path.unlink()
    if what == "folder":
        path.mkdir()
    else:
        os.symlink(path.name, path)
    for deep in (False, True):
        report = verify_store(store, deep=deep)
        part = {"index.arrow": "index", "manifest.json": "manifest"}.get(name, "unit")
        about = [found for found in report.findings if found.part == part and found.unit in (2, None)]
        assert len(about) == 1 and path.name in about[0].text
        assert any(found.unit == 0 for found in report.findings) == deep
    with pytest.raises(StoreError) as error:
        read_and_seal(store)
    # What stands in the place of a record is no record: the unit counts as not committed, and the log says why.
    assert path.name in (caplog.text if name.startswith("u0") else str(error.value))


def read_and_seal(store):
    reader = StoreReader(store)
    for row in range(reader.num_rows):
        if row not in range(4):  # unit 0 is flipped
            reader.row(row)
    for name in ("manifest.json", "index.arrow"):
        (store / name).unlink()
    seal_store(store, fast=True)


def forge(store, unit, data, **fields):
    """Put other bytes in the place of a unit's and let its record and the manifest vouch for them."""
    path, record_path = unit_file(store, unit), store / "units" / f"u{unit:07d}.json"
    path.write_bytes(data)
    record = load_checked(record_path.read_bytes(), where="record")
    record.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), **fields)
    record_path.write_bytes(dump_checked(record))


def test_a_forged_footer_never_ends_verify(tmp_path):
    """Every few bytes of the footer changed, with checksums that fit: reported or harmless, and no other exception."""
    tokens = write_tokens(tmp_path / "t", 2)
    store = Path(write_targets(tmp_path / "d", tokens).url)
    for name in ("manifest.json", "index.arrow"):
        (store / name).unlink()
    data = unit_file(store, 0).read_bytes()
    end = max(offset + length for offset, length in parse_footer(data, where="test"))
    seen = 0
    for place in range(end, len(data), 5):
        for bits in (0x40, 0xFF):
            forge(store, 0, data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :])
            report = verify_store(store, deep=True)
            seen += not report.ok
            assert all(unit_file(store, 0).name in problem for problem in report.problems)
    assert seen > 50


def test_a_record_of_another_attempt_and_a_foreign_one_are_told(store, tmp_path):
    other = Path(write_targets(tmp_path / "o", write_tokens(tmp_path / "t", NUM_ROWS), seed=3, stats=()).url)
    shutil.copy(other / "units" / "u0000001.json", store / "units" / "u0000001.json")
    shutil.copy(other / "units" / "u0000001.json", store / "units" / "u0000009.json")
    record = load_checked((store / "units" / "u0000003.json").read_bytes(), where="record")
    (store / "units" / "u0000003.json").write_bytes(dump_checked(record | {"file": "u0000003-0123456789ab.arrow"}))
    told = {found.unit: (found.kind, found.text) for found in verify_store(store, deep=True).findings}
    assert {unit: kind for unit, (kind, _) in told.items()} == {1: "record", 3: "record", 9: "record"}
    assert "belongs to another run" in told[1][1] and "counts as not committed" in told[9][1]


def test_rows_that_break_a_rule_are_one_line(store):
    """Two rows that have changed places, with checksums that fit: the unit has one finding, which names both."""
    reader = StoreReader(store)
    rows = reader.rows([8, 10, 9, 11])
    encoded = encode_unit(rows, spec=reader.spec, unit=2, id_map=None)
    for name in ("manifest.json", "index.arrow"):
        (store / name).unlink()
    forge(store, 2, bytes(encoded.data), batches=[[b.offset, b.length, b.crc32, b.num_rows] for b in encoded.batches])
    (found,) = verify_store(store, deep=True).findings
    assert (found.unit, found.kind, found.rows) == (2, "rows", ((9, 10),))
    assert "row 9: batch carries row 10, expected row 9" in found.text and "2 of 4 rows" in found.text


def test_json_has_the_documented_shape(store, capsys):
    assert main(["verify", str(store), "--deep", "--json"]) == 0
    sound = json.loads(capsys.readouterr().out)
    assert sound["ok"] and sound["sealed"] and sound["bytes_checked"] and sound["findings"] == []
    flip(unit_file(store, 1))
    assert main(["verify", str(store), "--deep", "--json"]) == 3
    damaged = json.loads(capsys.readouterr().out)
    assert damaged.keys() == sound.keys() and not damaged["ok"]
    (found,) = damaged["findings"]
    assert found["unit"] == 1 and found["part"] in PARTS and found["kind"] in KINDS
    assert found["file"] == f"units/{unit_file(store, 1).name}" and all(len(span) == 2 for span in found["rows"])
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    assert [word for word in (*damaged, *found, *KINDS, *PARTS) if f"`{word}`" not in page] == []


def test_verify_of_a_damaged_run_or_manifest_is_no_traceback(store, capsys):
    flip(store / "manifest.json")
    assert main(["verify", str(store)]) == 3
    flip(store / "run.json")
    assert main(["verify", str(store)]) == 1
    told = capsys.readouterr()
    assert "manifest.json: checksum" in told.out and "run.json: checksum" in told.err


def test_a_unit_that_is_still_to_do_is_no_damage(original, tmp_path):
    spec = StoreReader(original).spec
    StoreWriter.create(tmp_path / "new", spec)
    for name in ("u0000001.json", unit_file(original, 1).name):
        shutil.copy(original / "units" / name, tmp_path / "new" / "units" / name)
    report = verify_store(tmp_path / "new", deep=True)
    assert report.ok and report.num_units == 1 and not report.sealed
