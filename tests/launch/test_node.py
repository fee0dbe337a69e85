"""The ranks of a node start again where another node's end stopped them; what ends the container says why."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from potstill.common.errors import ConfigError
from potstill.launch import next_turn, node
from potstill.launch.next_turn import NoProgressError
from potstill.launch.ranks import Node
from tests.student_train.tiny import STUDENT

# Ends by what the file `ends` says, a code for each turn, and leaves what a run leaves.
PROBE = """
import os, pathlib, signal, sys, time
run = pathlib.Path("run")
turn = len(list(pathlib.Path().glob(f"turn*-{os.environ['LOCAL_RANK']}")))
pathlib.Path(f"turn{turn}-{os.environ['LOCAL_RANK']}").write_text(
    " ".join(os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
)
what = pathlib.Path("ends").read_text().split()[turn]
if what == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    pathlib.Path(f"waits-{os.environ['LOCAL_RANK']}").touch()
    time.sleep(60)
if what == "saves":
    saved = run / "checkpoints" / f"step_{turn + 1:08d}"
    saved.mkdir(parents=True, exist_ok=True)
    (saved / "potstill.json").touch()
if what == "stopped":
    (run / "stop").touch()
if what == "done":  # by the other node; this one is cut off before its good end
    (run / "done.json").write_text("{}")
sys.exit({"saves": 75, "stopped": 75, "done": 1}.get(what) or int(what))
"""


@pytest.fixture
def run_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Runs node 1 of 2 with two ranks of PROBE, whose turns end as the words say; returns the exit code."""
    (tmp_path / "probe_rank.py").write_text(PROBE)
    (tmp_path / "run").mkdir()
    config = {
        "run": {"output_dir": "run", "max_steps": 9},
        "model": {"config": STUDENT},
        "data": {"tokens": "data/train", "global_batch_rows": 4},
        "curriculum": [{}],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(node, "RANK_MODULE", "probe_rank")
    monkeypatch.setattr(node, "PAUSE_SECONDS", 0.01)

    def run(ends: str) -> int:
        (tmp_path / "ends").write_text(ends)
        place = Node(1, 2, "pod-0.run", 29500)
        return node.run_node(["--config", "run.yaml"], node=place, num_ranks=2, turns=tmp_path / "turns.json")

    return run


def num_turns() -> int:
    return len(list(Path().glob("turn[0-9]*-0")))


def test_ranks_are_started_again_until_the_run_is_done(run_node: Callable[[str], int]) -> None:
    assert run_node("saves 1 saves 0") == 0  # another node evicted, one lost, one evicted
    assert num_turns() == 4
    assert [Path(f"turn3-{rank}").read_text() for rank in range(2)] == [f"{rank} 4 pod-0.run 29500" for rank in (2, 3)]


def test_a_run_that_is_done_is_done_also_for_a_node_that_was_cut_off(run_node: Callable[[str], int]) -> None:
    Path("run/done.json").write_text("of an earlier end")
    assert run_node("1 done") == 0 and num_turns() == 2


def test_a_stop_by_a_person_is_the_last_turn(run_node: Callable[[str], int]) -> None:
    assert run_node("saves stopped 0") == 75 and num_turns() == 2


def test_turns_that_move_nothing_end_with_what_to_do(
    run_node: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "MAX_IDLE_TURNS", 2)
    with pytest.raises(NoProgressError, match=r"newest checkpoint at step 2; 2 turns in a row moved nothing.*say why"):
        run_node("1 saves 1 1 0")
    assert num_turns() == 4


def test_a_wrong_command_line_is_not_tried_again(run_node: Callable[[str], int]) -> None:
    assert run_node("2 0") == 2 and num_turns() == 1


def test_a_node_that_is_told_to_go_goes_when_its_ranks_have_saved(run_node: Callable[[str], int]) -> None:
    def send() -> None:
        deadline = time.monotonic() + 30
        while len(list(Path().glob("waits-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    code = run_node("waits 0")
    sender.join()
    assert code == 143 and num_turns() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NODES": ""}, "NODES is not set"),
        ({"NODES": "two"}, "NODES: expected a whole number, found 'two'"),
        ({"JOB_COMPLETION_INDEX": "2"}, r"node 2 of NODES=2: expected 0 to 1; completions must be NODES"),
    ],
)
def test_a_place_that_is_wrong_is_named(change: dict[str, str], message: str) -> None:
    place = {"NODES": "2", "JOB_COMPLETION_INDEX": "1", "RANKS_PER_NODE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert node.node_from(place) == (Node(1, 2, "a", 1), 8)
    assert node.node_from({**place, "NODE_RANK": "0"})[0].rank == 0
    with pytest.raises(ConfigError, match=message):
        node.node_from({**place, **change})


def test_the_count_of_idle_turns_lives_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns, store = str(tmp_path / "a.turns"), str(tmp_path / "no store yet")
    words = ["dump", "--turns", turns, "--max-idle-turns", "2", "--store", store]
    assert next_turn.main(words) == 0
    assert "0 units committed; another turn" in capsys.readouterr().err
    assert next_turn.main(words) == 1
    assert "2 turns in a row moved nothing, so none is added: is the time limit" in capsys.readouterr().err
    standing = next_turn.Standing(5, "", "")
    assert next_turn.judge(standing, tmp_path / "a.turns", max_idle_turns=2) == 0  # progress begins anew
    assert next_turn.judge(standing, tmp_path / "a.turns", max_idle_turns=2) == 1
