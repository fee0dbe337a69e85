"""The benchmark of 100 billion tokens: its synthetic stores are read as real ones, its server as an object store."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.scale_server import Served, serving
from benchmarks.scale_store import Sizes, complete, make_stores, put_rows, template_of, tokens_spec
from benchmarks.scale_template import SYNTHETIC, unlikely_numbers
from potstill.storage import StoreReader, TokensRow, seal_store, store_status
from potstill.storage.files.unit_file import encode_unit
from tests.benchmarks.test_smoke import run

DELAY_SECONDS = 0.02


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Sizes:
    sizes = Sizes(tmp_path_factory.mktemp("stores"), num_units=7, rows_per_unit=6, row_length=24)
    make_stores(sizes)
    complete(sizes)
    seal_store(sizes.root / "targets", fast=True)
    return sizes


@pytest.fixture
def served(stores: Sizes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serving(stores.root, delay_seconds=DELAY_SECONDS) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


def test_a_unit_of_the_template_is_the_unit_that_would_be_encoded(tmp_path: Path) -> None:
    spec = tokens_spec(Sizes(tmp_path, num_units=9000, rows_per_unit=12, row_length=4096))
    template = template_of("tokens", spec)
    for unit in (0, 1, 8999):
        data = template.piece(unit, 0, len(template.data))
        for batch in template.batches_of(unit):
            assert zlib.crc32(data[batch.offset : batch.offset + batch.length]) == batch.crc32
        for start, end in (
            (0, 9),
            (int(template.places[3]) + 3, int(template.places[4]) + 5),
            (len(data) - 1, len(data)),
        ):
            assert template.piece(unit, start, end) == data[start:end]
    assert len(template.batches) == 6 and template.row_bytes.sum() == sum(batch.length for batch in template.batches)


def test_numbers_that_do_compress_are_refused_as_a_template(tmp_path: Path) -> None:
    from benchmarks.scale_template import Template

    spec = tokens_spec(Sizes(tmp_path, num_units=9, rows_per_unit=64, row_length=16))
    numbers = np.zeros(64, np.uint64)
    rows: list[Any] = [TokensRow(0, np.ones(16, np.int32), np.array([16], np.int32)) for _ in numbers]
    with pytest.raises(ValueError, match="do not lie in their batch as they are"):
        Template.of(encode_unit(rows, spec=spec, unit=0, id_map=None), numbers)
    assert len(set(unlikely_numbers(64, seed=1).tolist())) == 64


def test_rows_of_a_synthetic_store_are_read_from_disk_and_from_the_server(stores: Sizes, served: Served) -> None:
    rows = np.array([0, 17, stores.open_unit * stores.rows_per_unit + 1, 41])
    put_rows(stores, rows)
    for kind in ("tokens", "targets"):
        local, remote = StoreReader(stores.root / kind), StoreReader(f"s3://bucket/{kind}")
        assert local.digest == remote.digest and local.num_rows == 42
        for one, other in zip(local.rows(rows), remote.rows(rows), strict=True):
            assert one.row == other.row
            if isinstance(one, TokensRow):
                np.testing.assert_array_equal(one.tokens, other.tokens)  # type: ignore[union-attr]
            else:
                np.testing.assert_array_equal(one.targets.ids, other.targets.ids)  # type: ignore[union-attr]
    assert {len(row.tokens) for row in StoreReader("s3://bucket/tokens").tokens_rows(rows)} == {16, 24}
    assert store_status("s3://bucket/targets").committed == 7


def test_the_server_is_an_object_store_to_the_client(stores: Sizes, served: Served) -> None:
    obstore = pytest.importorskip("obstore")
    from obstore.store import from_url

    before = sorted(path for path in stores.root.rglob("*"))
    store = from_url("s3://bucket/targets", client_options={"allow_http": True})
    served.counts(reset=True)
    listed = obstore.list_with_delimiter(store, prefix="units")["objects"]
    assert [item["path"] for item in listed] == sorted(
        f"units/{path.name}" for path in (stores.root / "targets" / "units").iterdir()
    )
    top = obstore.list_with_delimiter(store)
    assert top["common_prefixes"] == ["units"] and "run.json" in {item["path"] for item in top["objects"]}
    behind = [item["path"] for page in obstore.list(store, prefix="units", offset="units/u0000004") for item in page]
    assert behind[0] == f"units/u0000004{SYNTHETIC}" and len(behind) == 6
    assert served.counts() == {"LIST": 3, "bytes_sent": served.counts()["bytes_sent"]}
    obstore.put(store, "tmp/a", b"abc", mode="create", use_multipart=False)
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, "tmp/a", b"xyz", mode="create", use_multipart=False)
    obstore.put(store, "tmp/long", b"12345678" * (3 << 20), use_multipart=True, chunk_size=8 << 20)
    assert bytes(obstore.get_range(store, "tmp/long", start=(8 << 20) - 4, length=8)) == b"56781234"
    obstore.copy(store, "tmp/a", "tmp/b")
    assert bytes(obstore.get(store, "tmp/b").bytes()) == b"abc" and obstore.head(store, "tmp/long")["size"] == 24 << 20
    obstore.delete(store, ["tmp/a", "tmp/long"])
    assert [item["path"] for item in obstore.list_with_delimiter(store, prefix="tmp")["objects"]] == ["tmp/b"]
    with pytest.raises(FileNotFoundError):
        obstore.get(store, "tmp/a")
    assert sorted(path for path in stores.root.rglob("*")) == before, "the folder stays as it is"


def test_the_server_waits_with_all_requests_at_once_and_ends(stores: Sizes) -> None:
    import time
    import urllib.error
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    with serving(stores.root, delay_seconds=0.2) as found:

        def ask(_: int) -> int:
            with urllib.request.urlopen(f"{found.url}/bucket/targets/run.json", timeout=30) as answer:
                return len(answer.read())

        began = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            sizes = set(pool.map(ask, range(16)))
        seconds = time.monotonic() - began
        assert sizes == {(stores.root / "targets" / "run.json").stat().st_size}
        assert 0.2 <= seconds < 16 * 0.2, "one after another they would take longer"
        assert found.counts() == {"GET": 16, "bytes_sent": 16 * min(sizes), "bytes_sent/targets": 16 * min(sizes)}
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"{found.url}/_counts", timeout=5)


def last_line(*words: str) -> tuple[str, dict[str, Any]]:
    done = run("benchmarks.scale", "--quick", *words, seconds=1700)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.stdout, found


def test_the_benchmark_measures_what_it_is_asked_for(tmp_path: Path) -> None:
    shown, found = last_line("--only", "status", "--place", "object", "--folder", str(tmp_path))
    assert found["status_s_object"] > 0.002 and "status_s" not in found and "seal_s" not in found
    assert found["goals_measured"] == 1 and found["settings"]["units"] == 24 and found["machine"]
    assert "| status | - | 5.00 s | " in shown and os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 2 minutes on a quiet machine of 2 cores
def test_the_whole_benchmark_at_a_size_that_means_nothing(tmp_path: Path) -> None:
    shown, found = last_line("--folder", str(tmp_path), "--output", str(tmp_path / "result.md"))
    both = ("worker_start_s", "worker_start_mb", "worker_end_s", "status_s", "seal_s", "seal_mb", "first_batch_s")
    for name in (*both, "selector_node_mb", "selector_s"):
        assert found[name] >= 0 and found[f"{name}_object"] >= 0
    # By the rows of one batch that several rows share, each row would cost less than its own bytes.
    assert 0 < found["url_overhead"] == found["url_overhead_object"] < 1.5
    assert 0 < found["requests_per_rank"] == found["requests_per_rank_object"]
    assert found["goals_measured"] == 17 and found["goals_met"] <= 17
    assert shown.count("|---") == 5 and json.loads((tmp_path / "result.md").read_text().splitlines()[-1]) == found
    assert os.listdir(tmp_path) == ["result.md"]
