"""The one command for a GPU: minutes shared out by worth, bounds kept, a summary that is right at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_all import count_tests, run_all, run_parts
from benchmarks.gpu_goals import GOALS, H100, H200, Goal
from benchmarks.gpu_kernels import Row
from benchmarks.gpu_parts import PARTS, RESERVE_SECONDS, Budget, Part
from benchmarks.gpu_summary import Outcome, Summary

ROOT = Path(__file__).resolve().parents[2]
CARD = "NVIDIA H100 80GB HBM3"
ABOUT = {"card": CARD, "driver": "1", "host": "x", "versions": {"torch": "2"}, "commit": "c", "date": "d"}
WRITES = "from pathlib import Path; import sys; Path(sys.argv[1]).write_text('{\"x\": 1}')"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def part(name: str, *, share: float = 0.5, least: float = 1.0, most: float = 60.0, **options: Any) -> Part:
    words = (f"part_{name}", "{file}")
    return Part(name, f"measures {name}", words, words, share, least, most, **options)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `python -m part_NAME FILE` run some code."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def make(**codes: str) -> None:
        for name, code in codes.items():
            (folder / f"part_{name}.py").write_text(code)

    return make


def summary_of(output: Path, parts: list[Part], *, goals: tuple[Goal, ...] = (), card: str = CARD) -> Summary:
    output.mkdir(exist_ok=True)
    about = {**ABOUT, "card": card}
    return Summary(output, about, [Outcome(part) for part in parts], minutes=1.0, smoke=False, goals=goals)


def states(output: Path) -> dict[str, str]:
    whole = json.loads((output / "summary.json").read_text())
    return {name: part["state"] for name, part in whole["parts"].items()}


def test_minutes_are_shared_out_in_the_order_of_worth() -> None:
    clock = Clock()
    budget = Budget(RESERVE_SECONDS + 100.0, clock)
    first = part("a", share=0.3, least=20, most=60)
    assert budget.bound(first) == pytest.approx(30.0)
    assert budget.bound(part("b", share=0.9, least=20, most=60)) == 60.0, "no part takes more than it has use for"
    clock.now += 60.0
    assert budget.bound(first) == 20.0, "a share that is too small is no use: what it needs at least is taken"
    clock.now += 25.0
    assert budget.bound(first) is None, "with 15 s left a part that needs 20 s is not begun"
    assert budget.bound(part("c", least=5, share=1.0)) == pytest.approx(15.0), "a smaller one behind it is"
    clock.now += 1e3
    assert budget.left() == 0.0 and budget.bound(part("c", least=5)) is None


@pytest.mark.parametrize("minutes", [3, 5, 9, 15, 30])
def test_no_run_is_longer_than_its_minutes(minutes: float) -> None:
    """Each part takes all that it may; what is done grows with the minutes."""
    clock = Clock()
    budget = Budget(60.0 * minutes, clock)
    done = []
    for entry in PARTS:
        bound = budget.bound(entry)
        if bound is not None:
            done.append(entry.name)
            clock.now += bound
    assert clock.now - 100.0 <= 60.0 * minutes - RESERVE_SECONDS + 1e-6
    assert done[:3] == ["tests", "kernels", "step"]
    if minutes >= 9:
        assert done[:5] == ["tests", "kernels", "step", "dump", "zero"]


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path, scripts: Any) -> None:
    scripts(a="raise SystemExit(3)", b="import time; time.sleep(100)", c=WRITES, d="print('nothing written')")
    parts = [part("a"), part("b", least=1.5, most=1.5), part("c"), part("d")]
    parts.append(part("e", least=500))
    output = tmp_path / "out"
    summary = summary_of(output, parts)
    run_parts(summary, Budget(60.0))
    told = {outcome.part.name: outcome.told for outcome in summary.outcomes}
    assert told["a"] == "failed: ended with code 3; see log.txt"
    assert told["b"] == "stopped: at its bound of 2 s; it left nothing"
    assert told["c"] == "done" and summary.outcomes[2].figures == {"x": 1}
    assert told["d"] == "failed: left no figures; see log.txt"
    assert told["e"].startswith("not measured: time: it wants 500 s, ")
    assert 1.4 < summary.outcomes[1].seconds < 8.0
    assert states(output) == {name: text.split(":")[0] for name, text in told.items()}
    assert "nothing written" in (output / "log.txt").read_text()
    table = (output / "summary.md").read_text()
    assert all(text in table for text in told.values())
    assert {path.name for path in output.iterdir()} == {"summary.md", "summary.json", "log.txt"}


def test_what_a_part_had_when_its_time_was_up_is_kept(tmp_path: Path, scripts: Any) -> None:
    scripts(a=WRITES + "; import time; time.sleep(100)")
    goal = Goal("x of a", "a", lambda figures: float(figures["x"]), {H100: 2.0})
    output = tmp_path / "out"
    run_parts(summary_of(output, [part("a", least=3, most=3)], goals=(goal,)), Budget(60.0))
    whole = json.loads((output / "summary.json").read_text())
    assert whole["parts"]["a"]["figures"] == {"x": 1}
    assert whole["parts"]["a"]["note"] == "at its bound of 3 s; what it had is kept"
    assert whole["goals"][0]["measured"] == 1.0 and whole["goals"][0]["verdict"] == "met (a stopped)"


def test_nothing_that_a_part_started_is_left(tmp_path: Path, scripts: Any) -> None:
    child = "import subprocess, sys; from pathlib import Path; "
    child += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); "
    ends = "Path(sys.argv[1]).write_text('{\"pid\": %d}' % p.pid)"
    scripts(a=child + ends + "; p.wait()", b=child + ends)
    summary = summary_of(tmp_path / "out", [part("a", least=2, most=2), part("b")])
    run_parts(summary, Budget(60.0))
    assert [outcome.state for outcome in summary.outcomes] == ["stopped", "done"]
    for outcome in summary.outcomes:
        assert outcome.figures is not None
        assert gone(outcome.figures["pid"]), f"the child of {outcome.part.name} lives"


def gone(pid: int) -> bool:
    """Whether a process has ended (as a zombie it has, too), within a few seconds."""
    for _ in range(50):
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return True
        if text.rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_the_summary_is_right_while_a_part_runs_and_when_the_run_is_stopped(tmp_path: Path, scripts: Any) -> None:
    """A real run in a process of its own, whose second part never ends: looked at, then stopped by a signal."""
    scripts(a=WRITES, b=WRITES.replace("1}", "2}") + "; import time; time.sleep(100)", c=WRITES)
    output = tmp_path / "out"
    names = "[P(n, n, ('part_' + n, '{file}'), ('part_' + n, '{file}'), 0.5, 1, 60) for n in 'abc']"
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu_all import run_all; "
        f"from benchmarks.gpu_parts import Part as P; "
        f"sys.exit(run_all(Path({str(output)!r}), minutes=3, smoke=True, parts={names}))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        found: dict[str, Any] = {}
        for _ in range(300):
            if (output / "summary.json").is_file():
                found = json.loads((output / "summary.json").read_text())  # whole at any moment
                if found["parts"]["b"]["figures"]:
                    break
            time.sleep(0.1)
        assert {name: part["state"] for name, part in found["parts"].items()} == {
            "a": "done",
            "b": "running",
            "c": "waiting",
        }
        assert found["parts"]["b"]["figures"] == {"x": 2} and found["ending"] == "still running"
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    assert states(output) == {"a": "done", "b": "stopped", "c": "not measured"}
    assert json.loads(text.splitlines()[-1])["ending"] == "stopped by SIGTERM"


def test_a_run_of_parts_that_fail_ends_with_code_1(tmp_path: Path, scripts: Any, capsys: Any) -> None:
    scripts(a=WRITES, b="raise SystemExit(1)")
    assert run_all(tmp_path / "good", minutes=3, smoke=True, parts=[part("a")]) == 0
    assert run_all(tmp_path / "bad", minutes=3, smoke=True, parts=[part("b"), part("a")]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ending"] == "not whole: b" and last["parts"]["a"] == "done"


def test_an_older_log_and_figure_do_not_stand_for_this_run(tmp_path: Path, scripts: Any, capsys: Any) -> None:
    scripts(a=WRITES)
    for _ in range(2):
        run_all(tmp_path / "out", minutes=3, smoke=True, parts=[part("a")])
    assert (tmp_path / "out" / "log.txt").read_text().count("===== a") == 1
    scripts(a="raise SystemExit(1)")
    run_all(tmp_path / "out", minutes=3, smoke=True, parts=[part("a")])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]["a"]["figures"] is None


XDIST = """
scheduling tests via LoadGroupScheduling
[gw0] [  1%] PASSED tests/gpu/test_a.py::test_one[a-b c]
[gw1] [  2%] FAILED tests/gpu/test_a.py::test_two
[gw1] [  3%] SKIPPED tests/gpu/test_a.py::test_three
"""
PLAIN = """
tests/gpu/test_a.py::test_one PASSED                  [ 33%]
tests/gpu/test_a.py::test_two ERROR                   [ 66%]
tests/gpu/test_a.py::test_three SKIPPED (no device)   [100%]
ERROR tests/gpu/test_a.py::test_two - OSError
"""


def test_tests_are_counted_as_they_end() -> None:
    assert count_tests("collecting ...") == {}
    found = count_tests(XDIST)
    assert (found["passed"], found["failed"], found["error"], found["skipped"]) == (1, 1, 0, 1)
    assert found["not_passed"] == ["tests/gpu/test_a.py::test_two"]
    found = count_tests(PLAIN)
    assert (found["passed"], found["failed"], found["error"], found["skipped"]) == (1, 0, 1, 1)


@pytest.mark.slow
def test_pytest_says_what_is_counted(tmp_path: Path, scripts: Any) -> None:
    """The real pytest with processes of its own: what its tests gave is in the summary while one of them still runs."""
    output, test, seen = tmp_path / "out", tmp_path / "test_some.py", tmp_path / "seen"
    body = "import pathlib, pytest, time\ndef test_good(): pass\ndef test_bad(): assert 0\n"
    body += "@pytest.mark.skip(reason='why')\ndef test_not(): pass\n"
    test.write_text(f"{body}def test_slow():\n    while not pathlib.Path({str(seen)!r}).exists(): time.sleep(0.05)\n")
    call = ("pytest", "-v", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "-n", "2", str(test))
    summary = summary_of(output, [Part("tests", "some", call, call, 1.0, 8.0, 120.0, "pytest")])
    names, running = ("passed", "failed", "skipped"), []

    def watch() -> None:
        """Let the last test end once the three others are told of, or the run is over."""
        while not summary.outcomes[0].state.startswith(("stopped", "failed", "done")):
            figures = json.loads((output / "summary.json").read_text())["parts"]["tests"]["figures"] or {}
            running[:] = [figures.get(name) for name in names]
            if running == [1, 1, 1]:
                break
            time.sleep(0.1)
        seen.touch()

    summary.write()
    watcher = threading.Thread(target=watch)
    watcher.start()
    run_parts(summary, Budget(130.0))
    watcher.join()
    [outcome] = summary.outcomes
    assert running == [1, 1, 1], "nothing was told while a test still ran"
    assert outcome.state == "failed" and outcome.figures is not None, outcome.told
    assert [outcome.figures[name] for name in names] == [2, 1, 1]


def goal(what: str) -> Goal:
    [found] = [goal for goal in GOALS if goal.what == what]
    return found


def kernel_figures(what: str, **cells: float) -> dict[str, Any]:
    row = asdict(Row(what, 128256, 2048, "potstill", "CE + sparse KL"))
    return {"about": {"device": CARD}, "rows": [{**row, **cells}]}


@pytest.mark.parametrize(
    ("card", "milliseconds", "verdict"),
    [
        (CARD, 2.05, "met"),
        (CARD, 2.15, "MISSED"),
        ("NVIDIA H200", 2.05, "MISSED"),
        ("NVIDIA H200", 1.55, "met"),
        ("NVIDIA A100-SXM4-80GB", 2.05, "no goal for this card"),
    ],
)
def test_goals_go_by_the_card(tmp_path: Path, card: str, milliseconds: float, verdict: str) -> None:
    summary = summary_of(
        tmp_path / "out", [part("kernels")], goals=(goal("loss and gradient from logits, ms"),), card=card
    )
    [outcome] = summary.outcomes
    outcome.figures, outcome.state = kernel_figures("logits", milliseconds=milliseconds), "done"
    [row] = summary.goal_rows()
    assert (row["measured"], row["verdict"]) == (milliseconds, verdict)
    assert row["goal"] == (None if "A100" in card else 1.6 if "H200" in card else 2.1)
    summary.write()
    assert verdict in (tmp_path / "out" / "summary.md").read_text()


def test_goals_of_memory_dump_and_tests() -> None:
    peak = goal("fused linear, peak over the inputs, MiB")
    for found, verdict in ((1769.0, "met"), (1771.0, "MISSED")):
        assert peak.verdict(peak.value(kernel_figures("linear", peak_mib=found)), CARD) == verdict
    dump = goal("dump over the bare forward")
    assert [dump.verdict(x, "NVIDIA H200") for x in (0.98, 0.9)] == ["met", "MISSED"]
    failed = goal("GPU tests that failed")
    counts = {"passed": 5, "failed": 0, "error": 1, "skipped": 0}
    assert failed.verdict(failed.value(counts), "another card") == "MISSED"
    assert {goal.bound(H200) for goal in GOALS if goal.what.startswith("distilled step")} == {1.05}


def test_a_figure_that_is_not_there_is_named_so(tmp_path: Path) -> None:
    goals = (goal("fused linear, forward and backward, ms"), goal("dump over the bare forward"))
    summary = summary_of(tmp_path / "out", [part("kernels"), part("dump")], goals=goals)
    summary.outcomes[0].figures = kernel_figures("logits", milliseconds=1.0)
    verdicts = [row["verdict"] for row in summary.goal_rows()]
    assert verdicts == ["not measured: no linear of potstill at this shape", "not measured: dump waiting"]
