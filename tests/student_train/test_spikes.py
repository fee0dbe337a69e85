"""Loss spikes: the rule at its corners, its memory, and runs of two ranks that warn or stop."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.student_train.run.checkpoint import Checkpoint, ResumeError
from potstill.student_train.run.loop_state import LoopState
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.spikes import SpikeWindow, find_spike
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

LOSSES = [3.1, 2.9, 3.0, 3.3, 2.8, 3.05, 2.95, 3.2]


def test_the_limit_is_mean_and_deviations_of_the_window() -> None:
    mean, std = statistics.fmean(LOSSES), statistics.stdev(LOSSES)
    limit = mean + 2 * std
    assert find_spike(LOSSES, limit - 1e-9, window=8, sigma=2.0) is None
    spike = find_spike(LOSSES, limit + 1e-9, window=8, sigma=2.0)
    assert spike is not None and spike.num_losses == 8
    assert (spike.mean, spike.std, spike.limit) == pytest.approx((mean, std, limit), rel=1e-12)
    assert "3.0" in spike.format(sigma=2.0) and "8 steps" in spike.format(sigma=2.0)
    # Only the window counts: without it the large losses of the start would hide the jump.
    assert find_spike([90.0, 10.0, 50.0, *LOSSES], limit + 1e-9, window=8, sigma=2.0) == spike
    assert find_spike([90.0, 10.0, 50.0, *LOSSES], limit + 1e-9, window=11, sigma=2.0) is None


def test_nothing_is_judged_by_less_than_half_a_window() -> None:
    assert find_spike([], 1e9, window=8, sigma=1.0) is None
    assert find_spike(LOSSES[:3], 1e9, window=8, sigma=1.0) is None
    assert find_spike(LOSSES[:4], 1e9, window=8, sigma=1.0) is not None
    assert find_spike(LOSSES[:7], 1e9, window=16, sigma=1.0) is None


@pytest.mark.parametrize("value", [0.1, 1 / 3, 7.123456789, 1e9])
def test_equal_losses_have_no_spread_and_no_spike(value: float) -> None:
    assert find_spike([value] * 49, value, window=49, sigma=0.5) is None
    assert find_spike([value] * 49, value * 1.001, window=49, sigma=6.0) is not None


def test_falls_and_losses_that_are_no_numbers_are_no_spikes() -> None:
    for loss in (-1e9, float("nan"), float("inf")):
        assert find_spike(LOSSES, loss, window=8, sigma=1.0) is None


def test_the_window_and_its_way_through_a_checkpoint() -> None:
    state = LoopState(step=3)
    options: dict[str, Any] = {"window": 8, "sigma": 3.0}
    for loss in [99.0, *LOSSES, float("nan")]:
        assert state.spikes.judge(loss, stage=0, **options) is None
    assert state.spikes.losses == LOSSES, "the oldest left the window, and no NaN entered"
    again = LoopState.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    assert state.spikes.judge(9.0, stage=0, **options) == again.spikes.judge(9.0, stage=0, **options) is not None
    assert state == again and state.spikes.num_spikes == 1 and state.spikes.losses[-1] == 9.0
    assert LoopState.from_json(json.loads(json.dumps(state.to_json()))) == state
    # A stage with another loss is not judged by the last one's.
    assert state.spikes.judge(50.0, stage=1, **options) is None
    assert state.spikes.losses == [50.0] and state.spikes.num_spikes == 1


def test_loop_states_from_before_they_had_a_version_are_read_and_unknown_ones_refused() -> None:
    old = {"step": 7, "tokens": 99, "skipped": 1, "runtime_seconds": 1.5}
    assert LoopState.from_json(old) == LoopState(step=7, tokens=99, skipped=1, runtime_seconds=1.5)
    judged = {**old, "spike_stage": 2, "recent_losses": [3.0, 2.5], "spikes": 4}
    state = LoopState.from_json(judged)
    assert state.spikes == SpikeWindow(stage=2, losses=[3.0, 2.5], num_spikes=4)
    assert state.to_json() == {"version": 1, **judged}, "nothing but the version is new"
    assert LoopState().to_json() == {"version": 1, "step": 0, "tokens": 0, "skipped": 0, "runtime_seconds": 0.0}
    with pytest.raises(UserError, match=r"loop state version 2, expected 1: .* another version of potstill"):
        LoopState.from_json({**old, "version": 2})
    with pytest.raises(ResumeError, match="step_00000007: loop state version 2"):
        Checkpoint(Path("step_00000007"), {"loop": {**old, "version": 2}}).state()
    with pytest.raises(UserError, match="the loop state lacks tokens, skipped"):
        LoopState.from_json({"step": 7, "runtime_seconds": 0.0})


def spiky(stores: dict[str, Path], run: Path, policy: str) -> dict[str, Any]:
    tree = tiny.config_tree(stores, run, logging={"every_steps": 1}, checkpoint={"every_steps": 3})
    tree["run"]["max_steps"] = 10
    return {**tree, "spike_policy": policy, "spike_window": 8, "spike_sigma": 6.0}


def test_a_spike_stops_all_ranks_before_the_save(stores, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = spiky(stores, run, "stop")
    config = workers.config_of(tree)
    plan = workers.build_plan(config, workers.open_stores(config))
    # Step 5 ends at loop step 6, where a save is due: it must not happen.
    with pytest.raises(AssertionError) as error:
        run_ranks(workers.train_with_a_spike, tree, 5, world=2)
    message = str(error.value)
    assert "LossSpikeError: step 5 is a loss spike: loss" in message and "of the 5 steps before" in message
    assert ", ".join(str(row) for row in plan.rows(5)) in message and "step_00000003" in message
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step_00000003"]
    # As checkpoints were written before the loop's state had a version, and files a digest.
    saved = run / "checkpoints" / "step_00000003" / "potstill.json"
    about = json.loads(saved.read_text())
    assert about["loop"].pop("version") == 1
    del about["sha256"]
    sizes = {name: said["bytes"] for name, said in about["files"].items()}
    saved.write_text(json.dumps({**about, "version": 1, "files": sizes}))
    # The window came back with the checkpoint, and without the jump the run continues to its end.
    assert run_ranks(workers.train_run, tree, world=2)[0]["steps"] == 10
    manifest = json.loads((run / "checkpoints" / "step_00000010" / "potstill.json").read_text())
    records = [record for record in read_metrics(run) if record["kind"] == "train"]
    recent = [loss for record in records for loss in record["step_losses"]][-8:]
    assert manifest["loop"]["recent_losses"] == recent and "spikes" not in manifest["loop"]


def test_a_spike_is_counted_when_asked_to_warn(stores, tmp_path: Path) -> None:
    tree = spiky(stores, tmp_path / "run", "warn")
    assert run_ranks(workers.train_with_a_spike, tree, 6, world=2)[0] == {"status": "done", "spikes": 1}
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    # Known when the next step starts, so its own line does not count it yet.
    assert [record["loss_spikes"] for record in records] == [0] * 7 + [1] * 3
