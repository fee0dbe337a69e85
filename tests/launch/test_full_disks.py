"""Every command that writes, on disks that are too small: one line that says where and what to do; then it continues.

Training on a full disk is in tests/student_train/test_full_disk.py, prepare from the first byte to the last in
tests/teacher_dump/test_prepare_failures.py.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from potstill.common.disk_room import NoRoomError, is_no_room, write_whole
from potstill.common.exit_codes import DONE, ERROR, INCOMPLETE
from potstill.launch.cli import main
from potstill.storage import StoreReader
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.made_up_runs import records, write_run
from tests.teacher_dump.foreign_files import truth_of, write_distillkit
from tests.teacher_dump.test_rollout import model, tokens
from tests.teacher_dump.tiny import chat_tokenizer, save_llama, some_texts, write_jsonl

__all__ = ["model", "tokens"]  # fixtures
SmallDisk = Callable[[int], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of what the commands read, by name."""
    folder = tmp_path_factory.mktemp("made")
    stores = tiny.write_all(folder / "stores")
    rows = StoreReader(stores["tokens"]).tokens_rows(range(40))
    found = {
        **stores,
        "corpus": write_jsonl(folder / "corpus.jsonl", some_texts(200)),
        "tokenizer": chat_tokenizer(folder / "tokenizer"),
        "model": save_llama(folder / "model", vocab_size=tiny.VOCAB),
        "foreign": write_distillkit(folder / "foreign", [truth_of(row) for row in rows]),
        "run": write_run(folder / "run", records(steps=50)),
    }
    return {name: str(path) for name, path in found.items()}


# Name: (command, kilobytes of the disk in turn, each too small but for the last, what it makes)
COMMANDS = {
    "prepare": (
        "prepare --input {corpus} --tokenizer {tokenizer} --row-length 32 --rows-per-unit 4 --output {out}",
        (4, 24, 56, 2048),
        "train/manifest.json",
    ),
    "import targets": (
        "import targets --input {foreign} --tokens {tokens} --teacher bigram --output {out}",
        (4, 24, 56, 2048),
        "targets/manifest.json",
    ),
    "dump": (
        "dump --tokens {tokens} --teacher {model} --set teacher.check_tokenizer=false --output {out}",
        (4, 24, 56, 2048),
        "manifest.json",
    ),
    "score": (
        "score --tokens {tokens} --slm {model} --set model.check_tokenizer=false --output {out}",
        (4, 24, 2048),
        "manifest.json",
    ),
    "prune": (
        "prune --model {model} --output {out} --set intermediate_size=24 tokens={tokens} check_tokenizer=false "
        "check=false",
        (8, 4096),
        "model.safetensors",
    ),
    "eval": ("eval --model {model} --heldout {heldout} --output {out}/figures.json", (0, 64), "figures.json"),
    "report": ("report {run} --output {out}/report.html", (24, 16384), "report.html"),
    "inspect": (
        "inspect {teacher} --tokens {tokens} --rows 0:20 --html {out}/page.html",
        (24, 4096),
        "page.html",
    ),
}


def told(words: list[str], place: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Exit code of the command; where it is not done, its last line names a file at `place` and says what to do."""
    capsys.readouterr()
    code = main(words)
    errors = capsys.readouterr().err
    if code != DONE:
        assert code in (ERROR, INCOMPLETE) and "Traceback" not in errors and "defect" not in errors, errors
        last = errors.strip().splitlines()[-1]
        assert str(place) in last and "No space left on device" in last and "bytes are free at" in last, last
        assert "free space" in last or "make room" in last, last
    return code


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_where_and_continues_when_there_is_room(
    name: str, made: dict[str, str], small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    try_sizes(*COMMANDS[name], made, small_disk, capsys)


@pytest.mark.slow  # trains; `prune` writes its folder in the same way
@pytest.mark.timeout(120)
def test_an_export_says_where_and_continues_when_there_is_room(
    made: dict[str, str], small_disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = {name: Path(path) for name, path in made.items()}
    run_ranks(workers.train_run, tiny.config_tree(stores, tmp_path / "run", run={"max_steps": 2}), world=1)
    command = "export --run {run} --output {out} --set check=false"
    try_sizes(command, (8, 4096), "model.safetensors", {"run": str(tmp_path / "run")}, small_disk, capsys)


def try_sizes(
    template: str,
    sizes: Sequence[int],
    makes: str,
    made: dict[str, str],
    small_disk: SmallDisk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes = []
    for kib in sizes:
        disk = small_disk(max(kib, 4))
        full = disk / "full"
        full.unlink(missing_ok=True)
        if not kib:
            full.write_bytes(bytes(4096))
        codes.append(told(template.format(**made, out=disk / "out").split(), disk, capsys))
        if codes[-1] != DONE and makes != "manifest.json":
            assert not (disk / "out" / makes).exists(), "half of it stands as if it were whole"
            assert not list(disk.glob(".*.part")), "what failed keeps the disk full"
    assert codes == [ERROR] * (len(sizes) - 1) + [DONE]
    assert (disk / "out" / makes).stat().st_size > 0


def test_two_workers_on_a_full_disk_each_say_so(
    made: dict[str, str], small_disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"dump --tokens {made['tokens']} --teacher {made['model']} --set teacher.check_tokenizer=false".split()
    assert main([*words, "--output", str(tmp_path / "whole")]) == DONE
    disk = small_disk(24)
    out, workers_of = disk / "out", [["--worker", str(worker), "--num-workers", "2"] for worker in (0, 1)]
    for more in workers_of:
        assert told([*words, *more, "--output", str(out)], disk, capsys) == ERROR
    small_disk(2048)
    for more in workers_of:
        assert told([*words, *more, "--output", str(out)], disk, capsys) == DONE
    # Enough for the units, not for the index.
    used = sum(file.stat().st_blocks for file in disk.rglob("*")) // 2
    small_disk(used + 4)
    assert told(["seal", str(out)], disk, capsys) == ERROR
    small_disk(2048)
    assert told(["seal", str(out)], disk, capsys) == DONE
    assert StoreReader(out).digest == StoreReader(tmp_path / "whole").digest


def test_a_rollout_on_a_full_disk(
    tokens: Path, model: Path, small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"rollout --tokens {tokens} --model {model} --samples 2 --stop-ids 3 --set grade_ids=true"
    codes = []
    for kib in (4, 16, 32, 2048):
        disk = small_disk(kib)
        options = ["model.check_tokenizer=false", "--output", str(disk / "out")]
        codes.append(told([*words.split(), *options], disk, capsys))
    assert codes[0] == ERROR and codes[-1] == DONE
    for name in ("answers", "scores", "tokens"):
        assert StoreReader(disk / "out" / name).num_rows


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_that_cannot_begin_for_want_of_room(made: dict[str, str], small_disk: SmallDisk, tmp_path: Path) -> None:
    """In a process of its own: a run forms a process group, and says so in the environment."""
    import yaml

    disk = small_disk(8)
    stores = {name: Path(path) for name, path in made.items()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.config_tree(stores, disk / "run")))
    command = [sys.executable, "-m", "potstill.launch", "train", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == ERROR and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert str(disk) in last and "make room" in last and "defect" not in last, last


def test_standard_output_that_takes_no_more() -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "potstill.launch", "presets"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == ERROR
    assert done.stderr.count("\n") == 1 and "No space left on device; make room where" in done.stderr
    assert "standard output" in done.stderr


def test_what_a_full_disk_is(small_disk: SmallDisk, tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert is_no_room(OSError(number, "any words")) and is_no_room(RuntimeError(os.strerror(number)))
    assert is_no_room(RuntimeError("I/O error (os error 28)")) and not is_no_room(RuntimeError("(os error 2)"))
    assert not is_no_room(OSError(errno.EACCES, "Permission denied")) and not is_no_room(ValueError("no space"))
    page = small_disk(8) / "page"
    write_whole(page, "before")
    with pytest.raises(NoRoomError, match=rf"writing {page} failed: .* bytes are free at {page.parent}\); make room"):
        write_whole(page, "x" * (1 << 15))
    assert page.read_text() == "before" and list(page.parent.iterdir()) == [page]
    (tmp_path / "link").symlink_to(page)
    write_whole(tmp_path / "link", "after")
    assert page.read_text() == "after" and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "through")
    assert os.read(reader, 99) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
