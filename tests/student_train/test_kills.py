"""SIGKILL at random moments, most of them inside a save: what is resumed is bit for bit the run that never died."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.student_train.run.checkpoint import MANIFEST, checkpoints_folder, list_checkpoints
from potstill.student_train.run.metrics import read_metrics
from tests.campaign import tell
from tests.dist_harness import Ranks, run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import kill_after, steps_of

NUM_KILLS = 24
STEPS = 600  # more than a quick machine does between the kills
KEEP_LAST = 2


def tree_of(stores: dict[str, Path], output: Path, *, stage: int, max_steps: int = STEPS) -> dict[str, Any]:
    """A run that saves at every step, so that a random moment most often lies inside a save."""
    rows = {"score": {"of": [{"store": "slm"}]}, "share": {"kind": "linear", "start": 0.5, "end": 1}}
    return tiny.config_tree(
        stores,
        output,
        curriculum=[{"until": 0.5, "targets": "teacher", "rows": rows}, {"targets": "teacher"}],
        run={"max_steps": max_steps},
        checkpoint={"every_steps": 1, "keep_last": KEEP_LAST},
        eval={"every_steps": 30},
        spike_policy="warn",
        zero_stage=stage,
    )


def folders(run: Path) -> list[Path]:
    return sorted(checkpoints_folder(run).glob("step_*"))


def unfinished(run: Path) -> list[Path]:
    """Folders of a save or a deletion that is under way, or was cut short."""
    return [folder for folder in folders(run) if not (folder / MANIFEST).exists()]


def newest(run: Path) -> int:
    return max((int(folder.name[5:]) for folder in folders(run)), default=0)


def wait_until(reached: Callable[[], bool], ranks: Ranks) -> None:
    end = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < end, "the run did not come as far"
        assert all(process.is_alive() for process in ranks.processes), "a rank ended before it was killed"
        time.sleep(0.001)


def wait_for(moment: str, run: Path, ranks: Ranks, rng: random.Random) -> None:
    """Let the ranks come to the moment of their death."""
    if moment == "start":  # building, loading the checkpoint, the first writes
        time.sleep(rng.uniform(0.0, 3.0))
        return
    first, ahead = newest(run), rng.randint(1, 4)
    wait_until(lambda: newest(run) >= first + ahead, ranks)
    if moment == "save":
        wait_until(lambda: bool(unfinished(run)), ranks)
        time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.05)]))
    elif moment == "deletion":
        wait_until(lambda: len(folders(run)) - len(unfinished(run)) > KEEP_LAST, ranks)
        time.sleep(rng.uniform(0.0, 0.005))
    else:
        time.sleep(rng.uniform(0.0, 0.5))


def eval_lines(run: Path) -> list[dict[str, Any]]:
    """Held-out figures and where they stand, without the time that it took to come there."""
    lines = [record for record in read_metrics(run) if record["kind"] == "eval"]
    return [{name: value for name, value in record.items() if name != "runtime_seconds"} for record in lines]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 1)])
def test_random_kills_leave_no_trace(stores, tmp_path: Path, world: int, stage: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_ranks(workers.train_run, tree_of(stores, whole, stage=stage), world=world, timeout_seconds=400)
    expected = steps_of(whole)
    assert len(expected[0]) == STEPS

    rng, tree = random.Random(world), tree_of(stores, killed, stage=stage)
    torn = resumed = 0
    moments = ["start", "anywhere", "save", "deletion"] * (NUM_KILLS // 4)
    rng.shuffle(moments)
    for moment in moments:
        with Ranks(workers.train_run, world=world, args=(tree,)) as ranks:
            wait_for(moment, killed, ranks, rng)
            if rng.random() < 0.5:  # one rank dies a little before the others
                rng.choice(ranks.processes).kill()
                time.sleep(rng.uniform(0.0, 0.1))
            ranks.kill()
        torn += bool(unfinished(killed))
        resumed += bool(list_checkpoints(killed))
        assert newest(killed) < STEPS, "the run was over before it was killed"
    # Otherwise the kills would have missed what this test is for.
    assert torn >= 3 and resumed >= NUM_KILLS // 2, (torn, resumed)

    result = run_ranks(workers.train_run, tree, world=world, timeout_seconds=400)[0]
    assert (result["status"], result["steps"]) == ("done", STEPS)
    assert steps_of(killed) == expected
    assert eval_lines(killed) == eval_lines(whole)
    names = [folder.name for folder in folders(killed)]
    assert names == [folder.name for folder in folders(whole)] == [f"step_{STEPS - 1:08d}", f"step_{STEPS:08d}"]
    assert {path.name for path in killed.iterdir()} - {path.name for path in whole.iterdir()} <= {
        "metrics.discarded.jsonl"
    }
    tell("SIGKILLs of a run", {"tried": len(moments), "harmless": len(moments)}, ranks=world, zero_stage=stage)


def converters(run: Path) -> list[str]:
    """Command lines of living converters that read this run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has just ended
        if "to_universal" in words and str(run) in words:
            found.append(words)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", [1, 3])
def test_kills_during_the_conversion_to_another_number_of_ranks(stores, tmp_path: Path, stage: int) -> None:
    run, calm = tmp_path / "run", tmp_path / "calm"
    tree = tree_of(stores, run, stage=stage, max_steps=24)
    kill_after(tree, run, step=5, world=2)
    shutil.copytree(run, calm)
    rng = random.Random(stage)
    universal = checkpoints_folder(run) / "universal"
    for number in range(6):
        with Ranks(workers.train_run, world=1, args=(tree,)) as ranks:
            before = set(universal.glob(".*"))
            wait_until(lambda before=before: bool(set(universal.glob(".*")) - before), ranks)
            time.sleep(rng.uniform(0.0, 4.0) if number else 0.0)
            ranks.kill()
        end = time.monotonic() + 10
        while converters(run):
            assert time.monotonic() < end, "a converter outlived the run that started it"
            time.sleep(0.05)
        if newest(run) > newest(calm):  # the conversion was over and training went on: it is a one-rank run now
            break
    run_ranks(workers.train_run, tree, world=1)
    run_ranks(workers.train_run, {**tree, "run": {**tree["run"], "output_dir": str(calm)}}, world=1)
    assert steps_of(run) == steps_of(calm)
    assert not universal.exists()
