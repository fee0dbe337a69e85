"""Runs over several sources: the plan's exact counts, targets by source, what is refused, ranks, kills and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from potstill.common.errors import ConfigError, UserError
from potstill.storage import EpochPlan, Loader, StoreReader
from potstill.student_train.curriculum.plan import CurriculumPlan, describe, rows_digest
from potstill.student_train.curriculum.row_pools import PlanSource
from potstill.student_train.data.batch import collate
from potstill.student_train.data.stores import Stores, build_plan, check_objectives, open_stores
from potstill.student_train.evaluation.heldout import HeldoutEvaluation, SourcesEvaluation, evaluation_line
from potstill.student_train.evaluation.row_figures import curriculum_step, load_student, row_figures
from potstill.student_train.hf_export.card_facts import gather_facts
from potstill.student_train.hf_export.model_card import model_card
from potstill.student_train.hf_export.weights import find_source
from potstill.student_train.run.checkpoint import list_checkpoints
from potstill.student_train.run.dry_run import dry_run
from potstill.student_train.run.dry_run_text import format_dry_run
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.preflight import check_start
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import kill_after, steps_of

SIZES = {"novels": 60, "maths": 40, "noisy": 20}
OFFSETS = np.array([0, 60, 100, 120])
SCORES = {
    name: np.random.default_rng(n).permutation(size).astype(np.float32) for n, (name, size) in enumerate(SIZES.items())
}
SELECTED = [16, 15, 39, 33, 7, 12, 20, 13, 14, 21, 8, 17, 31, 7, 8, 16, 23, 15, 32, 21, 10, 13, 39, 1]
MIX = {"novels": 0.5, "maths": 0.25, "noisy": 0.25}
ROWS = {"score": {"of": [{"store": "slm"}]}, "share": 0.5, "segments": 2}


def named(**changes: Any) -> dict[str, Any]:
    """data with three sources whose stores nobody opens."""
    stores = {"targets": {"teacher": "t"}, "scores": {"slm": "s"}}
    sources = {name: {"tokens": name, **stores} for name in SIZES}
    return {"sources": sources, "global_batch_rows": 8, "micro_batch_rows": 2, **changes}


def plan_of(curriculum: list[dict[str, Any]], *, steps: int = 20, seed: int = 3, **data: Any) -> CurriculumPlan:
    tree = tiny.config_tree(
        {name: Path(name) for name in NAMES}, Path("run"), curriculum=curriculum, run={"seed": seed}
    )
    tree["data"] = named(**data)
    sources = [PlanSource(name, size, {"slm": {"mean_loss": SCORES[name]}}) for name, size in SIZES.items()]
    return CurriculumPlan(workers.config_of(tree), total_steps=steps, sources=sources)


NAMES = ("tokens", "heldout", "heldout_teacher", "teacher", "scores")


def sources_of(plan: CurriculumPlan, first: int, end: int) -> np.ndarray:
    """Number of the source of each row of these batches, in order."""
    rows = np.concatenate([plan.rows(batch) for batch in range(first, end)])
    return np.searchsorted(OFFSETS, rows, side="right") - 1


def test_counts_by_source_follow_the_mix_at_every_row_and_exactly_per_stage() -> None:
    plan = plan_of([{"until": 10, "mix": MIX}, {"mix": {"noisy": 3, "maths": 1}}])
    first, second = sources_of(plan, 0, 10), sources_of(plan, 10, 20)
    assert np.bincount(first, minlength=3).tolist() == [40, 20, 20]
    assert np.bincount(second, minlength=3).tolist() == [0, 20, 60]
    for number, share in enumerate(MIX.values()):
        error = np.cumsum(first == number) - share * np.arange(1, len(first) + 1)
        assert np.abs(error).max() <= 1.25
    assert plan.rows_taken(0, 20) == (40, 40, 80) and plan.rows_taken(3, 5) == (8, 4, 4)
    assert plan.rows_taken(9, 12) == tuple(np.bincount(sources_of(plan, 9, 12), minlength=3).tolist())
    assert plan.mix(0) == MIX and plan.mix(10) == {"maths": 0.25, "noisy": 0.75}
    assert [record["mix"] for record in describe(plan)] == [plan.mix(0), plan.mix(10)]


def test_without_a_mix_every_row_comes_once_in_a_pass() -> None:
    plan = plan_of([{}])
    rows = np.concatenate([plan.rows(batch) for batch in range(30)])  # two passes over 120 rows
    for part in rows.reshape(2, 120):
        assert sorted(part.tolist()) == list(range(120))
    assert plan.mix(0) == {"novels": 1 / 2, "maths": 1 / 3, "noisy": 1 / 6}
    assert plan.position(15) == {"epoch": 1, "stage": 0, "rows_consumed": 120}


def test_a_source_goes_on_in_the_next_stage_where_the_last_one_left_it() -> None:
    """Whatever the mixes, the rows of a source are those of its own order, one after the other."""
    changing = plan_of(
        [{"until": 5, "mix": MIX}, {"until": 12, "mix": {"maths": 1}}, {"mix": {"novels": 1, "maths": 2}}]
    )
    alone = plan_of([{"mix": {"maths": 1}}])
    rows = np.concatenate([changing.rows(batch) for batch in range(20)])
    of_maths = rows[(rows >= 60) & (rows < 100)]
    expected = np.concatenate([alone.rows(batch) for batch in range(20)])
    np.testing.assert_array_equal(of_maths, expected[: len(of_maths)])
    assert len(of_maths) > 80, "two passes and more"


def test_a_plain_run_keeps_its_order_and_its_identity() -> None:
    tree = tiny.config_tree({name: Path(name) for name in NAMES}, Path("run"))
    plan = CurriculumPlan(workers.config_of(tree), total_steps=20, sources=[PlanSource("tokens", 40, {})])
    plain = EpochPlan(40, global_batch=4, seed=3)
    assert [plan.rows(b).tolist() for b in range(25)] == [plain.rows(b).tolist() for b in range(25)]
    assert plan.source_names == ("tokens",)
    # As it was saved in checkpoints before there were sources.
    assert plan.identity() == {
        "kind": "curriculum",
        "version": 1,
        "num_rows": 40,
        "global_batch": 4,
        "seed": 3,
        "mode": "global",
        "segments": "6626e69dc08a7fc4b53e1eb94ff11e84ea06a0d0a232199bcba2b396fcab556d",
    }
    rows = {**ROWS, "share": {"kind": "linear", "start": 0.25, "end": 1.0}, "segments": 4}
    tree["curriculum"] = [{"until": 12, "rows": rows}, {}]
    stats = {"slm": {"mean_loss": np.random.default_rng(0).permutation(40).astype(np.float32)}}
    chosen = CurriculumPlan(workers.config_of(tree), total_steps=20, sources=[PlanSource("tokens", 40, stats)])
    segments = "5e331dd6b62f24f4711bf3dbc48ae78b69faadecd89c3e12044199536c44e4a6"
    assert chosen.identity() == {**plan.identity(), "segments": segments}
    assert np.concatenate([chosen.rows(b) for b in (0, 3, 7, 11, 12, 19)]).tolist() == SELECTED


def test_a_row_selector_ranks_within_each_source_and_the_mix_keeps_its_shares() -> None:
    plan = plan_of([{"until": 12, "mix": MIX, "rows": ROWS}, {"mix": MIX}])
    assert [segment.first_batch for segment in plan.segments] == [0, 6, 12]
    wanted = {
        int(OFFSETS[n]) + int(row)
        for n, name in enumerate(SIZES)
        for row in np.argsort(-SCORES[name], kind="stable")[: SIZES[name] // 2]
    }
    rows = np.concatenate([plan.rows(batch) for batch in range(12)])
    assert set(rows.tolist()) <= wanted and len(wanted) == plan.segments[0].pool_size == 60
    assert np.bincount(sources_of(plan, 0, 12), minlength=3).tolist() == [48, 24, 24]
    assert plan.row_share(0) == 0.5 and plan.row_share(12) == 1.0
    never = plan_of([{"mix": MIX}])
    assert [plan.rows(b).tolist() for b in range(12, 20)] == [never.rows(b).tolist() for b in range(12, 20)]


def test_identity_pins_the_mix_the_sources_and_their_order() -> None:
    stages = [{"until": 10, "mix": MIX}, {"mix": {"maths": 1}}]
    same, longer = plan_of(stages).identity(), plan_of(stages, steps=200).identity()
    assert same == longer, "a run may be made longer"
    other = [{"until": 10, "mix": {**MIX, "noisy": 0.3}}, {"mix": {"maths": 1}}]
    assert plan_of(other).identity() != same and plan_of(stages, seed=4).identity() != same
    assert same["sources"] == [["novels", 60], ["maths", 40], ["noisy", 20]]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"repeat": False}], ["curriculum.0.repeat", "80 rows of data.sources.novels.tokens", "holds 60", "step 20"]),
        (
            [{"mix": {"noisy": 1}, "until": 2}, {"mix": {"maths": 3, "noisy": 1}, "until": 5, "repeat": False}, {}],
            ["curriculum.1.repeat", "up to step 5 the run takes 22 rows of data.sources.noisy.tokens"],
        ),
        ([{"mix": MIX, "rows": ROWS, "until": 2}, {"mix": MIX, "repeat": False}], ["curriculum.0", "selects rows"]),
    ],
)
def test_repetition_is_refused_where_it_shall_not_be(stages: list[dict[str, Any]], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        plan_of(stages)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_run_without_repetition_may_take_every_row_once() -> None:
    plan = plan_of([{"repeat": False}], steps=15)
    assert plan.rows_taken(0, 15) == tuple(SIZES.values())
    plan_of([{"until": 5, "mix": {"maths": 1}}, {"mix": {"novels": 1, "noisy": 1}, "repeat": False}], steps=10)
    tree = tiny.config_tree({name: Path(name) for name in NAMES}, Path("run"), curriculum=[{"repeat": False}])
    config, sources = workers.config_of(tree), [PlanSource("tokens", 40, {})]
    CurriculumPlan(config, total_steps=10, sources=sources)
    with pytest.raises(UserError, match=r"takes 44 rows of data.tokens, which holds 40"):
        CurriculumPlan(config, total_steps=11, sources=sources)


def test_a_source_smaller_than_its_part_of_a_batch() -> None:
    with pytest.raises(UserError, match=r"data.sources.noisy.tokens holds 20 rows, fewer than its 21 rows of a global"):
        plan_of([{"mix": {"noisy": 0.7, "novels": 0.3}}], global_batch_rows=29)
    with pytest.raises(UserError, match=r"curriculum.0.rows, source novels: part 0 .* keeps 3 of 60 rows"):
        plan_of([{"mix": MIX, "rows": {**ROWS, "share": 0.05}}])


@pytest.fixture(scope="module")
def three(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """data.sources: the tiny corpus, a masked one, and a noisy one with a teacher of its own that stored less."""
    root = tmp_path_factory.mktemp("three")
    answers = [
        replace(row, mask=np.random.default_rng(row.row).random(len(row.tokens)) < 0.6)
        for row in tiny.token_rows(24, seed=5, last_length=12)
    ]
    noise = tiny.token_rows(16, seed=6)
    maths = tiny.write_store(root / "maths", tiny.spec_of("tokens", num_rows=None, columns=("mask",)), answers)
    noisy = tiny.write_store(root / "noisy", tiny.spec_of("tokens", num_rows=None), noise)
    tiny.write_targets(root / "maths_teacher", maths, answers, tiny.transition(7), temperatures=(2.0,))
    tiny.write_targets(root / "noisy_teacher", noisy, noise, tiny.transition(8), temperatures=(2.0, 3.0))
    sampled = tiny.spec_of(
        "targets",
        num_rows=len(noise),
        input_digest=noisy.digest,
        selection={"mode": "sample", "num_draws": 20, "power": 1.0},
        teacher={"id": "bigram", "weights_digest": "0" * 64, "dtype": "float32", "engine": "table"},
    )
    draws = [tiny.sampled_row(row, tiny.transition(8), num_draws=20) for row in noise]
    tiny.write_store(root / "noisy_sampled", sampled, draws)
    own = {"novels": (stores["tokens"], stores["teacher"])}
    own |= {name: (root / name, root / f"{name}_teacher") for name in ("maths", "noisy")}
    found: dict[str, dict[str, Any]] = {
        name: {"tokens": str(tokens), "targets": {"teacher": str(teacher)}} for name, (tokens, teacher) in own.items()
    }
    held = tiny.write_store(root / "held", tiny.spec_of("tokens", num_rows=None), tiny.token_rows(5, seed=9))
    found["novels"] |= {"heldout": str(stores["heldout"]), "heldout_targets": str(stores["heldout_teacher"])}
    found["noisy"]["heldout"] = held.url
    return found


def tree_of(stores: dict[str, Path], output: Path, sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run over these sources in two stages with mixes of their own."""
    curriculum = [
        {"until": 0.5, "targets": "teacher", "mix": MIX},
        {"targets": "teacher", "mix": {"noisy": 1, "maths": 3}},
    ]
    tree = tiny.config_tree(stores, output, **{"curriculum": curriculum, **changes})
    for key in ("tokens", "targets", "scores"):
        del tree["data"][key]
    tree["data"]["sources"] = sources
    return tree


def test_a_killed_run_over_sources_resumes_at_another_world_size(stores, three, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tree_of(stores, run, three, checkpoint={"every_steps": 4}, run={"max_steps": 24})
    assert kill_after(tree, run, step=6, world=2) > 0
    run_ranks(workers.train_run, tree, world=1)
    _, plan = checked(tree)
    assert steps_of(run)[1] == [rows_digest(plan.rows(batch)) for batch in range(24)]
    drawn = sum(np.array([line["sources"][name]["rows"] for name in SIZES]) for line in lines_of(run))
    assert drawn.tolist() == [24, 12 + 36, 12 + 12]
    [figures] = [record for record in read_metrics(run) if record["kind"] == "eval"]
    assert set(figures["sources"]) == {"novels", "noisy"}
    # The run's own held-out rows are those of novels here.
    assert figures["sources"]["novels"]["heldout_loss"] == pytest.approx(figures["heldout_loss"])
    newest = list_checkpoints(run)[-1]
    card = model_card(
        gather_facts(
            run,
            newest,
            workers.config_of(tree),
            title="mine",
            hf_config=AutoConfig.from_pretrained(run / "student"),
            num_parameters=1,
            dtype="float32",
        )
    )
    assert "mix novels 0.5, maths 0.25, noisy 0.25" in card and "noisy.teacher" in card and "maths.tokens" in card
    assert str(tmp_path) not in card, "places are cut to their last names"
    manifest = newest.manifest
    assert set(manifest["data"]["stores"]) == {f"sources.{name}" for name in SIZES}
    assert set(manifest["stores"]) == {f"{name}.{store}" for name in SIZES for store in ("tokens", "teacher")}


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The training lines of the metrics."""
    return [record for record in read_metrics(run) if record["kind"] == "train"]


def test_each_source_is_taught_by_its_own_store(stores, three) -> None:
    """At T = 2 as well, where one store has a tail at T = 3 too, which no stage asks for."""
    opened, plan = checked(tree_of(stores, Path("run"), three, objective={"alpha": 0.5, "temperature": 2.0}))
    with Loader(plan, opened.sources) as loader:
        batch = next(loader)
    [micro] = collate(batch, plan.objective(0), micro_batch_rows=4, row_length=tiny.ROW_LENGTH)
    assert batch.source is not None and sorted(batch.source.tolist()) == [0, 0, 1, 2] and micro.targets is not None
    assert list(micro.targets.log_tail_at) == [2.0]
    place = 0
    for number, row in zip(batch.source, batch.tokens, strict=True):
        source = opened.sources[number]
        expected = source.joined["teacher"].row(row.row - [0, 40, 64][number]).targets
        low, high = (int(micro.targets.offsets[place + n]) for n in (0, len(row.tokens)))
        np.testing.assert_array_equal(micro.targets.ids[low:high].numpy(), expected.ids)
        place += len(row.tokens)
    assert place == sum(len(row.tokens) for row in batch.tokens)


def checked(tree: dict[str, Any]) -> tuple[Stores, CurriculumPlan]:
    """Stores and plan of a configuration, checked as a start does before it builds a model."""
    config = workers.config_of(tree)
    opened = open_stores(config)
    check_objectives(config, opened)
    return opened, build_plan(config, opened)


def refused(stores: dict[str, Path], sources: dict[str, Any], **changes: Any) -> str:
    with pytest.raises((ConfigError, UserError)) as error:
        checked(tree_of(stores, Path("run"), sources, **changes))
    return str(error.value)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"mix": {"novels": 1, "math": 1}}, ["curriculum.0.mix", "'math'", "novels"]),
        ({"mix": {"novels": -0.5, "maths": 1}}, ["mix.novels", "-0.5"]),
        ({"mix": {"novels": float("nan")}}, ["mix.novels", "nan"]),
        ({"mix": {"novels": 0.0}}, ["mix", "above 0"]),
        ({"mix": {}}, ["mix", "above 0"]),
        ({"targets": "other"}, ["curriculum.0.targets", "'other'", "data.sources.novels.targets"]),
        ({"rows": ROWS}, ["curriculum.0.rows.score", "'slm'", "data.sources.novels"]),
        ({"targets": "teacher", "tokens": {"policy": "label_rank", "source": "slm"}}, ["curriculum.0.tokens", "'slm'"]),
        ({"repeat": False, "rows": ROWS}, ["repeat", "rows"]),
        ({"targets": "teacher", "temperature": 3.0}, ["curriculum.0.temperature", "3.0", "data.sources.novels"]),
    ],
)
def test_stages_that_do_not_fit_the_sources(stores, three, stage: dict[str, Any], words: list[str]) -> None:
    message = refused(stores, three, curriculum=[stage])
    assert all(word in message for word in words), message


def test_a_mix_of_a_run_that_has_no_sources(stores) -> None:
    with pytest.raises(ConfigError, match=r"curriculum.0.mix names sources, but the run has one tokens store"):
        workers.config_of(tiny.config_tree(stores, Path("run"), curriculum=[{"mix": {"tokens": 1.0}}]))


def test_corpus_and_sources_and_their_names(stores, three) -> None:
    both = tree_of(stores, Path("run"), three)
    both["data"]["tokens"] = str(stores["tokens"])
    with pytest.raises(ConfigError, match=r"data.sources and data.tokens are both given"):
        workers.config_of(both)
    neither = tree_of(stores, Path("run"), {})
    with pytest.raises(ConfigError, match=r"data.tokens is needed and missing"):
        workers.config_of(neither)
    assert "'a b' is no name" in refused(stores, {**three, "a b": three["maths"]})
    twice = {**three["maths"], "targets": {}, "scores": {"teacher": "x"}}
    assert "data.sources.maths.scores names 'teacher'" in refused(stores, {**three, "maths": twice})


def test_a_source_without_the_targets_of_a_stage_needs_labels_to_count(stores, three) -> None:
    sources = {**three, "maths": {"tokens": three["maths"]["tokens"]}}
    message = refused(stores, sources)
    assert all(word in message for word in ("curriculum.0.targets", "data.sources.maths.targets has []", "off_kd: ce"))
    _, plan = checked(tree_of(stores, Path("run"), sources, objective={"off_kd": "ce"}))
    assert plan.joined(0) == {"teacher"}
    nobody = {name: {"tokens": source["tokens"]} for name, source in three.items()}
    assert "curriculum.0.targets" in refused(stores, nobody, objective={"off_kd": "ce"})


def test_stores_of_sources_that_do_not_go_together(stores, three, tmp_path: Path) -> None:
    def with_noisy(**changes: Any) -> dict[str, Any]:
        return {**three, "noisy": {**three["noisy"], **changes}}

    sampled = str(Path(three["noisy"]["tokens"]).parent / "noisy_sampled")
    message = refused(stores, with_noisy(targets={"teacher": sampled}))
    words = ("curriculum.0.targets", "data.sources.noisy", "20 draws", "data.sources.novels", "log-probabilities")
    assert all(word in message for word in words), message
    assert "data.sources.noisy.targets.teacher" in refused(stores, with_noisy(targets=three["maths"]["targets"]))
    for field, value in (("tokenizer_digest", "b" * 64), ("vocab_size", 50)):
        folder = tmp_path / field
        tiny.write_store(folder, tiny.spec_of("tokens", num_rows=None, **{field: value}), tiny.token_rows(8))
        message = refused(stores, with_noisy(tokens=str(folder), targets={}), curriculum=[{}])
        assert f"data.sources.noisy.tokens has {field} {value}" in message and "data.sources.novels.tokens" in message
    message = refused({**stores, "heldout": Path(three["maths"]["tokens"])}, three)
    assert "the same rows of data.sources.maths.tokens" in message


def test_what_a_step_keeps_of_a_row_is_asked_of_its_own_source(stores, three) -> None:
    config = workers.config_of(tree_of(stores, Path("run"), three))
    maths = open_stores(config).sources[1].tokens
    [early, late] = (curriculum_step(config, maths, step=step, default=0) for step in (0, 7))
    [found] = row_figures([3], maths, at=early, student=None)
    assert found.kept is not None and found.kept.in_pool and found.kept.kd_weights is not None
    trained = maths.tokens_rows([3])[0].has_target()
    np.testing.assert_array_equal(found.kept.kd_weights > 0, trained)
    assert 0 < trained.sum() < len(trained) - 3
    assert (early.pool_size, late.pool_size) == (80, 40)
    novels = curriculum_step(config, open_stores(config).sources[0].tokens, step=7, default=0)
    assert not novels.has_in_pool(3) and late.has_in_pool(3)
    with pytest.raises(UserError, match=r"data.sources.noisy.tokens = .* has the digest"):
        curriculum_step(config, StoreReader(stores["heldout"]), step=0, default=0)


def test_held_out_figures_of_sources_and_of_all_their_rows(stores, three, start_weights: Path) -> None:
    tree = tree_of(stores, Path("run"), three)
    tree["data"] |= {"heldout": None, "heldout_targets": None}
    opened, _ = checked(tree)
    assert set(opened.source_heldout) == {"novels", "noisy"} and opened.heldout is None
    options: dict[str, Any] = {"max_rows": None, "batch_rows": 4, "rank": 0, "world_size": 1}
    parts = {
        name: HeldoutEvaluation.create(own.tokens, own.targets, device=torch.device("cpu"), **options)
        for name, own in opened.source_heldout.items()
    }
    model = load_student(find_source(start_weights), opened.sources[0].tokens)
    model.to("cpu")
    found = SourcesEvaluation(parts, None).measure(model)
    alone = {name: part.measure(model) for name, part in parts.items()}
    assert found["sources"] == alone and alone["noisy"]["agreement"] is None
    weights = [alone[name]["positions"] for name in parts]
    loss = np.average([alone[name]["heldout_loss"] for name in parts], weights=weights)
    assert found["heldout_loss"] == pytest.approx(loss) and found["rows"] == 11 + 5
    assert found["agreement"] == alone["novels"]["agreement"]
    assert f"noisy {alone['noisy']['heldout_loss']:.4f}" in evaluation_line(found)
    own_rows = {**three, "maths": {**three["maths"], "heldout": three["novels"]["tokens"]}}
    message = refused(stores, own_rows)
    assert "data.sources.maths.heldout" in message and "the same rows of data.sources.novels.tokens" in message


def test_a_dry_run_says_mix_and_passes(stores, three, tmp_path: Path) -> None:
    config = workers.config_of(tree_of(stores, tmp_path / "run", three))
    found = dry_run(check_start(config, num_ranks=1))
    assert {source.name: source.rows for source in found.sources} == {"novels": 8, "maths": 4 + 12, "noisy": 4 + 4}
    text = format_dry_run(found)
    assert "maths: 16 rows" in text and "0.667 passes over its 24 rows" in text
    assert "mix of rows: novels 50 %, maths 25 %, noisy 25 %" in text and "mix of rows: maths 75 %, noisy 25 %" in text
    read = {store.key: store.read_bytes for store in found.stores}
    assert read["data.sources.noisy.targets.teacher"] and "data.sources.maths.tokens" in read
