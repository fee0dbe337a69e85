"""A dump between slow disks, and one whose disk is full in the middle: real files, real code, nothing lost."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.storage import StoreReader, WriteFailedError, store_status, verify_store
from potstill.storage.files.paths import LocalFolder
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.engines.hf import HfEngine
from potstill.teacher_dump.pipeline import _UNITS_AHEAD, _UNITS_UNFINISHED
from tests.teacher_dump.tiny import make_tokens

NUM_UNITS = 8
DELAY_SECONDS = 0.1
UNIT_FILE = re.compile(r"units/u(\d+)-.*\.arrow")
RECORD_FILE = re.compile(r"units/u(\d+)\.json")


def config(tokens: Path, output: Path, model: Path) -> DumpConfig:
    teacher = {"model": model, "check_tokenizer": False, "batch_rows": 2}
    return DumpConfig(tokens=tokens, output=output, teacher=teacher, selection={"k": 8})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("rows") / "store", [(16,), (7, 9)] * NUM_UNITS)


@pytest.fixture(scope="module")
def whole(rows: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump of the rows, undisturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    dump(config(rows, output, llama))
    return output


class SlowDisk:
    """Delays every operation on a folder of files, and notes units that are read, go through the model, are safe."""

    def __init__(self, tokens: Path) -> None:
        self._tokens = str(tokens)
        self._lock = threading.Lock()
        self.events: list[tuple[str, int]] = []
        self.model_is_at = [threading.Event() for _ in range(NUM_UNITS)]
        self.waited_in_vain: list[str] = []

    def note(self, what: str, unit: int) -> None:
        with self._lock:
            self.events.append((what, unit))

    def forward(self, unit: int) -> None:
        self.note("model", unit)
        self.model_is_at[unit].set()

    def delayed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def slow(folder: LocalFolder, name: str, *args: Any, **options: Any) -> Any:
            time.sleep(DELAY_SECONDS)
            unit = UNIT_FILE.fullmatch(name)
            if unit and folder.url == self._tokens and method.__name__ == "read_range":
                self.note("read", int(unit[1]))
            if unit and method.__name__ == "put" and int(unit[1]) == 0 and not self.model_is_at[1].wait(60):
                # This write may end only when the model has begun the next unit, which it must do meanwhile.
                self.waited_in_vain.append(name)
            result = method(folder, name, *args, **options)
            record = RECORD_FILE.fullmatch(name)
            if record and method.__name__ == "create":
                self.note("safe", int(record[1]))
            return result

        return slow


@pytest.mark.slow
def test_a_slow_disk_changes_nothing_and_holds_up_nothing_but_itself(
    rows: Path, whole: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(rows)
    forward = HfEngine.forward

    def noted_forward(self: HfEngine, batch: Any) -> Any:
        disk.forward(batch.rows[0].row // 2)
        return forward(self, batch)

    monkeypatch.setattr(HfEngine, "forward", noted_forward)
    for name in ("read", "read_range", "size", "names", "put", "create"):
        monkeypatch.setattr(LocalFolder, name, disk.delayed(getattr(LocalFolder, name)))
    dump(config(rows, tmp_path / "out", llama))
    monkeypatch.undo()

    assert not disk.waited_in_vain, "the model waited for a unit to be written before it began the next"
    assert StoreReader(tmp_path / "out").digest == StoreReader(whole).digest
    first = {event: place for place, event in reversed(list(enumerate(disk.events)))}
    assert {what for what, _ in first} == {"read", "model", "safe"}
    assert len(first) == 3 * NUM_UNITS
    for unit in range(NUM_UNITS):
        before = disk.events[: first["model", unit]]
        read = max(u for what, u in before if what == "read")
        safe = len({u for what, u in before if what == "safe"})
        # Bounds of the queues: units laid out ahead of the model (and one being read), units behind it.
        assert unit <= read <= unit + _UNITS_AHEAD + 1
        assert unit - safe <= _UNITS_UNFINISHED


def test_a_disk_full_in_the_middle(rows: Path, whole: Path, llama: Path, small_disk: Callable[[int], Path]) -> None:
    out = small_disk(44) / "out"
    with pytest.raises(WriteFailedError) as caught:
        dump(config(rows, out, llama))
    text = str(caught.value)
    assert str(out) in text and "ENOSPC" in text and "free space" in text and "run again" in text
    status = store_status(out)
    assert 0 < status.committed < NUM_UNITS and not status.sealed
    committed = {file: file.read_bytes() for file in (out / "units").iterdir()}
    assert len(committed) >= 2 * status.committed and verify_store(out, deep=True).num_units == status.committed
    small_disk(1024)
    assert dump(config(rows, out, llama)).sealed  # type: ignore[union-attr]
    assert StoreReader(out).digest == StoreReader(whole).digest
    assert verify_store(out, deep=True).ok
    assert all(file.read_bytes() == data for file, data in committed.items())
