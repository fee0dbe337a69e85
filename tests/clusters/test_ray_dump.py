"""`potstill dump --ray` on real clusters of this machine: actors that die in the middle leave the calm store."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from potstill.storage import StoreReader
from tests.clusters.ray_cluster import POTSTILL, actors, end_of, ray_folder, started, until
from tests.teacher_dump.tiny import make_tokens, save_llama

pytest.importorskip("ray")
SETTINGS = ["--set", "teacher.check_tokenizer=false", "teacher.batch_rows=1", "--mode", "top_k", "--k", "8"]


def dump_command(output: str = "data/targets", *more: str) -> list[str]:
    return [
        *POTSTILL,
        *("dump", "--tokens", "data/train", "--teacher", "models/teacher", "--output", output),
        *SETTINGS,
        *more,
    ]


def a_place(folder: Path, *, units: int, rows_per_unit: int = 2, hidden_size: int = 128) -> Path:
    """Rows and a teacher that needs some milliseconds for each of them."""
    rows = [(64,), (50, 14), (25, 1, 38)] * (-(-units * rows_per_unit // 3))
    (folder / "data").mkdir()
    make_tokens(folder / "data/train", rows[: units * rows_per_unit], rows_per_unit=rows_per_unit, row_length=64)
    save_llama(folder / "models/teacher", hidden_size=hidden_size, intermediate_size=256, num_hidden_layers=4)
    return folder


def calm_digest(place: Path) -> str:
    """The digest of the store that one worker leaves whom nobody disturbs."""
    from potstill.teacher_dump import DumpConfig, dump

    teacher = {"model": place / "models/teacher", "batch_rows": 1, "check_tokenizer": False}
    selection = {"mode": "top_k", "k": 8}
    dump(DumpConfig(tokens=place / "data/train", output=place / "calm", teacher=teacher, selection=selection))
    return StoreReader(place / "calm").digest


def committed(place: Path) -> int:
    folder = place / "data/targets/units"
    return len(list(folder.glob("u*.json"))) if folder.is_dir() else 0


def test_a_killed_actor_leaves_no_trace(tmp_path: Path) -> None:
    place = a_place(tmp_path, units=40)
    digest = calm_digest(place)
    with (
        ray_folder() as environment,
        started(dump_command("data/targets", "--ray", "local", "--ray-actors", "1"), environment, place) as driver,
    ):
        until(lambda: committed(place) >= 2, driver)
        os.kill(actors(environment, "TeacherActor.run")[0], signal.SIGKILL)
        before = committed(place)
        code, text = end_of(driver, place)
    assert code == 0, text
    assert before < 40 and "is lost" in text, text
    assert StoreReader(place / "data/targets").digest == digest, text
