"""`potstill dump` with engine vllm as a command: killed and continued, on two ranks, beside units of engine hf."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import MismatchError, StoreReader, StoreWriter, read_spec, store_status
from potstill.teacher_dump import DumpConfig, dump, identity
from potstill.teacher_dump.row_distance import row_distance
from tests.teacher_dump.odd_models import change_weights
from tests.vllm.conftest import RealText

pytest.importorskip("vllm", reason="no vLLM here: `make test-vllm` installs it into an environment of its own")

ROOT = Path(__file__).parents[2]


def settings(text: RealText, output: Path, **teacher: Any) -> DumpConfig:
    chosen = {"model": text.teacher, "engine": "vllm", "dtype": "float32", "batch_rows": 2} | teacher
    return DumpConfig(
        tokens=text.plain,
        output=output,
        teacher=chosen,
        selection={"mode": "top_k", "k": 64},
        temperatures=[2.0],
    )


def start_dump(text: RealText, output: Path, log: Path, *, ranks: int = 1) -> subprocess.Popen[bytes]:
    """The command in a session of its own, so that whatever it starts can be ended with it."""
    values = [f"teacher.tensor_parallel={ranks}", "teacher.engine=vllm", "teacher.dtype=float32", "temperatures=[2.0]"]
    command = [sys.executable, "-m", "potstill.launch", "dump", "--tokens", text.plain, "--output", output]
    command += ["--teacher", text.teacher, "--mode", "top_k", "--k", "64", "--set", *values, "teacher.batch_rows=2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    if ranks > 1:
        # vLLM then starts an engine and two workers, each on a core of its own.
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with log.open("wb") as stream:
        return subprocess.Popen(
            [str(word) for word in command], env=env, stdout=stream, stderr=stream, start_new_session=True
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        code = process.wait(timeout=240)
    finally:
        end(process)
    assert code == 0, log.read_text()[-4000:]


def end(process: subprocess.Popen[bytes]) -> None:
    with_it = process.pid  # it leads its session, so this is the group as well
    try:
        os.killpg(with_it, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def calm(real_text: RealText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a command that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    finish(start_dump(real_text, folder / "store", folder / "log"), folder / "log")
    return folder / "store"


@pytest.fixture(scope="module")
def by_hf(real_text: RealText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("hf") / "store"
    dump(settings(real_text, output, engine="hf"))
    return output


def committed(store: Path) -> int:
    return store_status(store).committed if (store / "run.json").exists() else 0


def test_a_dump_that_is_killed_and_continued_is_the_undisturbed_one(
    real_text: RealText, calm: Path, tmp_path: Path
) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    process = start_dump(real_text, store, log)
    try:
        deadline = time.monotonic() + 240
        while committed(store) < 2:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.01)
        process.kill()
        process.wait(timeout=30)
    finally:
        end(process)
    assert 2 <= committed(store) < len(StoreReader(calm).row_stats["num_targets"]) // 4
    finish(start_dump(real_text, store, log), log)
    assert StoreReader(store).digest == StoreReader(calm).digest


def assert_same_targets(one: Path, other: Path) -> None:
    """Two stores of float32: the same ids at 99.9 % of the positions, figures apart by a step of the grid at most."""
    same = positions = 0
    apart = 0.0
    stores = [StoreReader(path) for path in (one, other)]
    for a, b in zip(*(store.rows(range(store.num_rows)) for store in stores), strict=True):
        apart += row_distance(a, b)[0]
        x, y = a.targets, b.targets  # type: ignore[union-attr]
        assert np.array_equal(x.offsets, y.offsets)
        for start, stop in zip(x.offsets[:-1], x.offsets[1:], strict=True):
            if stop > start:
                positions += 1
                same += set(x.ids[start:stop].tolist()) == set(y.ids[start:stop].tolist())
        np.testing.assert_allclose(x.columns["log_tail_at"][2.0], y.columns["log_tail_at"][2.0], atol=1 / 16 + 1e-4)
    assert positions > 5000 and same >= 0.999 * positions
    assert apart / positions <= 2e-4  # the steps of the grid that last bits move
    stats = [store.row_stats["mean_loss"] for store in stores]
    np.testing.assert_allclose(stats[0], stats[1], atol=1e-4)


def test_the_store_is_that_of_hf(calm: Path, by_hf: Path) -> None:
    assert_same_targets(calm, by_hf)


def test_two_ranks_give_what_one_gives(real_text: RealText, calm: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    finish(start_dump(real_text, store, log, ranks=2), log)
    assert_same_targets(store, calm)
    assert (read_spec(store).teacher or {})["tensor_parallel"] == 2


def test_a_store_begun_by_hf_is_finished_by_vllm(real_text: RealText, by_hf: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    dump(settings(real_text, output, engine="hf"), worker=0, num_workers=2)
    summary: Any = dump(settings(real_text, output))
    assert summary.sealed
    writer = StoreWriter.create(output, read_spec(output))
    extras = [record.extra for unit in range(writer.num_units or 0) if (record := writer.record(unit)) is not None]
    assert [extra.get("engine") for extra in extras] == ["vllm" if unit % 2 else None for unit in range(len(extras))]
    parity = extras[1]["parity"]
    assert parity["total_variation"] <= parity["bound"] and parity["rows"] > 0
    assert_same_targets(output, by_hf)


def test_a_teacher_with_one_changed_tensor_adds_nothing(
    real_text: RealText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the digest of its weights, and, where that would say nothing, by what it gives."""
    output = tmp_path / "store"
    dump(settings(real_text, output, engine="hf"), worker=0, num_workers=2)
    changed = tmp_path / real_text.teacher.name
    shutil.copytree(real_text.teacher, changed)
    change_weights(changed, lambda weights: weights["model.layers.3.mlp.down_proj.weight"].mul_(1.1))
    with pytest.raises(MismatchError, match="weights"):
        dump(settings(real_text, output, model=changed))
    digest = identity.folder_weights_digest(real_text.teacher)
    monkeypatch.setattr(identity, "folder_weights_digest", lambda folder: digest)
    with pytest.raises(UserError, match="vllm does not agree with it on this machine: mean total variation"):
        dump(settings(real_text, output, model=changed))
