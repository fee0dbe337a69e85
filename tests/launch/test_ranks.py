"""Children die with their parent; ranks get their place, and none outlives the others when one fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from potstill.common.processes import start, stop
from potstill.launch import ranks
from potstill.launch.ranks import run_ranks

PROBE = """
import os, pathlib, signal, sys, time
folder, what = pathlib.Path(sys.argv[2]), sys.argv[1]
rank = int(os.environ["RANK"])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "EXTRA")
(folder / f"place{rank}").write_text(" ".join(os.environ.get(name, "-") for name in names))
if what == "saves":  # as a training rank does
    signal.signal(signal.SIGTERM, lambda *_: ((folder / f"saved{rank}").touch(), sys.exit(75)))
(folder / f"pid{rank}").write_text(str(os.getpid()))
if what == "fails" and rank == 1:
    sys.exit(7)
if what == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "ends75":
    sys.exit(75 if rank == 1 else 0)
if what in ("fails", "killed"):  # hangs in a collective call, deaf to TERM
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if what != "ok":
    time.sleep(60)
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ranks.RanksEnd]:
    """Runs two ranks of PROBE, which write into tmp_path."""
    (tmp_path / "probe_rank.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(ranks, "LAST_WORDS_SECONDS", 0.5)

    def run(what: str) -> ranks.RanksEnd:
        arguments = [what, str(tmp_path)]
        return run_ranks("probe_rank", arguments, num_ranks=2, environment={"EXTRA": "more"}, fine=(0, 75))

    return run


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    parent = (
        "import sys, time\nfrom potstill.common.processes import start\n"
        f"start([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    )
    process = start([sys.executable, "-c", parent], environment={"PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        deadline = time.monotonic() + 30
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        pid = int(pid_file.read_text())
        process.kill()
        process.wait()
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not _alive(pid)
    finally:
        stop(process)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_ranks_get_their_place_and_their_arguments(tmp_path: Path, probe: Callable[..., ranks.RanksEnd]) -> None:
    assert probe("ok") == ranks.RanksEnd((0, 0), (), ())
    for rank in (0, 1):
        assert (tmp_path / f"place{rank}").read_text() == f"{rank} {rank} 2 2 127.0.0.1 more"


@pytest.mark.parametrize(("what", "code"), [("fails", 7), ("killed", -signal.SIGKILL)])
def test_a_rank_that_fails_is_named_and_the_others_are_ended(
    tmp_path: Path, probe: Callable[..., ranks.RanksEnd], what: str, code: int
) -> None:
    end = probe(what)
    assert (end.codes[1], end.failed) == (code, (1,))
    assert end.codes[0] == -signal.SIGKILL, "it did not listen to anything else"
    assert not _alive(int((tmp_path / "pid0").read_text()))


def test_ranks_that_stop_early_are_no_failure(probe: Callable[..., ranks.RanksEnd]) -> None:
    assert probe("ends75") == ranks.RanksEnd((0, 75), (), ())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_every_rank_as_term(
    tmp_path: Path, probe: Callable[..., ranks.RanksEnd], number: signal.Signals
) -> None:
    def send() -> None:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    before = signal.getsignal(number)
    sender.start()
    end = probe("saves")
    sender.join()
    assert end == ranks.RanksEnd((75, 75), (), (number,))
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    assert signal.getsignal(number) == before


def test_ranks_die_with_the_command(tmp_path: Path, probe: Callable[..., ranks.RanksEnd]) -> None:
    code = (
        "from potstill.launch.ranks import run_ranks\n"
        f"run_ranks('probe_rank', ['saves', {str(tmp_path)!r}], num_ranks=2)"
    )
    process = start([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 30
        while len([path for path in tmp_path.glob("pid*") if path.read_text()]) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
        process.kill()
        process.wait()
        while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(_alive(pid) for pid in pids)
    finally:
        stop(process)


def test_the_visible_gpus_of_the_user_are_left_alone() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in ranks.rank_environment(0, 2, node=ranks.Node(0, 1, "127.0.0.1", 1))
