"""Stores on object storage, against a local S3 server with faults in between."""

from __future__ import annotations

import logging
import threading
import time
import urllib.request

import pytest

pytest.importorskip("obstore")
server_module = pytest.importorskip("moto.server")

from potstill.storage import (  # noqa: E402
    CorruptError,
    EpochPlan,
    HungReadError,
    Loader,
    MismatchError,
    ReadFailedError,
    StoppedReadError,
    StoreError,
    StoreReader,
    StoreWriter,
    WriteFailedError,
    collect_garbage,
    give_up_reads,
    seal_store,
    store_status,
    verify_store,
    write_card,
)
from potstill.storage.files import object_paths, waiting  # noqa: E402
from potstill.storage.files.paths import open_folder  # noqa: E402
from tests.storage.fault_proxy import FaultProxy  # noqa: E402
from tests.storage.stores import (  # noqa: E402
    make_targets_row,
    same_targets,
    targets_spec,
    write_targets,
    write_tokens,
)

NUM_ROWS = 10
SECRET = "s3cr3t-value-of-the-test"


@pytest.fixture(scope="module")
def s3():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    proxy = FaultProxy(port)
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT"), timeout=10)
    yield proxy
    proxy.close()
    server.stop()


@pytest.fixture(autouse=True)
def environment(s3, monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3.port}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_paths, "BACKOFF_SECONDS", 0.005)
    monkeypatch.setattr(object_paths, "READ_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(object_paths, "REQUEST_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(object_paths, "CLIENT_RETRIES", 0)
    s3.fault = lambda method, path, number: None
    s3.stall_seconds = 1.5
    yield
    s3.fault = lambda method, path, number: None


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    root = tmp_path_factory.mktemp("objects")
    tokens = write_tokens(root / "t", NUM_ROWS)
    return tokens, write_targets(root / "d", tokens)


@pytest.fixture(scope="module")
def remote(s3, local):
    """The same stores written to the bucket; equal digests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
        tokens = write_tokens("s3://bucket/a run/tokens", NUM_ROWS)
        targets = write_targets("s3://bucket/a run/targets", tokens)
    assert (tokens.digest, targets.digest) == (local[0].digest, local[1].digest)
    return tokens.url, targets.url


def assert_reads_right(url, local):
    reader = StoreReader(url)
    for row in (7, 0, 3):
        assert same_targets(reader.row(row).targets, local[1].row(row).targets)


def test_a_dataset_card_lies_beside_a_remote_store(s3, local):
    write_tokens("s3://bucket/carded", NUM_ROWS)
    assert write_card("s3://bucket/carded") and not write_card("s3://bucket/carded")
    assert local[0].digest.encode() in (open_folder("s3://bucket/carded").read("README.md", max_bytes=1 << 20) or b"")
    assert (
        verify_store("s3://bucket/carded", deep=True).ok and StoreReader("s3://bucket/carded").digest == local[0].digest
    )
    assert collect_garbage("s3://bucket/carded", dry_run=False).files == ()
    assert "README.md" in open_folder("s3://bucket/carded").names("")


def fail_first(fault, times, *, of=lambda method, path: True):
    """The first `times` requests that `of` picks meet the fault."""
    seen = []
    lock = threading.Lock()

    def choose(method, path, number):
        with lock:
            if of(method, path) and len(seen) < times:
                seen.append(path)
                return fault
            return None

    choose.seen = seen
    return choose


def test_every_entry_point_takes_urls(remote, local):
    tokens, targets = remote
    assert verify_store(targets, deep=True).ok and store_status(targets).sealed
    assert collect_garbage(targets, dry_run=True).files == ()
    assert seal_store(targets).store_digest == local[1].digest
    plan = EpochPlan(NUM_ROWS, global_batch=4, seed=0, joined=("teacher",))
    with Loader(plan, StoreReader(tokens), {"teacher": StoreReader(targets)}) as loader:
        for number in range(3):
            batch = next(loader)
            for row in batch.joined["teacher"]:
                assert same_targets(row.targets, local[1].row(row.row).targets)
            loader.commit(number)
    with pytest.raises(MismatchError, match="vocab_size"):
        StoreWriter.create(targets, targets_spec(NUM_ROWS, local[0].digest, vocab_size=999))


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "stall"])
def test_passing_faults_are_retried_and_the_data_is_right(s3, remote, local, fault):
    s3.fault = fail_first(fault, 2, of=lambda method, path: method == "GET" and "list-type" not in path)
    assert_reads_right(remote[1], local)
    assert len(s3.fault.seen) == 2


@pytest.mark.parametrize("fault", ["500", "503", "reset", "stall"])
def test_lasting_faults_end_in_a_clear_error_after_bounded_attempts(s3, remote, fault):
    reader = StoreReader(remote[1])
    reader.row(0)
    s3.stall_seconds = 0.8
    s3.fault = fail_first(fault, 1000, of=lambda method, path: method == "GET")
    with pytest.raises(ReadFailedError, match=r"reading s3://bucket/a run/targets/units/.*attempt 4 of 4"):
        reader.row(5)
    assert len(s3.fault.seen) <= 8


def test_truncated_and_missing_objects_are_corrupt(s3, remote, tmp_path, local):
    copy = "s3://bucket/copy"
    write_targets(copy, local[0])
    folder = open_folder(copy)
    reader = StoreReader(copy)
    name = f"units/{reader.manifest.units[0].file}"
    data = folder.read(name, max_bytes=1 << 20)
    folder.put(name, data[: len(data) // 3])
    with pytest.raises(CorruptError, match="truncated object"):
        reader.row(3)
    folder.delete(name)
    with pytest.raises(CorruptError, match="object is missing"):
        reader.row(3)
    assert any("is missing" in p for p in verify_store(copy, deep=False).problems)
    with pytest.raises(CorruptError, match="at most 10 expected"):
        folder.read("run.json", max_bytes=10)


def commit_all(writer, local):
    for unit in writer.todo():
        writer.commit_unit(unit, [make_targets_row(local[0].row(r), writer.spec) for r in writer.unit_rows(unit)])


def test_lost_replies_do_not_lose_or_double_a_commit(s3, local):
    """The server did what was asked and its answer was lost: for data, record, index and manifest."""
    url = "s3://bucket/lost replies"
    writer = StoreWriter.create(url, targets_spec(NUM_ROWS, local[0].digest))
    seen = {}

    def choose(method, path, number):
        if method == "PUT":
            seen[path] = seen.get(path, 0) + 1
            return "forget" if seen[path] == 1 else None
        return None

    s3.fault = choose
    commit_all(writer, local)
    seal_store(url)
    s3.fault = lambda method, path, number: None
    assert StoreReader(url).digest == local[1].digest and verify_store(url, deep=True).ok
    assert collect_garbage(url, dry_run=True).files == ()


def test_two_writers_race_for_every_unit(s3, local):
    url = "s3://bucket/race"
    spec = targets_spec(NUM_ROWS, local[0].digest)
    writers = [StoreWriter.create(url, spec) for _ in range(2)]
    wins, errors = [], []

    def run(writer):
        try:
            for unit in range(writer.num_units):
                rows = [make_targets_row(local[0].row(r), spec) for r in writer.unit_rows(unit)]
                wins.append((unit, writer.commit_unit(unit, rows)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(w,)) for w in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and sorted(u for u, won in wins if won) == list(range(writers[0].num_units))
    seal_store(url)
    assert StoreReader(url).digest == local[1].digest
    assert collect_garbage(url, dry_run=True).files == ()


def test_failed_uploads_commit_nothing_and_resume(s3, local):
    url = "s3://bucket/failed"
    writer = StoreWriter.create(url, targets_spec(NUM_ROWS, local[0].digest))
    s3.fault = fail_first("503", 1000, of=lambda method, path: method == "PUT")
    with pytest.raises(WriteFailedError, match="nothing was committed"):
        commit_all(writer, local)
    s3.fault = lambda method, path, number: None
    assert len(writer.todo()) == 3
    commit_all(writer, local)
    seal_store(url)
    assert StoreReader(url).digest == local[1].digest


def test_stale_listings_cost_work_but_never_rows(s3, local):
    url = "s3://bucket/stale"
    writer = StoreWriter.create(url, targets_spec(NUM_ROWS, local[0].digest))
    commit_all(writer, local)
    s3.fault = lambda method, path, number: "stale" if "list-type" in path else None
    assert len(open_folder(url).names("units")) == 5
    unit = 2
    rows = [make_targets_row(local[0].row(r), writer.spec) for r in writer.unit_rows(unit)]
    assert not writer.commit_unit(unit, rows)
    seal_store(url)
    s3.fault = lambda method, path, number: None
    assert StoreReader(url).digest == local[1].digest


def test_a_server_without_conditional_writes_is_refused(s3, monkeypatch):
    real = object_paths.ObjectFolder.create
    monkeypatch.setattr(object_paths.ObjectFolder, "create", lambda self, name, data: real(self, name, data) or True)
    with pytest.raises(WriteFailedError, match="ignores If-None-Match"):
        StoreWriter.create("s3://bucket/unconditional", targets_spec(1, "in"))


def test_large_units_go_up_in_parallel_parts(s3, monkeypatch):
    monkeypatch.setattr(object_paths, "PART_BYTES", 5 << 20)
    folder = open_folder("s3://bucket/large")
    before = len(s3.requests)
    data = bytes(range(256)) * (12 << 12)
    folder.put("units/large", data)
    parts = {path for method, path, _ in s3.requests[before:] if method == "PUT" and "partNumber" in path}
    assert len(parts) == 3 and folder.size("units/large") == len(data)
    assert folder.read_range("units/large", (5 << 20) - 8, 16) == data[(5 << 20) - 8 : (5 << 20) + 8]


def test_credentials_stay_out_of_files_errors_and_logs(s3, remote, caplog):
    caplog.set_level(logging.DEBUG)
    folder = open_folder(remote[1])
    for name in ("run.json", "manifest.json", "units/u0000000.json"):
        assert SECRET.encode() not in folder.read(name, max_bytes=1 << 20)
    s3.fault = fail_first("503", 1000)
    with pytest.raises(ReadFailedError) as caught:
        folder.read("run.json", max_bytes=1 << 20)
    assert SECRET not in str(caught.value) and SECRET not in caplog.text and "Signature" not in str(caught.value)
    for url in ("s3://user:password@bucket/x", "az://container/x?sig=abc", "ftp://host/x"):
        with pytest.raises(StoreError) as refused:
            StoreReader(url)
        assert "password" not in str(refused.value) and "abc" not in str(refused.value)


@pytest.mark.parametrize("url", ["gs://bucket/store", "az://container/store"])
def test_other_clouds_are_reached_by_the_same_client(url, monkeypatch):
    """No server for these is at hand; that the client is built and the protocol is the same stands in."""
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    folder = open_folder(url)
    assert type(folder._store()).__name__ == {"gs": "GCSStore", "az": "AzureStore"}[url[:2]]


def test_memory_and_file_urls_follow_the_protocol(tmp_path):
    folder = open_folder(f"file://{tmp_path}")
    assert folder.create("units/a", b"1") and not folder.create("units/a", b"2")
    assert folder.read("units/a", max_bytes=5) == b"1" and folder.names("units") == ["a"] and folder.size("b") is None


def test_a_server_that_does_not_answer_is_named_and_given_up(s3, remote, monkeypatch):
    """The client waits in code of its own: the bound, and a signal that asks to stop, hold all the same."""
    reader = StoreReader(remote[0])
    s3.fault, s3.stall_seconds = fail_first("stall", 100), 0.6
    monkeypatch.setenv("POTSTILL_READ_LIMIT_SECONDS", "0.2")
    with pytest.raises(HungReadError, match=r"s3://bucket/a run/tokens/.*: a read has not come back for 0\.\d"):
        reader.row(3)
    monkeypatch.delenv("POTSTILL_READ_LIMIT_SECONDS")
    monkeypatch.setattr(waiting, "STUCK_SECONDS", 0.2)
    give_up_reads("SIGTERM")
    try:
        with pytest.raises(StoppedReadError, match="stopped by SIGTERM while a read of s3://bucket/a run/tokens"):
            StoreReader(remote[0])
    finally:
        give_up_reads(None)
    deadline = time.monotonic() + 20
    while waiting._under_way:  # nothing of it is left for the next test
        assert time.monotonic() < deadline
        time.sleep(0.05)
