"""What the ranks of a machine share: statistics and pools once, the same choices to the bit, far stores near by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.storage import StoreReader
from potstill.storage.files.paths import LocalFolder
from potstill.storage.store import index, self_check
from potstill.storage.store.index import RowIndex
from potstill.student_train.curriculum.plan import CurriculumPlan
from potstill.student_train.data.node import reader_options
from potstill.student_train.run.preflight import check_run
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

ROWS = {
    "score": {"kind": "difference", "of": [{"store": "slm"}, {"store": "slm", "stat": "mean_entropy"}]},
    "share": {"kind": "linear", "start": 0.3, "end": 1.0},
    "segments": 4,
}
STAGES = [{"targets": "teacher", "rows": ROWS, "weights": {"of": "row", "store": "slm", "column": "mean_loss"}}]


@pytest.fixture
def passes(monkeypatch):
    """Passes over the indexes of stores, with the columns of each; arrays are shared however small."""
    seen: list[list[str]] = []
    real = RowIndex.columns
    monkeypatch.setattr(RowIndex, "columns", lambda self, names: seen.append(sorted(names)) or real(self, names))
    monkeypatch.setattr("potstill.storage.files.shared_arrays.SHARED_FROM_BYTES", 1)
    return seen


def plan_of(tree: dict[str, Any]) -> CurriculumPlan:
    return check_run(workers.config_of(tree), world_size=1).plan


def tree_of(stores, output: Path, cache: str | None, **changes: Any) -> dict[str, Any]:
    tree = tiny.config_tree(stores, output, curriculum=STAGES, **changes)
    tree["data"] |= {"cache_dir": cache}
    return tree


def same_choices(one: CurriculumPlan, other: CurriculumPlan) -> None:
    assert one.identity() == other.identity()
    for batch in range(one.total_steps):
        rows = one.rows(batch)
        assert rows.dtype == np.int64 and np.array_equal(rows, other.rows(batch))


def test_statistics_pools_and_checks_are_worked_out_once_and_choices_stay(stores, tmp_path, passes) -> None:
    alone = plan_of(tree_of(stores, tmp_path / "run", None))
    wanted = ["stat.mean_entropy", "stat.mean_loss"]
    assert passes == [wanted]  # in one pass, for the selector and for the weights
    passes.clear()
    first = plan_of(tree_of(stores, tmp_path / "run", str(tmp_path / "node")))
    assert passes == [wanted]
    passes.clear()
    second = plan_of(tree_of(stores, tmp_path / "run", str(tmp_path / "node")))
    assert passes == []
    same_choices(alone, first)
    same_choices(alone, second)
    for path in (tmp_path / "node").glob("*/*.arrays"):
        other = path.with_suffix(".new")
        other.write_bytes(path.read_bytes()[:-1])
        other.replace(path)
    same_choices(alone, plan_of(tree_of(stores, tmp_path / "run", str(tmp_path / "node"))))
    assert passes == [wanted]


def test_other_settings_are_other_pools(stores, tmp_path, passes) -> None:
    node = str(tmp_path / "node")
    plans = []
    for change in ({}, {"keep": "lowest"}, {"share": 0.5}, {"segments": 2}):
        tree = tree_of(stores, tmp_path / "run", node)
        tree["curriculum"] = [{**STAGES[0], "rows": {**ROWS, **change}}]
        plans.append(plan_of(tree))
        same_choices(plans[-1], plan_of({**tree, "data": {**tree["data"], "cache_dir": None}}))
    assert len({plan.identity()["segments"] for plan in plans}) == 4


def test_a_store_at_a_url_is_looked_at_by_one_rank_of_a_node(stores, tmp_path, passes, monkeypatch) -> None:
    monkeypatch.setattr(index, "COLUMN_READ_BYTES", 1)
    looks, real = [], self_check.check_row_places
    monkeypatch.setattr(
        self_check, "check_row_places", lambda *args, **options: looks.append(1) or real(*args, **options)
    )
    tree = tree_of(stores, tmp_path / "run", str(tmp_path / "node"))
    far = json.loads(json.dumps(tree, default=str))
    for key in ("tokens", "heldout", "heldout_targets"):
        if far["data"].get(key):
            far["data"][key] = f"file://{far['data'][key]}"
    for group in ("targets", "scores"):
        far["data"][group] = {name: f"file://{place}" for name, place in far["data"][group].items()}
    first = plan_of(far)
    assert looks and len(list(tmp_path.glob("node/node-*/index-*.arrow"))) >= 2
    looks.clear(), passes.clear()
    second = plan_of(far)
    assert looks == [] and passes == []
    same_choices(first, second)
    same_choices(first, plan_of(tree))


def test_where_ranks_share(stores, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def options(place: Path | str, **data: Any) -> dict[str, Any]:
        tree = tiny.config_tree(stores, tmp_path / "run")
        tree["data"] |= data
        return reader_options(workers.config_of(tree).data, place)

    (root,) = {options(Path("x"))["share_dir"], options("s3://b/x")["share_dir"]}
    assert root.parent == tmp_path and root.name.startswith("potstill-")
    named = str(tmp_path / "named")
    assert "cache_dir" not in options(Path("x"), cache_dir=named) and "cache_dir" not in options("s3://b/x")
    assert options("s3://b/x", cache_dir=named)["cache_dir"] == tmp_path / "named"
    assert options("s3://b/x")["cache_bytes"] == 64 << 30
    assert options("s3://b/x", cache_dir=None) == options("s3://b/x", cache_gib=0) == {}
    assert options(Path("x"), cache_dir=str(tmp_path / "own"))["share_dir"] == tmp_path / "own"
    assert not root.exists()  # made when something goes into it
    root.mkdir(0o755)
    root.chmod(0o755)
    assert options("s3://b/x") == {} == options(Path("x"))
    assert caplog.text.count("each rank reads and holds statistics of its own") == 1


def test_a_reader_that_shares_gives_the_same_statistics(stores, tmp_path, passes) -> None:
    plain = StoreReader(stores["scores"])
    for _ in range(2):
        shared = StoreReader(stores["scores"], share_dir=tmp_path / "node")
        assert all(np.array_equal(shared.row_stats[name], values) for name, values in plain.row_stats.items())
    assert isinstance(plain._folder, LocalFolder) and plain.index_digest == plain.manifest.index_sha256


@pytest.mark.slow
def test_two_ranks_read_statistics_once_and_losses_are_the_same(stores, tmp_path) -> None:
    losses, counts = [], []
    for name, cache in (("alone", None), ("shared", str(tmp_path / "node"))):
        tree = tree_of(stores, tmp_path / name, cache)
        found = run_ranks(workers.train_and_count_passes, tree, world=2)
        counts.append(sum(number for number, _ in found))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert counts == [2, 1] and len(losses[0]) > 1 and losses[0] == losses[1]
