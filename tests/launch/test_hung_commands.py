"""`potstill dump` and `train`, one rank and two, whose rows are on a mount that hangs: signals and bounds end them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.launch.ranks import LAST_WORDS_SECONDS
from tests.campaign import tell
from tests.storage.hanging import HangingMount
from tests.student_train import tiny
from tests.teacher_dump.tiny import make_tokens, save_llama

ENDS_WITHIN = 2.0
# After a bound the other rank has time for its last words, and libraries for their ends; nobody has asked for haste.
BOUND_ENDS_WITHIN = 1.0 + LAST_WORDS_SECONDS + 10.0
STARTS_WITHIN = 120.0


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> HangingMount:
    return HangingMount(tmp_path_factory.mktemp("hanging"))


def wait_for(path: Path, words: str, process: Any) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while words not in path.read_text():
        assert time.monotonic() < deadline and process.poll() is None, path.read_text()
        time.sleep(0.02)


@contextmanager
def hanging(mount: HangingMount, arguments: list[str], log: Path, words: str, **bounds: str) -> Iterator[Any]:
    """The command, which says `words` in its log, and then waits for a unit that does not come."""
    with mount.process(["-m", "potstill.launch", *arguments], "tokens/units/", log=log, **bounds) as process:
        try:
            wait_for(log, words, process)
            mount.hang()
            mount.wait_until_met()
            time.sleep(0.5)  # what was read before is used up
            yield process
        finally:
            mount.answer()


def ended(process: Any) -> float:
    """Seconds until the process has ended."""
    started = time.monotonic()
    process.wait(timeout=60)
    return time.monotonic() - started


def train_arguments(stores: dict[str, Path], folder: Path, num_ranks: int) -> list[str]:
    folder.mkdir()
    tree = tiny.config_tree(stores, folder / "run", run={"max_steps": 1_000_000})
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return ["train", "--config", str(folder / "run.yaml"), "--num-ranks", str(num_ranks)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_signals_and_bounds_end_hung_commands(
    mount: HangingMount, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = dict.fromkeys(("tried", "detected", "harmless", "silent", "hung", "crashed"), 0)
    longest = 0.0
    stores = tiny.write_all(tmp_path / "stores")
    model = save_llama(tmp_path / "model")
    tokens = make_tokens(tmp_path / "many" / "tokens", [(16,)] * 4000, rows_per_unit=1)
    dump = ["dump", "--tokens", str(tokens), "--teacher", str(model), "--batch-rows", "1", "--k", "8"]
    dump += ["--set", "teacher.check_tokenizer=false", "--output"]
    cases: list[tuple[str, list[str], str]] = [("dump", [*dump], "units to do")]
    cases += [(f"train{n}", train_arguments(stores, tmp_path / f"t{n}", n), "float64") for n in (1, 2)]
    for name, arguments, words in cases:
        for number in (signal.SIGTERM, signal.SIGINT, None):
            log = tmp_path / f"{name}-{number}.log"
            log.touch()
            output = [str(tmp_path / f"out-{number}")] if name == "dump" else ["--force"]
            bounds = {} if number else {"POTSTILL_READ_WARN_SECONDS": "0.3", "POTSTILL_READ_LIMIT_SECONDS": "1"}
            with hanging(mount, [*arguments, *output], log, words, **bounds) as process:
                if number:
                    process.send_signal(number)
                seconds = ended(process)
            code, text = process.returncode, log.read_text()
            counts["tried"] += 1
            named = "tokens/units/u0" in text and "a read" in text
            fine = (75, 130) if number else (1,)
            counts["hung"] += seconds > (ENDS_WITHIN if number else BOUND_ENDS_WITHIN)
            counts["crashed"] += "Traceback" in text or code not in fine
            counts["silent"] += not named
            counts["detected"] += named and code in fine
            longest = max(longest, seconds if number else 0.0)
            with capsys.disabled():
                print(f"\n{name} {number and signal.Signals(number).name}: code {code} after {seconds:.2f} s")
                print(f"  {text.splitlines()[-1]}")
    with capsys.disabled():
        print(f"longest after a signal: {longest:.2f} s")
        tell("reads that hang", counts)
    assert counts["detected"] == counts["tried"] and not counts["hung"] + counts["crashed"] + counts["silent"]
