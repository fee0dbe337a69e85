"""Commands on stores: what they print is what the store holds, and their exit code says whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from potstill.common.exit_codes import INCOMPLETE
from potstill.launch.cli import main
from potstill.storage import StoreReader
from tests.launch.conftest import write_targets


@pytest.fixture
def targets(data: Path, tmp_path: Path) -> Path:
    """A complete, sealed targets store."""
    write_targets(data / "train", tmp_path / "targets")
    assert main(["seal", str(tmp_path / "targets")]) == 0
    return tmp_path / "targets"


def test_status_counts_and_ends_with_3_until_sealed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "targets"
    writer = write_targets(data / "train", store, units=2)
    capsys.readouterr()
    assert main(["status", str(store), "--json"]) == 3
    status = json.loads(capsys.readouterr().out)
    assert (status["kind"], status["committed"], status["sealed"]) == ("targets", 2, False)
    assert status["missing"] == writer.num_units - 2
    assert main(["seal", str(store)]) == INCOMPLETE
    assert "unit" in capsys.readouterr().err
    write_targets(data / "train", store)
    assert main(["status", str(store)]) == 3
    assert main(["seal", str(store)]) == 0
    assert main(["seal", str(store)]) == 0
    assert main(["status", str(store), str(data / "train")]) == 0
    assert "not sealed" not in capsys.readouterr().out.rpartition("sealed")[0].rpartition("targets: ")[2]


def test_verify_finds_a_flipped_bit(targets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(targets), "--deep"]) == 0
    assert "sound" in capsys.readouterr().out
    file = max(targets.rglob("*.arrow"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert main(["verify", str(targets), "--deep"]) == 3
    assert file.name in capsys.readouterr().out


def test_inspect_tells_the_run(targets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(targets), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    reader = StoreReader(targets)
    assert (found["kind"], found["digest"], found["num_rows"]) == ("targets", reader.digest, reader.num_rows)
    assert found["teacher"]["id"] == "made-up"
    assert main(["inspect", str(targets)]) == 0
    assert "made-up" in capsys.readouterr().out


def test_inspect_shows_a_row_with_candidates(targets: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    options = ["--row", "0", "--tokens", str(data / "train"), "--tokenizer", str(data / "tokenizer")]
    assert main(["inspect", str(targets), *options, "--max-tokens", "32"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.split()[0].isdigit()]
    row = StoreReader(data / "train").row(0)
    ends = (np.cumsum(row.doc_lens) - 1).tolist()
    assert [n for n, line in enumerate(lines) if "no target" in line] == [end for end in ends if end < len(lines)]
    for n, line in enumerate(lines):
        if n not in ends:
            assert "rank 0" in line
            assert "*" in line  # the made-up teacher's first candidate is the label


def test_inspect_of_targets_needs_their_tokens(targets: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(targets), "--row", "0"]) == 1
    assert "with --tokens" in capsys.readouterr().err
    assert main(["inspect", str(targets), "--row", "0", "--tokens", str(data / "heldout")]) == 1
    assert "row 0" in capsys.readouterr().err


def test_inspect_outside_of_the_store(targets: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(data / "train"), "--row", "9999"]) == 1
    assert "has rows 0 to" in capsys.readouterr().err
    assert main(["inspect", str(data / "train"), "--row", "0", "--tokenizer", str(targets)]) == 1
    assert "no tokenizer in" in capsys.readouterr().err


def test_inspect_of_an_unsealed_store_needs_partial(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_targets(data / "train", tmp_path / "t", units=1)
    assert main(["inspect", str(tmp_path / "t")]) == 1
    assert "not sealed" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "t"), "--partial", "--row", "3", "--tokens", str(data / "train")]) == 0


def test_stats_are_those_of_the_made_up_teacher(targets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["stats", str(targets), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    manifest = StoreReader(targets).manifest
    assert (found["num_bytes"], found["num_tokens"]) == (manifest.num_bytes, manifest.num_tokens)
    assert found["num_entries"] == 3 * manifest.num_targets
    assert found["histograms"]["kept mass"]["mean"] == pytest.approx(0.875, abs=0.01)
    assert main(["stats", str(targets)]) == 0
    assert "B/token" in capsys.readouterr().out


def test_gc_removes_what_no_record_names_and_only_when_told(targets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = targets / "units" / "u0000000-0123456789ab.arrow"
    left.write_bytes(b"lost")
    assert main(["gc", str(targets)]) == 0
    assert "would remove 1 files" in capsys.readouterr().out
    assert left.exists()
    assert main(["gc", str(targets), "--force"]) == 0
    assert not left.exists()
    assert main(["verify", str(targets), "--deep"]) == 0
