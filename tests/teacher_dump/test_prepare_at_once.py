"""Two prepares in one folder, and runs that were killed: one writes, the other says who, and nothing is pinned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potstill.common.errors import UserError
from potstill.common.exit_codes import DONE, ERROR
from potstill.launch.cli import main
from potstill.storage import StoreReader, StoreWriter
from potstill.teacher_dump import PrepareConfig, prepare
from potstill.teacher_dump import held_output as held_output_module
from potstill.teacher_dump.held_output import LOCK_FILE, held_output
from potstill.teacher_dump.kept_tokenizer import UNSETTLED
from tests.campaign import tell
from tests.teacher_dump.tiny import some_texts, write_jsonl

# Holds the folder, says so, and does not let go before it is told to (or killed).
HOLD = (
    "import sys; from pathlib import Path; from potstill.teacher_dump.held_output import held_output\n"
    "with held_output(Path(sys.argv[1]), stores=('train',)): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", some_texts(60))


def words(corpus: Path, output: Path, *more: str) -> list[str]:
    sizes = ["--row-length", "32", "--rows-per-unit", "4"]
    return ["prepare", "--input", str(corpus), "--vocab-size", "280", *sizes, "--output", str(output), *more]


def holder(output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(output)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.timeout(120)
def test_the_second_ends_at_once_and_says_who_writes_there(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    first = holder(out)
    try:
        started = time.monotonic()
        assert main(words(corpus, out, "--force")) == ERROR
        assert time.monotonic() - started < 10
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and f"{out}: another prepare or import writes there, process {first.pid} on " in error
        assert "started 20" in error and "name another output" in error
        assert [path.name for path in out.iterdir()] == [LOCK_FILE]
    finally:
        first.kill()
        first.communicate(timeout=20)
    # It was killed: its file is still there, and holds nobody up.
    assert (out / LOCK_FILE).exists()
    assert main(words(corpus, out)) == DONE
    assert {path.name for path in out.iterdir()} == {"train", "tokenizer"}


def test_a_lock_goes_with_its_folder_and_comes_again(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    for _ in range(2):
        with held_output(out, stores=()):
            who = json.loads((out / LOCK_FILE).read_text())
            assert who["pid"] == os.getpid() and who["host"]
            with pytest.raises(UserError, match="another prepare or import"), held_output(out, stores=()):
                pass
        assert not (tmp_path / "a").exists()
    out.mkdir(parents=True)
    with pytest.raises(KeyError), held_output(out, stores=()):
        raise KeyError
    assert out.is_dir() and not list(out.iterdir())


def test_a_file_that_its_holder_has_just_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, calls = held_output_module._lock, []

    def late(number: int, file: Path) -> None:
        calls.append(number)
        if len(calls) == 1:
            file.unlink()  # between our opening it and our lock, the other run came to its end
        lock(number, file)

    monkeypatch.setattr(held_output_module, "_lock", late)
    with held_output(tmp_path, stores=()):
        assert len(calls) == 2 and (tmp_path / LOCK_FILE).exists()
        with pytest.raises(UserError, match="another prepare or import"), held_output(tmp_path, stores=()):
            pass


def test_what_a_run_killed_before_its_first_rows_has_left_pins_nothing(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill is an error that no handler sees: here none of those that tidy up is called."""
    out = tmp_path / "out"
    monkeypatch.setattr("potstill.teacher_dump.kept_tokenizer.KeptTokenizer.withdraw", lambda self: None)
    monkeypatch.setattr("potstill.teacher_dump.prepared.discard_unused", lambda path: None)

    def killed(self: StoreWriter, *args: object, **options: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "commit_unit", killed)
    settings = {"input": [corpus], "output": out, "row_length": 32, "rows_per_unit": 4}
    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareConfig(**settings, train_tokenizer={"vocab_size": 280}))
    (out / "tokenizer.123.tmp").mkdir()
    monkeypatch.undo()
    assert (out / "tokenizer" / UNSETTLED).exists() and (out / "train" / "run.json").exists()
    prepare(PrepareConfig(**(settings | {"row_length": 16}), tokenizer=tokenizer_folder))
    assert StoreReader(out / "train").spec.row_length == 16
    assert {path.name for path in out.iterdir()} == {"train", "tokenizer"}
    assert not (out / "tokenizer" / UNSETTLED).exists()


def test_a_mark_left_beside_rows_is_only_taken_away(corpus: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    """A kill between the first unit and the end of the mark."""
    config = PrepareConfig(input=[corpus], output=tmp_path, tokenizer=tokenizer_folder, row_length=32, rows_per_unit=4)
    prepare(config)
    before = StoreReader(tmp_path / "train").digest
    (tmp_path / "tokenizer" / UNSETTLED).touch()
    prepare(config)
    assert StoreReader(tmp_path / "train").digest == before
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists() and not (tmp_path / "tokenizer" / UNSETTLED).exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_campaign_two_commands_at_once(corpus: Path, tmp_path: Path) -> None:
    """Started 0 to 3 s apart, alike and with other options: each says it is done, or in one line why not."""
    counts = dict.fromkeys(("tried", "detected", "harmless", "silent", "hung", "crashed"), 0)
    for number in range(20):
        out = tmp_path / f"out{number}"
        other = ["--heldout-fraction", "0.2"] if number % 4 == 3 else []
        runs = []
        for more in ([], other):
            command = [sys.executable, "-m", "potstill.launch", *words(corpus, out, *more)]
            runs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            time.sleep(number % 5 * 0.6)
        for run in runs:
            counts["tried"] += 1
            try:
                _, errors = run.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                run.kill()
                run.communicate()
                counts["hung"] += 1
                continue
            last = errors.strip().splitlines()[-1]
            if run.returncode == DONE:
                counts["harmless"] += 1
            elif (
                "another prepare or import writes there" in last or "rows of another configuration stand here" in errors
            ):
                counts["detected"] += 1
            else:
                counts["crashed"] += 1
                print(errors)
        assert main(words(corpus, out)) in (DONE, ERROR)
        StoreReader(out / "train")
    tell("two prepares at once", counts)
    assert counts["silent"] + counts["hung"] + counts["crashed"] == 0
