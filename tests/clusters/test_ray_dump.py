"""`potstill dump --ray` on real clusters of this machine: actors that die in the middle leave the calm store."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from potstill.storage import StoreReader, store_status, verify_store
from tests.clusters.ray_cluster import POTSTILL, actors, end_of, ray_folder, several_nodes, started, until
from tests.teacher_dump.tiny import make_tokens, save_llama

pytest.importorskip("ray")
UNITS = 240
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


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Rows and a teacher for the campaigns, and the digest of the calm store."""
    place = a_place(tmp_path_factory.mktemp("ground"), units=UNITS, rows_per_unit=1)
    return place, calm_digest(place)


def copy_of(ground: tuple[Path, str], folder: Path) -> tuple[Path, str]:
    """A folder of a test's own with the rows and the teacher."""
    shutil.copytree(ground[0] / "data/train", folder / "data/train")
    shutil.copytree(ground[0] / "models", folder / "models")
    return folder, ground[1]


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


POISON = '''
import os

import torch
from transformers import LlamaForCausalLM


class Poisoned(LlamaForCausalLM):
    """Ends its process, as one that runs out of memory is ended, when a row holds a certain token."""

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, words, named):
        ids = named.get("input_ids", words[0] if words else None)
        if ids is not None and bool((ids == TOKEN).any()) and ids.shape[-1] > 32:
            os.kill(os.getpid(), 9)
'''


def poison(place: Path, unit: int) -> None:
    """Make the teacher die of the rows of one unit, by a token that no other unit holds."""
    reader = StoreReader(place / "data/train")
    rows = [row.tokens for row in reader.tokens_rows(range(reader.num_rows))]
    size = reader.spec.rows_per_unit
    own = set().union(*(set(map(int, row)) for row in rows[unit * size : (unit + 1) * size]))
    others = set().union(*(set(map(int, row)) for at, row in enumerate(rows) if at // size != unit))
    token = min(own - others)
    (place / "models/teacher/poisoned.py").write_text(POISON.replace("TOKEN", str(token)))
    config = json.loads((place / "models/teacher/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "poisoned.Poisoned"}
    (place / "models/teacher/config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_unit_that_kills_every_actor_is_named_when_the_others_are_done(tmp_path: Path) -> None:
    rows = [(64,)] * 12
    (tmp_path / "data").mkdir()
    make_tokens(tmp_path / "data/train", rows, rows_per_unit=1, row_length=64, vocab_size=4096)
    save_llama(tmp_path / "models/teacher", vocab_size=4096, max_position_embeddings=64)
    poison(tmp_path, 3)
    command = dump_command(
        "data/targets", "--ray", "local", "--ray-actors", "2", "--set", "teacher.load_options.trust_remote_code=true"
    )
    with ray_folder() as environment, started(command, environment, tmp_path) as driver:
        code, text = end_of(driver, tmp_path, seconds=600)
    assert code == 1, text[-3000:]
    assert store_status(tmp_path / "data/targets").committed == 11
    last = text.strip().splitlines()[-1]
    assert "1 units failed and 11 were committed: unit 3" in last and "died of it" in last, text[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_a_driver_that_is_stopped_says_75_and_the_same_command_continues(
    ground: tuple[Path, str], tmp_path: Path, number: signal.Signals
) -> None:
    place, digest = copy_of(ground, tmp_path)
    command = dump_command("data/targets", "--ray", "local", "--ray-actors", "2")
    with ray_folder() as environment:
        with started(command, environment, place) as driver:
            until(lambda: committed(place) >= 3, driver)
            os.killpg(driver.pid, number)
            began = time.monotonic()
            code, text = end_of(driver, place)
        assert code == 75 and time.monotonic() - began < 40, text
        assert f"stopped by {number.name}" in text and "the same command again" in text
        assert 3 <= committed(place) < UNITS
        with started(command, environment, place) as driver:
            code, text = end_of(driver, place, seconds=300)
    assert code == 0, text
    assert StoreReader(place / "data/targets").digest == digest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_actor_that_is_stopped_is_replaced_and_the_job_does_not_end(
    ground: tuple[Path, str], tmp_path: Path
) -> None:
    place, digest = copy_of(ground, tmp_path)
    command = dump_command("data/targets", "--ray", "local", "--ray-actors", "1")
    with ray_folder() as environment, started(command, environment, place) as driver:
        until(lambda: committed(place) >= 2, driver)
        os.kill(actors(environment, "TeacherActor.run")[0], signal.SIGTERM)
        code, text = end_of(driver, place, seconds=300)
    assert code == 0, text
    assert "stopped by SIGTERM" in text
    assert StoreReader(place / "data/targets").digest == digest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_unit_of_an_actor_that_stands_still_is_taken_by_another(ground: tuple[Path, str], tmp_path: Path) -> None:
    place, digest = copy_of(ground, tmp_path)
    command = dump_command("data/targets", "--ray", "local", "--ray-actors", "2")
    with ray_folder() as environment, started(command, environment, place) as driver:
        until(lambda: len(actors(environment, "TeacherActor.run")) == 2 and committed(place) >= 2, driver)
        os.kill(actors(environment, "TeacherActor.run")[0], signal.SIGSTOP)
        before = committed(place)
        code, text = end_of(driver, place, seconds=300)
    assert code == 0 and before < UNITS, text
    assert StoreReader(place / "data/targets").digest == digest


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_random_kills_of_actors_and_drivers_leave_the_calm_store(ground: tuple[Path, str], tmp_path: Path) -> None:
    place, digest = copy_of(ground, tmp_path)
    rng, kills = random.Random(5), 0
    command = dump_command("data/targets", "--ray", "local", "--ray-actors", "2")
    for _ in range(3):
        with ray_folder() as environment, started(command, environment, place) as driver:
            for _ in range(4):
                seen = committed(place)
                until(lambda seen=seen: committed(place) > seen or driver.poll() is not None, driver)
                time.sleep(rng.uniform(0.0, 0.4))
                if found := actors(environment):
                    os.kill(rng.choice(found), signal.SIGKILL)
                    kills += 1
            driver.kill()
    assert kills >= 6 and committed(place) < UNITS
    with ray_folder() as environment, started(command, environment, place) as driver:
        code, text = end_of(driver, place, seconds=400)
    assert code == 0, text
    assert StoreReader(place / "data/targets").digest == digest
    assert verify_store(place / "data/targets", deep=True).ok


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_that_come_and_go(ground: tuple[Path, str], tmp_path: Path) -> None:
    place, digest = copy_of(ground, tmp_path)
    with ray_folder() as environment, several_nodes(environment, tmp_path) as (address, tell):
        tell("add 1")
        command = dump_command("data/targets", "--ray", address, "--ray-actors", "1:2")
        with started(command, environment, place) as driver:
            until(lambda: actors(environment), driver)  # on the one node; a second one waits in the cluster
            assert len(actors(environment)) == 1
            tell("add 2")
            until(lambda: len(actors(environment)) == 2 and committed(place) >= 2, driver)
            tell("remove 1")
            code, text = end_of(driver, place, seconds=300)
    assert code == 0, text
    assert "is lost" in text
    assert StoreReader(place / "data/targets").digest == digest
