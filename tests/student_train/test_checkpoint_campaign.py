"""The campaigns around a run's folder: damaged checkpoints, and two runs at once. Counts, and one line of JSON each."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from potstill.common.exit_codes import DONE, ERROR
from potstill.student_train.hf_export.weights import find_source
from potstill.student_train.run.checkpoint import checkpoint_folder, checkpoints_folder, list_checkpoints
from potstill.student_train.run.checkpoint_files import DamagedError
from potstill.student_train.run.metrics import read_metrics
from tests.campaign import tell
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import steps_of, tree_of

LAST, EARLIER = 8, 4
TRIED = {"flip": 250, "zeroed page": 25, "swap": 10, "truncation": 15}  # of each number of ranks
PAIRS = 20
AT_ONCE = 25  # runs that one set of processes continues, one after the other
pytestmark = pytest.mark.slow


def options() -> dict[str, Any]:
    """Two checkpoints, and steps behind the last one: what was loaded shows in their losses."""
    return {"run": {"max_steps": 10}, "checkpoint": {"every_steps": 4, "keep_last": 9}}


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def zero_page(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content)) // 4096 * 4096
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    path.write_bytes(content)


def swap(path: Path, chance: random.Random) -> None:
    """A file of the same name of another step, or of another rank or kind of the same."""
    others = [path.parent.with_name(f"step_{EARLIER:08d}") / path.name]
    others += [other for other in path.parent.iterdir() if other != path and other.suffix == path.suffix]
    shutil.copyfile(chance.choice(others), path)


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(os.path.getsize(path)))


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": flip, "zeroed page": zero_page, "swap": swap, "truncation": truncate
}  # fmt: skip


def damaged_runs(whole: Path, place: Path) -> Iterator[tuple[str, str, Path]]:
    """Kind, file and folder of each damaged copy of a run."""
    chance = random.Random(16)
    for kind, count in TRIED.items():
        for number in range(count):
            run = place / f"{kind}-{number}".replace(" ", "-")
            shutil.copytree(whole, run)
            folder = checkpoint_folder(run, LAST)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            path = chance.choice(files)
            before = path.read_bytes()
            while path.read_bytes() == before:  # a page may hold zeros already
                DAMAGES[kind](path, chance)
            yield kind, path.name, run


def judge(run: Path, ending: str, expected: Any, door_is_shut: bool) -> str:
    """One word for what became of a damaged checkpoint."""
    aside = checkpoints_folder(run).joinpath(f"damaged_step_{LAST:08d}").exists()
    if ending != "done":
        return "crashed"
    if steps_of(run) != expected:
        return "silent"
    return "detected" if aside and door_is_shut else "harmless"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", [1, 2])
def test_no_damage_of_a_checkpoint_is_silent(stores, tmp_path: Path, world: int) -> None:
    whole = tmp_path / "whole"
    run_ranks(workers.train_run, tree_of(stores, whole, **options()), world=world)
    shutil.rmtree(checkpoint_folder(whole, 10))
    expected = steps_of(whole)
    assert [checkpoint.step for checkpoint in list_checkpoints(whole)] == [EARLIER, LAST]
    found: Counter[str] = Counter()
    batch: list[tuple[str, str, Path, bool]] = []
    bad = []
    for kind, name, run in [*damaged_runs(whole, tmp_path / "runs"), ("", "", tmp_path)]:
        if kind:
            try:
                find_source(run)
                shut = False
            except DamagedError:
                shut = True
            batch.append((kind, name, run, shut))
        if batch and (len(batch) == AT_ONCE or not kind):
            trees = [tree_of(stores, run, **options()) for _, _, run, _ in batch]
            endings = run_ranks(workers.train_all_runs, *trees, world=world, timeout_seconds=600)
            for (kind_, name_, run_, shut_), ending in zip(batch, endings[0], strict=True):
                word = judge(run_, ending, expected, shut_)
                found[word] += 1
                if word in ("silent", "crashed"):
                    bad.append((kind_, name_, word, ending))
                shutil.rmtree(run_)
            batch.clear()
    line = tell("damaged checkpoints", {"tried": sum(TRIED.values()), **found}, ranks=world, by_kind=TRIED)
    assert not bad, bad
    assert line["detected"] + line["harmless"] == line["tried"] and line["harmless"] < 0.05 * line["tried"]


@pytest.mark.timeout(1800)
def test_two_runs_in_one_folder_never_both_end_well(stores, tmp_path: Path) -> None:
    """Twenty pairs of commands with two seeds, started up to two seconds apart."""
    chance, found, bad = random.Random(2), Counter[str](), []
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    for number in range(PAIRS):
        folder, run = tmp_path / str(number), tmp_path / str(number) / "run"
        folder.mkdir()
        pair = []
        for seed in (3, 4):
            config = folder / f"{seed}.yaml"
            changes = {"run": {"max_steps": 400, "seed": seed}, "checkpoint": {"every_steps": 10}}
            config.write_text(yaml.safe_dump(tiny.config_tree(stores, run, **changes)))
            command = [sys.executable, "-m", "potstill.student_train", "--config", str(config)]
            with open(folder / f"{seed}.err", "wb") as errors:
                pair.append(subprocess.Popen(command, stdout=errors, stderr=errors, env=environment))
            time.sleep(chance.uniform(0, 2) if seed == 3 else 0)
        try:
            codes = [process.wait(timeout=120) for process in pair]
        except subprocess.TimeoutExpired:
            found["hung"] += 1
            for process in pair:
                process.send_signal(signal.SIGKILL)
                process.wait()
            continue
        texts = [(folder / f"{seed}.err").read_text() for seed in (3, 4)]
        # A start behind the end of the other is a resume with another seed, which is refused for that.
        refused = sum("another run writes to" in text or "belongs to another run" in text for text in texts)
        word = "detected" if sorted(codes) == [DONE, ERROR] and refused == 1 else "silent"
        steps = [record["step"] for record in read_metrics(run) if record["kind"] == "train"]
        if word != "detected" or steps != sorted(set(steps)) or any("Traceback" in text for text in texts):
            bad.append((number, codes, texts))
        found[word] += 1
    line = tell("two runs in one folder", {"tried": PAIRS, **found})
    assert not bad, bad
    assert line["detected"] == PAIRS
