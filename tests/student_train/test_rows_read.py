"""Stores of the rows that a run reads: which rows these are, the same losses from them, and an error for any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import HELD, SourceRows, StoreReader, StoreWriter, held_mask, only_rows_field, seal_store
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.curriculum.plan import rows_digest
from potstill.student_train.data.rows_read import rows_read, rows_to_dump
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.run.preflight import check_run
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import steps_of

NUM_ROWS, STEPS = 40, 8


def tree_of(stores: dict[str, Path], run: Path, *, early: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Two teachers in two stages of 3 and 5 steps of 4 rows; the first stage selects its rows by the small LM."""
    rows = {"score": {"of": [{"store": "slm"}]}, "share": 0.5, "segments": 1}
    curriculum = [{"until": 3, "targets": "early", "rows": rows}, {"targets": "teacher"}]
    data = {"targets": {"early": str(early or stores["early_teacher"]), "teacher": str(stores["teacher"])}}
    data |= {"heldout": None, "heldout_targets": None}
    fixed = {"curriculum": curriculum, "data": data, "run": {"max_steps": STEPS}, "schedule": {"kind": "constant"}}
    return tiny.config_tree(stores, run, **{**fixed, **changes})


def only_of(stores: dict[str, Path], name: str, path: Path, rows: Any) -> Path:
    """The early or the held-out teacher's store with these rows only, as a dump of them writes it."""
    tokens = StoreReader(stores["heldout" if name == "heldout_teacher" else "tokens"])
    whole = StoreReader(stores[name])
    table = tiny.transition() if name == "heldout_teacher" else 0.6 * tiny.transition() + 0.4 * tiny.transition(5)
    table = table - np.log(np.exp(table).sum(1, keepdims=True))
    mask = held_mask(rows, whole.num_rows)
    spec = replace(whole.spec, stats=(*whole.spec.stats, HELD), only_rows=only_rows_field(mask))
    writer = StoreWriter.create(path, spec)
    for unit in range(writer.num_units or 0):
        found = []
        for source in tokens.tokens_rows(list(writer.unit_rows(unit))):
            row, held = tiny.targets_row(source, table, temperatures=spec.temperatures), bool(mask[source.row])
            stats = {name: value if held else 0.0 for name, value in row.stats.items()}
            targets = row.targets if held else row.targets.without_targets(row.targets.num_tokens)
            found.append(replace(row, targets=targets, stats={**stats, HELD: float(held)}))
        writer.commit_unit(unit, found)
    seal_store(path)
    return path


def read_of(config: TrainConfig, stores: dict[str, Path], place: str = "early_teacher", **given: Any) -> list[int]:
    return rows_to_dump(config, output=str(stores[place]), tokens=str(stores["tokens"]), **given).tolist()


@pytest.mark.parametrize("at_once", [1, 8, 1 << 17])
def test_they_are_those_of_the_steps_that_read_the_store(stores, tmp_path: Path, monkeypatch, at_once: int) -> None:
    monkeypatch.setattr("potstill.student_train.data.rows_read.ROWS_AT_ONCE", at_once)
    config = workers.config_of(tree_of(stores, tmp_path / "run"))
    plan = build_plan(config, open_stores(config))
    early = {int(row) for step in range(3) for row in plan.rows(step)}
    late = {int(row) for step in range(3, STEPS) for row in plan.rows(step)}
    assert read_of(config, stores) == sorted(early) and len(early) <= 12
    assert read_of(config, stores, "teacher") == sorted(late) and early != late
    assert rows_read(plan, "slm").tolist() == []
    # No targets store need be there, and the name may be said where the place is another.
    gone = workers.config_of(
        tree_of({**stores, "early_teacher": tmp_path / "no", "teacher": tmp_path / "none"}, tmp_path)
    )
    assert read_of(gone, {**stores, "early_teacher": tmp_path / "no"}) == sorted(early)
    assert read_of(config, stores, "scores", name="early") == sorted(early)


def test_of_a_series_each_checkpoint_is_read_where_the_clock_stands(stores, tmp_path: Path) -> None:
    clock = {"stores": {"early": 3, "teacher": 8}, "refresh": 3}
    stage = {"targets_clock": clock, "off_kd": "nothing"}
    config = workers.config_of(tree_of(stores, tmp_path / "run", curriculum=[stage]))
    plan = build_plan(config, open_stores(config))
    read = {name: {int(row) for step in steps for row in plan.rows(step)}
            for name, steps in (("early_teacher", range(3)), ("teacher", range(3, STEPS)))}  # fmt: skip
    for name, rows in read.items():
        assert read_of(config, stores, name) == sorted(rows)
    # On saturation the run decides: every store may be read at any step.
    clock = {"stores": {"early": 3, "teacher": 8}, "switch_on": "saturation"}
    tree = tree_of(stores, tmp_path / "run", curriculum=[{**stage, "targets_clock": clock}], eval={"every_steps": 2})
    tree["data"] |= {"heldout": str(stores["heldout"])}
    for name in read:
        assert read_of(workers.config_of(tree), stores, name) == sorted(read["early_teacher"] | read["teacher"])


def test_of_several_sources_each_has_its_own(stores, tmp_path: Path) -> None:
    """Row ids are those of the source's tokens store; only one source has the early teacher."""
    tree = tree_of(stores, tmp_path / "run", curriculum=[
        {"until": 3, "targets": "early", "mix": {"one": 2, "other": 1}, "off_kd": "ce"},
        {"targets": "teacher", "mix": {"one": 1, "other": 3}},
    ])  # fmt: skip
    for key in ("tokens", "targets", "scores", "heldout", "heldout_targets"):
        tree["data"].pop(key, None)
    tree["data"]["sources"] = {
        "one": {"tokens": str(stores["heldout"]), "targets": {"teacher": str(stores["heldout_teacher"])}},
        "other": {
            "tokens": str(stores["tokens"]),
            "targets": {"early": str(stores["early_teacher"]), "teacher": str(stores["teacher"])},
        },
    }
    config = workers.config_of(tree)
    plan = build_plan(config, open_stores(config))
    first, end = plan.source_bounds(1)
    assert (first, end) == (11, 11 + NUM_ROWS)
    early, late = (np.concatenate([plan.rows(step) for step in steps]) for steps in (range(3), range(3, STEPS)))
    assert read_of(config, stores) == sorted({int(row) - first for row in early if row >= first})
    assert read_of(config, stores, "teacher") == sorted({int(row) - first for row in late if row >= first})
    own = rows_to_dump(config, output=str(stores["heldout_teacher"]), tokens=str(stores["heldout"]))
    assert own.tolist() == sorted({int(row) for row in late if row < first}) and len(own)
    few = only_of(stores, "heldout_teacher", tmp_path / "few", own[1:])
    tree["data"]["sources"]["one"]["targets"]["teacher"] = str(few)
    with pytest.raises(UserError, match=f"the run reads 1 rows that it lacks.*row {own[0]} was left out"):
        check_run(workers.config_of(tree), world_size=1)


def test_a_run_learns_the_same_from_them(stores, tmp_path: Path) -> None:
    whole = workers.config_of(tree_of(stores, tmp_path / "run"))
    few = only_of(stores, "early_teacher", tmp_path / "some", read_of(whole, stores))
    tree = tree_of(stores, tmp_path / "run", early=few)
    readers = [SourceRows(open_stores(config).sources) for config in (whole, workers.config_of(tree))]
    plan = build_plan(whole, open_stores(whole))
    for step in range(3):
        (_, one), (_, two) = (reader.read(plan.rows(step), frozenset({"early"})) for reader in readers)
        for row, same in zip(one["early"], two["early"], strict=True):
            for name, values in row.targets.columns.items():
                np.testing.assert_equal(same.targets.columns[name], values)
    run_ranks(workers.train_run, tree, world=1)
    assert steps_of(tmp_path / "run")[1] == [rows_digest(plan.rows(step)) for step in range(STEPS)]


def test_a_run_that_reads_more_is_refused_before_it_starts(stores, tmp_path: Path) -> None:
    tree = tree_of(stores, tmp_path / "run")
    rows = read_of(workers.config_of(tree), stores)
    tree = tree_of(stores, tmp_path / "run", early=only_of(stores, "early_teacher", tmp_path / "few", rows[1:]))
    with pytest.raises(UserError) as error:
        check_run(workers.config_of(tree), world_size=1)
    for words in ("store 'early': the run reads 1 rows", f"row {rows[0]} was left out", "--only-rows-of RUN.yaml"):
        assert words in str(error.value), str(error.value)
    tree["curriculum"][0]["rows"]["score"] = {"of": [{"store": "early", "stat": "mean_loss"}]}
    with pytest.raises(UserError, match=r"store 'early' holds targets of some rows only .* cannot rank all"):
        check_run(workers.config_of(tree), world_size=1)


def test_held_out_targets_of_some_rows_are_refused(stores, tmp_path: Path) -> None:
    few = only_of(stores, "heldout_teacher", tmp_path / "few", np.arange(5))
    tree = tiny.config_tree(stores, tmp_path / "run", data={"heldout_targets": str(few)})
    with pytest.raises(UserError, match=r"heldout_targets = .* holds 5 of 11 rows only"):
        check_run(workers.config_of(tree), world_size=1)


def test_what_cannot_be_found_is_said(stores, tmp_path: Path) -> None:
    tree = tree_of(stores, tmp_path / "run")
    config = workers.config_of(tree)
    with pytest.raises(UserError, match=r"names no targets store at .*sampled; it names data\.targets\.early = "):
        read_of(config, stores, "sampled")
    with pytest.raises(UserError, match=r"tokens .*heldout is not the store .* that data\.targets\.early is over"):
        rows_to_dump(config, output=str(stores["early_teacher"]), tokens=str(stores["heldout"]))
    tree["curriculum"][0]["rows"]["score"] = {"of": [{"store": "early", "stat": "mean_loss"}]}
    with pytest.raises(UserError, match=r"selected by data\.targets\.early itself, which is to be dumped"):
        read_of(workers.config_of(tree), stores)
    tree["rescoring"] = {"every_steps": 3, "rows": "all"}
    tree["curriculum"][0]["rows"]["score"] = {"of": [{"store": "current"}]}
    with pytest.raises(UserError, match=r"decided while it trains .step 0 is of stage 'stage_0'"):
        read_of(workers.config_of(tree), stores)
    assert read_of(workers.config_of(tree), stores, "teacher")
    del tree["rescoring"]
    tree["curriculum"] = [{"targets": "teacher"}]
    with pytest.raises(UserError, match=r"no step of the run reads data\.targets\.early"):
        read_of(workers.config_of(tree), stores)
