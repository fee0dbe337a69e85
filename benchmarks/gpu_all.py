"""All that is measured on one GPU, in one command and within the minutes that are given.

    python -m benchmarks --gpu [--minutes 9] [--output FOLDER]  (one CUDA device)
    python -m benchmarks --gpu --smoke --output FOLDER          (CPU, tiny: the same way through, figures mean nothing)

No environment is made: it runs with the Python that runs it, whose PYTHONPATH may name more. Parts go by worth
(gpu_parts.py), each a process group of its own that is killed at its bound; one that fails does not stop the others.
FOLDER holds summary.md and summary.json, both rewritten whenever a figure comes in, and log.txt, which holds all that
the parts said.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_goals import Figures
from benchmarks.gpu_parts import PARTS, STARTUP_SECONDS, Budget, Part
from benchmarks.gpu_summary import ROOT, Outcome, Summary, about

LOG = "log.txt"
POLL_SECONDS = 0.5
# A test's line under -v, with pytest-xdist and without.
TEST_LINES = (
    re.compile(r"^\[gw\d+\] \[ *\d+%\] (?P<kind>[A-Z]+) (?P<test>\S+)", re.MULTILINE),
    re.compile(r"^(?P<test>\S+::.*?) (?P<kind>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]$", re.MULTILINE),
)


class Stopped(Exception):
    """The run was told to stop by a signal."""


def count_tests(text: str) -> Figures:
    """Tests by their ending, and the names of those that failed, from what pytest -v has said up to now."""
    kinds: Counter[str] = Counter()
    not_passed = []
    for pattern in TEST_LINES:
        for match in pattern.finditer(text):
            kinds[match["kind"].lower()] += 1
            if match["kind"] in ("FAILED", "ERROR"):
                not_passed.append(match["test"])
    if not kinds:
        return {}
    counts = {kind: kinds[kind] for kind in ("passed", "failed", "error", "skipped")}
    return {**counts, "not_passed": not_passed[:40]}


def environment(*, smoke: bool) -> dict[str, str]:
    """What a part's process is given: this checkout first, nothing from a network, one machine."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "2",
    }
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    if smoke:
        own |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {**defaults, **os.environ, **own}


@contextmanager
def process_group(words: Sequence[str], log: IO[str], *, smoke: bool) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m words` as the leader of a group, of which nothing is left at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment(smoke=smoke),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers too that outlived the process
        process.wait()


class Reader:
    """What a part has said or written up to now."""

    def __init__(self, part: Part, file: Path, log: Path) -> None:
        self.part, self.file, self.log = part, file, log
        self._start = log.stat().st_size if log.is_file() else 0
        self._seen: Any = None

    def figures(self) -> Figures | None:
        """The figures, if there are any."""
        if self.part.reads == "pytest":
            with open(self.log, encoding="utf-8", errors="replace") as log:
                log.seek(self._start)
                return count_tests(log.read()) or None
        if not self.file.is_file():
            return None
        found: Figures = json.loads(self.file.read_text(encoding="utf-8"))
        return found

    def news(self) -> bool:
        """Whether something has changed since the last time this was asked."""
        watched = self.log if self.part.reads == "pytest" else self.file
        seen = (watched.stat().st_size, watched.stat().st_mtime_ns) if watched.is_file() else None
        changed, self._seen = seen != self._seen, seen
        return changed


def run_part(outcome: Outcome, *, scratch: Path, log: Path, smoke: bool, tell: Callable[[], None]) -> None:
    """Run one part to its end or its bound; `outcome` says at any moment how it stands, `tell` is called for news."""
    part, bound = outcome.part, outcome.bound
    assert bound is not None
    file = scratch / f"{part.name}.json"
    seconds = max(bound - STARTUP_SECONDS, 0.6 * bound)
    words = [word.format(file=file, seconds=f"{seconds:.0f}") for word in (part.smoke_words if smoke else part.words)]
    outcome.state, began = "running", time.monotonic()
    with open(log, "a", encoding="utf-8") as sink:
        sink.write(f"\n===== {part.name}: at most {bound:.0f} s\n")
        sink.flush()
        reader = Reader(part, file, log)
        tell()
        with process_group(words, sink, smoke=smoke) as process:
            while process.poll() is None and time.monotonic() - began < bound:
                time.sleep(min(POLL_SECONDS, max(0.01, bound - (time.monotonic() - began))))
                outcome.seconds = time.monotonic() - began
                if reader.news():
                    outcome.figures = reader.figures()
                    tell()
            code = process.poll()
    outcome.seconds, outcome.figures = time.monotonic() - began, reader.figures()
    conclude(outcome, code)
    tell()


def conclude(outcome: Outcome, code: int | None) -> None:
    """How a part ended whose process gave `code`, or None when it was killed at its bound."""
    if code is None:
        kept = "what it had is kept" if outcome.figures else "it left nothing"
        outcome.state, outcome.note = "stopped", f"at its bound of {outcome.bound:.0f} s; {kept}"
    elif code != 0:
        outcome.state, outcome.note = "failed", f"ended with code {code}; see {LOG}"
    elif not outcome.figures:
        outcome.state, outcome.note = "failed", f"left no figures; see {LOG}"
    else:
        outcome.state = "done"


def run_parts(summary: Summary, budget: Budget) -> None:
    """Run all parts for which there is time, whatever becomes of each."""
    log = summary.output / LOG

    def tell() -> None:
        summary.spent = budget.spent()
        summary.write()

    tell()
    with tempfile.TemporaryDirectory(prefix="potstill_gpu_") as scratch:
        for outcome in summary.outcomes:
            outcome.bound = budget.bound(outcome.part)
            if summary.smoke and not outcome.part.smoke_words:
                outcome.state, outcome.note = "not walked", "its script goes the way of an earlier part"
            elif outcome.bound is None:
                outcome.state = "not measured"
                outcome.note = f"time: it wants {outcome.part.least:.0f} s, {budget.left():.0f} s were left"
            else:
                run_part(outcome, scratch=Path(scratch), log=log, smoke=summary.smoke, tell=tell)
            print(f"{outcome.part.name}: {outcome.told}, {outcome.seconds:.0f} s", flush=True)
    tell()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """While open, SIGTERM and SIGINT raise Stopped here, so that the running part is killed and the summary written."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(output: Path, *, minutes: float, smoke: bool, parts: Sequence[Part] = PARTS) -> int:
    """Run everything; 1 if a part failed, was stopped or the run was. A goal that is missed is told and no failure."""
    budget = Budget(60.0 * minutes)
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / LOG).write_text("", encoding="utf-8")
    summary = Summary(output, about(smoke=smoke), [Outcome(part) for part in parts], minutes, smoke)
    print(f"{summary.card}, commit {summary.about['commit']}, {minutes:g} minutes", flush=True)
    with stopped_by_signals():
        try:
            run_parts(summary, budget)
            bad = [outcome.part.name for outcome in summary.outcomes if outcome.state in ("failed", "stopped")]
            summary.ending = f"not whole: {', '.join(bad)}" if bad else "every part that had time ended well"
        except Stopped as signalled:
            for outcome in summary.outcomes:
                if outcome.state == "running":
                    outcome.state, outcome.note = "stopped", f"the run was, by {signalled}"
                elif outcome.state == "waiting":
                    outcome.state, outcome.note = "not measured", f"the run was stopped by {signalled}"
            bad, summary.ending = ["run"], f"stopped by {signalled}"
        summary.spent = budget.spent()
        summary.write()
    print(summary.as_markdown().split("## Parts")[0].rstrip(), flush=True)
    print(summary.last_line(), flush=True)
    return 1 if bad else 0
