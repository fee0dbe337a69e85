"""The claims on the novels: what their arms are, which rows stand in which quarter, what the table of ends says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from benchmarks.claims import pd, salt
from benchmarks.claims.base import SCALES, Arm, Bench, Claim, Scale
from benchmarks.claims.ends import ends_table, taught_steps
from benchmarks.claims.runs import Run, Runs
from benchmarks.claims.text import Text
from potstill.storage import StoreReader
from tests.student_train.tiny import write_all


def _bench(tmp_path: Path, scale: Scale = "cpu") -> Bench:
    return Bench(work=tmp_path / "work", data=tmp_path / "data", scale=scale, seeds=(1, 2))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("claim", [salt.CLAIM, pd.CLAIM], ids=lambda claim: claim.name)
def test_arms_are_configurations_that_share_their_schedule(claim: Claim, scale: Scale, tmp_path: Path) -> None:
    bench = _bench(tmp_path, scale)
    arms = claim.arms(bench)
    folders = {Run(bench=bench, arm=arm, seed=1).folder for arm in arms.values()}  # each builds the configuration
    assert len(folders) == len(arms)
    shared = {json.dumps([arm.config[key] for key in ("schedule", "optimizer")]) for arm in arms.values()}
    assert len(shared) == 1


def _finished(run: Run, losses: list[float]) -> None:
    run.folder.mkdir(parents=True)
    lines = [
        {"kind": "eval", "step": 10 * (place + 1), "heldout_loss": loss, "runtime_seconds": 2.0 * (place + 1)}
        for place, loss in enumerate(losses)
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_ends_stand_beside_their_price(tmp_path: Path) -> None:
    stores = write_all(tmp_path)
    bench = _bench(tmp_path)
    data = {"tokens": str(stores["tokens"]), "global_batch_rows": 2}
    taught = {**data, "targets": {"teacher": str(stores["teacher"])}}
    stages = [{"until": 0.25, "targets": "teacher"}, {"until": 15}, {"targets": "teacher"}]
    model = {"config": {"model_type": "llama", "hidden_size": 8}}
    common = {"run": {"name": "claim", "max_steps": 20}, "model": model}
    arms = {
        "labels": Arm(config={**common, "data": data, "curriculum": [{}]}),
        "kd": Arm(config={**common, "data": taught, "curriculum": stages}),
    }
    assert taught_steps(arms["labels"]) == 0
    assert taught_steps(arms["kd"]) == 5 + 5
    runs = Runs(bench, arms)
    for seed, shift in ((1, 0.0), (2, 0.5)):
        _finished(runs.run("labels", seed), [3.0, 2.5])
        _finished(runs.run("kd", seed), [2.4 + shift, 2.0 + shift])
    labels, kd = ends_table("ends", runs, dict.fromkeys(arms, "labels")).rows
    assert labels == ("labels", "2.5000 ± 0.0000", "", "20", "4 ± 0", "0.000")
    assert kd[:4] == ("kd", "2.2500 ± 0.3536", "0.2500 ± 0.3536", "15")
    teacher = stores["teacher"]
    size = sum(path.stat().st_size for path in (teacher / "units").rglob("*") if path.is_file())
    assert kd[5] == f"{10 * 2 * size / StoreReader(teacher).num_rows / 1e6:.3f}"


def test_quarters_hold_the_held_out_rows_from_easy_to_hard(tmp_path: Path) -> None:
    stores = write_all(tmp_path)
    text = Text(_bench(tmp_path, "quick"))
    for place, made in ((text.heldout, "tokens"), (text.heldout_scores("small"), "scores")):
        place.parent.mkdir(parents=True)
        place.symlink_to(stores[made])
    assert [job.name for job in salt.quarter_jobs(text)] == [f"quarter-{name}" for name in salt.QUARTERS]
    losses = StoreReader(stores["scores"]).row_stats["mean_loss"]
    places = {
        tuple(row.tokens.tolist()): loss
        for row, loss in zip(StoreReader(stores["tokens"]).tokens_rows(range(len(losses))), losses, strict=True)
    }
    parts = []
    for name in salt.QUARTERS:
        lines = (text.folder / "quarters" / f"{name}.jsonl").read_text().splitlines()
        parts.append([places.pop(tuple(json.loads(line)["input_ids"])) for line in lines])
    assert not places
    for easier, harder in itertools.pairwise(parts):
        assert max(easier) <= min(harder)
