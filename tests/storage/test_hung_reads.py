"""A read that does not come back is named in the log and ends the run; signals are obeyed while it hangs."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest

from potstill.storage import HungReadError, StoppedReadError, StoreError, StoreReader
from potstill.storage.files import waiting
from potstill.storage.files.prefetch import Prefetcher, in_parallel
from potstill.storage.files.waiting import give_up_reads, stuck_read, waiting_for
from tests.storage.hanging import HangingMount
from tests.storage.stores import write_tokens

ENDS_WITHIN = 2.0
LOOP = """
import logging, sys
from potstill.storage import EpochPlan, Loader, StoreReader
logging.basicConfig()
tokens = StoreReader(sys.argv[1])
with Loader(EpochPlan(tokens.num_rows, global_batch=2, seed=0), tokens, {}) as loader:
    print("ready", flush=True)
    while True:
        next(loader)
"""
# As `train` does: signals only leave a note, for the end of the step that is under way.
NOTING_LOOP = (
    """
import signal
from potstill.storage import give_up_reads
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: give_up_reads(signal.Signals(number).name))
"""
    + LOOP
)
POOL = """
import sys
from concurrent.futures import ThreadPoolExecutor
from potstill.storage import StoreReader
tokens = StoreReader(sys.argv[1])
with ThreadPoolExecutor(1) as pool:
    print("ready", flush=True)
    print(pool.submit(tokens.row, 0).exception())
"""


@pytest.fixture(scope="module")
def mount(tmp_path_factory):
    return HangingMount(tmp_path_factory.mktemp("hanging"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("hung") / "tokens", 8).url


@pytest.fixture(autouse=True)
def answering(mount):
    yield
    mount.answer()
    give_up_reads(None)


@pytest.fixture
def hung():
    """Work that hangs until the test is over, and leaves nothing under way for the next one."""
    release = threading.Event()
    yield lambda wait: release.wait(20)
    release.set()
    deadline = time.monotonic() + 10
    while waiting._under_way:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_line(stream, text):
    seen = []
    while line := stream.readline():
        seen.append(line)
        if text in line:
            return line
    raise AssertionError("".join(seen))


@pytest.mark.parametrize("program", [LOOP, POOL], ids=["loader", "executor"])
def test_a_hung_read_is_named_and_then_ends_the_run(mount, store, program):
    bounds = {"POTSTILL_READ_WARN_SECONDS": "0.3", "POTSTILL_READ_LIMIT_SECONDS": "1"}
    with mount.process(["-c", program, store], "/units/", **bounds) as process:
        wait_for_line(process.stdout, "ready")
        started = time.monotonic()
        mount.hang()
        output, log = process.communicate(timeout=20)
    assert time.monotonic() - started < 6
    assert re.search(rf"{store}/units/u0.*: a read has not come back for 0\.\d+ s; it is given up after 1 s", log)
    said = log if program is LOOP else output
    assert "at most 1 are waited for (POTSTILL_READ_LIMIT_SECONDS)" in said
    assert process.returncode == (1 if program is LOOP else 0)


@pytest.mark.parametrize(
    ("program", "number"),
    [(LOOP, signal.SIGINT), (NOTING_LOOP, signal.SIGTERM), (NOTING_LOOP, signal.SIGINT)],
    ids=["interrupted", "TERM noted", "INT noted"],
)
def test_signals_are_obeyed_while_the_loader_waits_for_a_hung_read(mount, store, program, number):
    with mount.process(["-c", program, store], "/units/") as process:
        wait_for_line(process.stdout, "ready")
        mount.hang()
        mount.wait_until_met()
        process.send_signal(number)
        _, log = process.communicate(timeout=ENDS_WITHIN)
    assert process.returncode not in (0, -signal.SIGKILL)
    if program is NOTING_LOOP:
        assert f"stopped by {number.name} while a read of {store}/units/u0000" in log


@pytest.mark.parametrize(
    ("call", "number"), [("read", signal.SIGINT), ("open", signal.SIGINT), ("read", signal.SIGTERM)]
)
def test_verify_obeys_signals_while_it_waits_for_a_hung_file(mount, store, call, number):
    environment = {"HANG_OPEN": "1"} if call == "open" else {}
    mount.hang()
    with mount.process(["-m", "potstill.launch", "verify", store], "tokens/run.json", **environment) as process:
        mount.wait_until_met()
        process.send_signal(number)
        _, log = process.communicate(timeout=ENDS_WITHIN)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGTERM)
    assert "Traceback" not in log


@pytest.mark.parametrize(("mark", "words"), [("run.json", ()), (".arrow", ("--deep",))], ids=["run.json", "a unit"])
def test_verify_ends_by_itself_and_names_the_file(mount, store, mark, words):
    mount.hang()
    bounds = {"POTSTILL_READ_LIMIT_SECONDS": "0.5"}
    with mount.process(["-m", "potstill.launch", "verify", store, *words], mark, **bounds) as process:
        _, log = process.communicate(timeout=20)
    assert process.returncode == 1 and re.search(rf"potstill verify: error: {store}/.*{mark}: a read has not come", log)


def test_a_read_that_gets_on_is_not_given_up(monkeypatch, hung):
    monkeypatch.setenv("POTSTILL_READ_LIMIT_SECONDS", "0.4")

    def slowly(wait):
        for _ in range(8):
            time.sleep(0.1)
            wait.moved()
        return "all"

    assert waiting_for("a large file", slowly) == "all"
    with pytest.raises(HungReadError, match=r"a file: a read has not come back for 0\.\d+ s, at most 0\.4 are waited"):
        waiting_for("a file", hung)


def test_errors_and_results_come_from_the_thread_that_made_the_call():
    caller = threading.get_ident()
    threads = {waiting_for("a file", lambda wait: threading.get_ident()) for _ in range(20)}
    assert len(threads) == 1 and caller not in threads
    with pytest.raises(StoreError, match="as it was raised"):
        waiting_for("a file", lambda wait: raise_store_error())
    assert {waiting_for("a file", lambda wait: threading.get_ident())} == threads


def raise_store_error():
    raise StoreError("as it was raised")


def test_helpers_end_with_the_threads_they_work_for_and_a_fork_has_its_own():
    def ask():
        waiting_for("a file", lambda wait: None)

    ask()
    before = sum(thread.name == "potstill-read" for thread in threading.enumerate())
    askers = [threading.Thread(target=ask) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    deadline = time.monotonic() + 10
    while sum(thread.name == "potstill-read" for thread in threading.enumerate()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        os._exit(waiting_for("a file", lambda wait: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_stop_waits_for_reads_that_are_only_slow(monkeypatch, hung):
    monkeypatch.setattr(waiting, "STUCK_SECONDS", 0.5)
    give_up_reads("SIGTERM")
    assert waiting_for("a file", lambda wait: time.sleep(0.2) or "there") == "there"
    with pytest.raises(StoppedReadError, match=r"stopped by SIGTERM while a read of a file had not come back for 0\."):
        waiting_for("a file", hung)
    give_up_reads(None)
    assert stuck_read() is not None and stuck_read(threads=set()) is None


def test_closing_does_not_wait_for_a_stuck_thread(monkeypatch, hung):
    monkeypatch.setattr(waiting, "STUCK_SECONDS", 0.05)
    prefetcher = Prefetcher(num_threads=1, name="stuck")
    prefetcher.submit([lambda: waiting_for("a file", hung)], lambda found: found)
    time.sleep(0.2)
    started = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - started < 0.5


def test_parallel_reads_come_in_order_and_the_first_error_is_raised():
    works = [lambda n=n: n * n for n in range(50)]
    assert in_parallel(works, num_threads=4) == [n * n for n in range(50)]
    with pytest.raises(StoreError, match="as it was raised"):
        in_parallel([*works, raise_store_error], num_threads=4)


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_a_bound_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("POTSTILL_READ_LIMIT_SECONDS", text)
    with pytest.raises(StoreError, match=f"POTSTILL_READ_LIMIT_SECONDS is '{text}', expected a number of seconds"):
        waiting.seconds_of(waiting.LIMIT_VARIABLE)


def test_the_reader_hands_its_reads_over(store, monkeypatch):
    real, seen = os.pread, set()
    monkeypatch.setattr(os, "pread", lambda *args: seen.add(threading.current_thread().name) or real(*args))
    assert StoreReader(store).row(3).row == 3 and seen == {"potstill-read"}
