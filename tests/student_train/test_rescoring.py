"""Rows and documents scored by the student in training: by hand, at any number of ranks, and behind a resume."""

from __future__ import annotations

import pickle
import re
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.storage import Source, SourceRows, StoreReader
from potstill.student_train.config.answers import AnswersConfig
from potstill.student_train.config.rescoring import Rescoring
from potstill.student_train.curriculum.live_scores import LiveScores
from potstill.student_train.curriculum.plan import rows_digest
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.evaluation.drawn_answers import AnswerDrawing
from potstill.student_train.evaluation.row_figures import curriculum_step
from potstill.student_train.evaluation.written_answers import answer_writing, answers_of
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import StudentModel, build_student
from potstill.student_train.run.checkpoint import checkpoint_folder, list_checkpoints
from potstill.student_train.run.dry_run import dry_run
from potstill.student_train.run.engine import Topology
from potstill.student_train.run.live_scoring import RowScorer
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.preflight import check_run, check_start
from potstill.student_train.run.rescoring import FILE, figures_of, means_told, rescoring_decider, saved_scores
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_answers import answers as answers  # fixtures
from tests.student_train.test_answers import student as student
from tests.student_train.test_resume import cut_back

CPU = torch.device("cpu")
STEPS, EVERY, NUM_ROWS = 12, 4, 24
BY_ANSWER = {"of": "document", "store": "current", "column": "answer_probability", "form": "power", "a": 0.5}
BY_PASS_RATE = {**BY_ANSWER, "column": "pass_rate"}
BY_LOSS = {"score": {"of": [{"store": "current"}]}, "share": 0.5}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokens whose documents end in an answer of 1 or 2 tokens, but for the last of each row, and targets over them."""
    folder = tmp_path_factory.mktemp("masked")
    rows = []
    for row in tiny.token_rows(NUM_ROWS, seed=4):
        mask = np.zeros(len(row.tokens), bool)
        for number, end in enumerate(np.cumsum(row.doc_lens)[:-1]):
            mask[end - 1 - number : end] = True
        rows.append(replace(row, mask=mask))
    tokens = tiny.write_store(folder / "tokens", tiny.spec_of("tokens", num_rows=None, columns=("mask",)), rows)
    tiny.write_targets(folder / "teacher", tokens, rows, tiny.transition())
    return {name: folder / name for name in ("tokens", "teacher")}


def tree_of(masked: dict[str, Path], output: Path, **changes: Any) -> dict[str, Any]:
    """A run that ranks rows by their loss for two thirds, then weighs documents by the chance of their answer."""
    curriculum = [
        {"until": 8, "targets": "teacher", "rows": {**BY_LOSS, "segments": 2}},
        {"targets": "teacher", "weights": BY_ANSWER},
    ]
    data = {"tokens": str(masked["tokens"]), "targets": {"teacher": str(masked["teacher"])}}
    tree: dict[str, Any] = {
        "run": {"output_dir": str(output), "seed": 3, "max_steps": STEPS, "num_threads": 1},
        "model": {"config": dict(tiny.STUDENT)},
        "data": {**data, "global_batch_rows": 4, "micro_batch_rows": 2},
        "curriculum": curriculum,
        "optimizer": {"lr": 3e-3},
        "rescoring": {"every_steps": EVERY, "rows": "all", "batch_rows": 5},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
        "zero_stage": 1,
    }
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return tree


def told(run: Path) -> tuple[list[float], list[str], list[dict[str, Any]]]:
    """Loss and row digest of each step of a run, and its lines of rescoring without times."""
    records = read_metrics(run)
    train = [record for record in records if record["kind"] == "train"]
    scored = [record for record in records if record["kind"] == "rescoring"]
    return (
        [loss for record in train for loss in record["step_losses"]],
        [digest for record in train for digest in record["row_digests"]],
        [{key: value for key, value in record.items() if "seconds" not in key} for record in scored],
    )


def scores_at(run: Path, step: int) -> LiveScores:
    """The scores in the checkpoint behind `step` steps."""
    folder = checkpoint_folder(run, step)
    [checkpoint] = [found for found in list_checkpoints(run) if found.folder == folder]
    saved = checkpoint.manifest["decisions"]["rescoring"]
    return LiveScores.read(folder / FILE, name="current", step=saved["step"], sha256=saved["sha256"])


@pytest.fixture(scope="module")
def whole(masked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, on one rank."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(workers.train_run, tree_of(masked, run), world=1)
    return run


def test_rows_are_ranked_by_the_scores_of_their_step(masked, whole: Path, tmp_path: Path) -> None:
    losses, digests, lines = told(whole)
    assert len(losses) == STEPS
    assert [line["step"] for line in lines] == [0, 4, 8]
    num_answers = len(answers_of(StoreReader(masked["tokens"]).tokens_rows(range(NUM_ROWS))))
    assert all(line["rows"] == NUM_ROWS and line["documents"] == num_answers for line in lines)
    assert lines[0]["means"]["loss"] > lines[1]["means"]["loss"] > lines[2]["means"]["loss"]
    assert all(sum(counts) == num_answers for line in lines for counts in line["histograms"].values())
    config = workers.config_of(tree_of(masked, tmp_path / "other"))
    plain = build_plan(config, open_stores(config))
    pools = []
    for step in (2, 4):  # the checkpoint of step 4 holds what the steps from 4 on are trained by
        scores = scores_at(whole, step)
        assert scores.step == step // EVERY * EVERY
        mean_loss = scores.sums["loss"].reshape(NUM_ROWS, 3).sum(1) / scores.count.reshape(NUM_ROWS, 3).sum(1)
        pools.append(np.sort(np.argsort(-mean_loss, kind="stable")[: NUM_ROWS // 2]))
        plan = plain.with_scores(scores)
        drawn = np.concatenate([plan.rows(scores.step + number) for number in range(3)])
        assert sorted(drawn) == pools[-1].tolist(), "a pool of 12 rows is drawn once in three batches of 4"
        for number in range(scores.step, scores.step + EVERY):
            assert digests[number] == rows_digest(plan.rows(number))
    assert (pools[0] != pools[1]).any()
    assert pools[0].tolist() != list(range(NUM_ROWS // 2)), "the order before the first scoring"


def test_a_resumed_run_trains_as_if_not_stopped(masked, whole: Path, tmp_path: Path) -> None:
    """Between two scorings with the saved scores; on other ranks: test_decided_together.py."""
    run = cut_back(whole, tmp_path / "run", 6)
    run_ranks(workers.train_run, tree_of(masked, run), world=1)
    assert told(run) == told(whole)


def test_two_ranks_under_zero_3_score_and_draw_as_one_does(masked, tmp_path: Path) -> None:
    """With few answers that pass: a batch without any of them has no loss, which is told."""
    options = {
        "rescoring": {"measure": "generated", "rows": "upcoming", "generated": {"per_prompt": 3}},
        "curriculum": [{"targets": "teacher", "weights": BY_PASS_RATE}],
        "run": {"max_steps": 5},
        "zero_stage": 3,
        "spike_policy": "warn",
        # Every weight is cut over the ranks, as it is in a model of real size: whoever has no batch must gather too.
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    }
    found = []
    for world in (1, 2):
        run_ranks(workers.train_run, tree_of(masked, tmp_path / str(world), **options), world=world)
        found.append(told(tmp_path / str(world)))
    one, two = found
    assert one[1] == two[1]
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert one[2][0] == two[2][0], "the same weights, and so the same scores to the bit"
    assert [line["rows"] for line in one[2]] == [16, 4], "of the steps 0 to 3, and of the one that is left"
    assert 0 < one[2][0]["means"]["pass_rate"] < 0.5
    empty = sum(loss == 0 for loss in one[0])
    assert 0 < empty < 5
    [*_, last] = list_checkpoints(tmp_path / "2")
    judged = [loss for loss in two[0] if loss]
    assert last.manifest["loop"]["recent_losses"] == judged, "beside zeros every other loss would be a spike"
    records = [record for record in read_metrics(tmp_path / "2") if record["kind"] == "train"]
    assert sum(record.get("empty_steps", 0) for record in records) == empty


def test_documents_weigh_by_the_student_of_the_last_scoring(masked, tmp_path: Path) -> None:
    """From the weights before each step, document by document; the loader would have read three batches ahead."""
    options = {"curriculum": [{"targets": "teacher", "weights": BY_ANSWER}], "run": {"max_steps": 6}}
    tree = tree_of(masked, tmp_path / "run", **options, rescoring={"rows": "upcoming"}, data={"prefetch_batches": 3})
    [found] = run_ranks(workers.watched_run, tree, world=1)
    steps = pickle.loads(found)["steps"]
    config = workers.config_of(tree).model
    student = build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0)
    for number, (_, micros, _) in enumerate(steps):
        student.load_state_dict(steps[number // EVERY * EVERY][0])
        for micro in micros:
            np.testing.assert_allclose(micro.token_weights, weights_by_hand(student, micro), rtol=1e-3, atol=1e-7)
    student.load_state_dict(steps[0][0])
    stale, micro = weights_by_hand(student, steps[4][1][0]), steps[4][1][0]
    assert np.abs(stale - micro.token_weights.numpy()).sum() > 0.02 * stale.sum()


@torch.no_grad()
def weights_by_hand(student: StudentModel, micro: Any) -> np.ndarray:
    """Square root of the chance of each document's answer, at its labels, each document through the model alone."""
    ids, labels = micro.input_ids.flatten(), micro.labels
    starts = [*torch.nonzero(micro.position_ids.flatten() == 0)[:, 0].tolist(), len(ids)]
    found = np.zeros(len(ids))
    for first, last in pairwise(starts):
        logits = student.hf.lm_head(student.hf.model(ids[None, first:last], use_cache=False).last_hidden_state[0])
        here = labels[first:last]
        loss = torch.nn.functional.cross_entropy(logits, here, reduction="sum", ignore_index=-100)
        found[first:last] = np.where(here == -100, 0.0, float((-0.5 * loss).exp()))
    return found


def scorer_of(tokens: StoreReader, *, batch_rows: int, drawing: dict[str, Any] | None = None) -> RowScorer:
    """A scorer of one store, on this process alone."""
    options = Rescoring(every_steps=1, batch_rows=batch_rows, measure="forced" if drawing is None else "generated")
    answers = None
    if drawing is not None:
        writing = answer_writing(AnswersConfig(), end_ids=set(), decode=None, vocab_size=tiny.VOCAB)
        answers = AnswerDrawing(writing=writing, seed=5, device=CPU, row_length=tiny.ROW_LENGTH, **drawing)
    rows = SourceRows([Source("tokens", tokens, {})])
    return RowScorer(options, rows, tiny.ROW_LENGTH, Topology(0, 1, CPU), answers)


def test_answers_are_exact_and_passed_where_the_student_would_write_them(student, answers) -> None:
    """Of documents whose answers it wrote itself, in every second one with a token changed."""
    store, right = answers
    rows = np.arange(store.num_rows)
    sharp = deepcopy(student)  # the same choices, with more of the mass on them
    with torch.no_grad():
        sharp.hf.model.norm.weight.mul_(6.0)

    def scores(step: int = 7, rows: np.ndarray = rows, batch_rows: int = 4, **drawing: Any) -> LiveScores:
        drawing = {"per_prompt": 9, "temperature": 1.0, "batch": 700, **drawing}
        return scorer_of(store, batch_rows=batch_rows, drawing=drawing).score(sharp, rows, step=step)

    drawn = scores(per_prompt=300)
    known = drawn.count > 0
    assert known.tolist() == [True, True, False] * store.num_rows
    assert drawn.documents["exact"][known].tolist() == right
    assert np.isnan(drawn.more["pass_rate"][~known]).all()
    p, rates = (drawn.documents[name][known] for name in ("answer_probability", "pass_rate"))
    assert (abs(rates - p) < 4 * np.sqrt(p * (1 - p) / 300) + 1e-3).all(), (rates, p)
    assert 0.2 < rates.max() < 0.9
    cold = scores(per_prompt=2, temperature=0.001, batch=3)
    assert cold.more["pass_rate"][known].tolist() == right
    few, many = scores(rows=rows[2:4], batch_rows=1, batch=4), scores()
    np.testing.assert_array_equal(few.more["pass_rate"], many.more["pass_rate"][6:12])
    assert (scores(step=8).more["pass_rate"][known] != many.more["pass_rate"][known]).any(), "each scoring draws anew"


def test_statistics_of_rows_are_means_over_their_positions_and_documents(student, answers) -> None:
    store, right = answers
    scores = scorer_of(store, batch_rows=3).score(student, np.arange(1, store.num_rows), step=0)
    per_row = {name: values.reshape(-1, 3) for name, values in scores.sums.items()}
    count = scores.count.reshape(-1, 3)
    found = scores.statistics
    np.testing.assert_allclose(found["mean_loss"], per_row["loss"].sum(1) / count.sum(1), rtol=1e-6)
    np.testing.assert_allclose(found["mean_entropy"], per_row["entropy"].sum(1) / count.sum(1), rtol=1e-6)
    np.testing.assert_allclose(found["mean_exact"], np.reshape(right, (-1, 2))[1:].mean(1))
    assert found["num_targets"].tolist() == count.sum(1).tolist()
    assert scores.statistics_of(0, 3)["num_targets"].tolist() == [0, *found["num_targets"][:2]]
    [row] = scores.of_rows([2])
    assert row.stats["mean_loss"] == found["mean_loss"][1]
    with pytest.raises(UserError, match="row 0 has no scores of 'current': before step 0 4 rows were scored"):
        scores.of_rows([2, 0])


def test_rows_without_a_trained_position_have_no_means(whole: Path) -> None:
    scores = scores_at(whole, 8)
    options = Rescoring(every_steps=1)
    assert means_told(figures_of(scores, options)).startswith("loss ")
    nothing = figures_of(replace(scores, count=np.zeros_like(scores.count)), options)
    assert (nothing["documents"], nothing["means"]) == (0, {})
    assert means_told(nothing) == "none of them has a trained position"


def test_a_damaged_or_missing_file_of_scores_is_told(whole: Path, tmp_path: Path) -> None:
    path = checkpoint_folder(whole, 8) / FILE
    scores = scores_at(whole, 8)
    copy = tmp_path / FILE
    digest = scores.write(copy)
    assert copy.read_bytes() == path.read_bytes()
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"has the digest .* the checkpoint is damaged"):
        LiveScores.read(copy, name="current", step=8, sha256=digest)
    with pytest.raises(UserError, match="cannot be read"):
        LiveScores.read(tmp_path / "none.npz", name="current", step=8, sha256=digest)


RANKED = {"targets": "teacher", "rows": {**BY_LOSS, "segments": 3}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescoring": {"rows": "upcoming"}}, "set rescoring.rows: all"),
        ({"rescoring": {"name": "teacher"}}, "rescoring.name is 'teacher', which names a store already"),
        ({"rescoring": {"name": "now"}}, "no stage reads 'now'"),
        ({"rescoring": {"generated": {"per_prompt": 4}}}, "rescoring.generated is for measure generated"),
        ({"curriculum": [{"weights": BY_PASS_RATE}]}, r"no 'pass_rate' of a document \(rescoring.measure: generated\)"),
        (
            {"curriculum": [{"rows": {**BY_LOSS, "score": {"of": [{"store": "current", "stat": "gain"}]}}}]},
            "no row stat",
        ),
        (
            {"curriculum": [{"weights": {"of": "row", "store": "current", "column": "mean_loss", "form": "beta"}}]},
            "the mean_loss of a row may be up to 256 nats",
        ),
        (
            {
                "curriculum": [
                    {"until": 4, "weights": BY_ANSWER},
                    {"tokens": {"policy": "top_loss", "share": 0.5, "source": "current"}},
                ]
            },
            r"curriculum\.1\.tokens names 'current', .* source: student",
        ),
        ({"curriculum": [RANKED], "rescoring": {"every_steps": 6}}, "set curriculum.0.rows.segments: 2"),
        ({"curriculum": [RANKED], "rescoring": {"every_steps": 5}}, "every_steps: 4 and curriculum.0.rows.segments: 3"),
        ({"curriculum": [{"until": 2}, RANKED]}, "let the stage begin at a multiple of 4"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(masked, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_run(workers.config_of(tree_of(masked, tmp_path, **changes)), world_size=1)


def test_generated_answers_need_masks(stores, masked, tmp_path: Path) -> None:
    tree = tree_of({"tokens": stores["tokens"], "teacher": stores["teacher"]}, tmp_path)
    tree["rescoring"]["measure"] = "generated"
    with pytest.raises(UserError, match="has no masks that say which tokens are prompts"):
        check_run(workers.config_of(tree), world_size=1)


def test_a_run_that_was_made_longer_scores_the_rows_that_come(masked, whole: Path, tmp_path: Path) -> None:
    """Its rows were scored up to its old end, step 6, only."""
    options = {"curriculum": [{"targets": "teacher", "weights": BY_ANSWER}], "rescoring": {"rows": "upcoming"}}
    config = workers.config_of(tree_of(masked, tmp_path / "run", **options, run={"max_steps": 9}))
    checked = check_run(config, world_size=1)
    decider = rescoring_decider(config, checked)
    assert decider is not None
    [saved] = [one.manifest["decisions"]["rescoring"] for one in list_checkpoints(whole) if one.step == 4]
    decider.read(checkpoint_folder(whole, 4), {**saved, "until": 6})
    assert decider.decided_step == 4
    assert [decider.next_step(step) for step in range(4, 9)] == [4, 6, 6, 8, 8]
    assert decider.next_step(9) is None
    wanted = np.unique([checked.plan.rows(step) for step in (6, 7)])
    assert decider.rows_to_score(checked.plan, 6).tolist() == wanted.tolist()


def test_rows_are_scored_where_a_stage_begins_to_read_them(masked, whole: Path, tmp_path: Path) -> None:
    """Not by the student of the multiple before, who knew nothing of what the stage before taught it."""
    stages = [{"until": 2}, {"until": 5, "weights": BY_ANSWER}, {"until": 7}, {"weights": BY_ANSWER}]
    config = workers.config_of(tree_of(masked, tmp_path / "run", curriculum=stages, rescoring={"rows": "upcoming"}))
    checked = check_run(config, world_size=1)
    decider = rescoring_decider(config, checked)
    assert decider is not None
    assert [decider.next_step(step) for step in range(12)] == [2, 2, 2, 4, 4, 7, 7, 7, 8, None, None, None]
    counts = {2: 8, 4: 4, 7: 4, 8: 16}
    assert {step: len(decider.rows_to_score(checked.plan, step)) for step in counts} == counts
    taken = [found for found in list_checkpoints(whole) if found.step in (4, 6)]
    first, second = (found.manifest["decisions"]["rescoring"] for found in taken)
    first |= {"step": 4, "until": 5}
    second |= {"step": 7, "until": 8}
    found = [saved_scores(config, taken, step) for step in range(3, 9)]
    assert [None if scores is None else scores.step for scores in found] == [None, 4, None, None, 7, None]


def test_a_beginning_from_which_nothing_follows_is_refused(masked, whole: Path, tmp_path: Path, caplog) -> None:
    options = {"curriculum": [{"targets": "teacher", "weights": {**BY_ANSWER, "column": "exact"}}]}
    config = workers.config_of(tree_of(masked, tmp_path / "run", **options))
    decider = rescoring_decider(config, check_run(config, world_size=1))
    assert decider is not None
    scores = scores_at(whole, 4)
    decider.scores = replace(scores, sums={**scores.sums, "rank": np.zeros_like(scores.sums["rank"])})
    with pytest.raises(UserError, match=r"all that was scored weighs 0, .* is 0 at most; let a stage without weights"):
        decider._check_weights(0, is_first=True)
    decider._check_weights(4, is_first=False)
    assert "rescoring before step 4: all that was scored weighs 0, so there is nothing to train on" in caplog.text
    # Weights of KD alone leave the labels.
    options["curriculum"][0]["weights"]["applies_to"] = "kd"
    config = workers.config_of(tree_of(masked, tmp_path / "run", **options))
    of_kd = rescoring_decider(config, check_run(config, world_size=1))
    assert of_kd is not None
    of_kd.scores = decider.scores
    of_kd._check_weights(0, is_first=True)
    assert "rescoring before step 0: all that was scored weighs 0, so there is no KD up to step 4" in caplog.text


@pytest.mark.parametrize("kind", ["stat", "rank_fusion"])
def test_ties_are_refused_the_first_time_and_told_later(masked, whole: Path, tmp_path: Path, caplog, kind: str) -> None:
    """A run that stopped at a later scoring could not be continued: by what rows are ranked is pinned."""
    stages = deepcopy(tree_of(masked, tmp_path)["curriculum"])
    if kind == "rank_fusion":
        of = [{"store": "current"}, {"store": "current", "stat": "mean_entropy"}]
        stages[0]["rows"]["score"] = {"kind": kind, "of": of}
    config = workers.config_of(tree_of(masked, tmp_path / "run", curriculum=stages))
    checked = check_run(config, world_size=1)
    decider = rescoring_decider(config, checked)
    assert decider is not None
    scores = scores_at(whole, 4)
    decider.scores = scores
    decider._check_ties(checked.plan, 0, is_first=True, is_main=True)
    assert not caplog.records, "no two rows are alike"
    loss = np.where(np.repeat(np.arange(NUM_ROWS) < 20, 3), 2 * scores.count, scores.sums["loss"]).astype(np.float32)
    decider.scores = replace(scores, sums={**scores.sums, "loss": loss})
    said = {"stat": r"20 of 24 rows \(83%\) have the score 2", "rank_fusion": r"'mean_loss' .* is 2 in 20 of 24 rows"}
    with pytest.raises(UserError, match=rf"rescoring before step 0: curriculum\.0\.rows.*{said[kind]}"):
        decider._check_ties(checked.plan, 0, is_first=True, is_main=True)
    decider._check_ties(checked.plan, 4, is_first=False, is_main=False)
    assert not caplog.records, "one rank tells it"
    decider._check_ties(checked.plan, 4, is_first=False, is_main=True)
    [record] = caplog.records
    assert re.search(rf"rescoring before step 4: row ids decide, .*{said[kind]}", record.getMessage())
    plan = decider.in_plan(checked.plan)
    if kind == "stat":
        mean_loss = decider.scores.statistics["mean_loss"]
        drawn = np.concatenate([plan.rows(step) for step in (4, 5, 6)])
        assert sorted(drawn) == sorted(np.argsort(-mean_loss, kind="stable")[: NUM_ROWS // 2])
        decider._check_ties(checked.plan, 8, is_first=True, is_main=True)  # weighs, and ranks no rows
    assert plan.identity() == checked.plan.identity()


def test_another_rescoring_is_another_run(masked, whole: Path) -> None:
    for changes in ({"every_steps": 8}, {"batch_rows": 4}):
        other = tree_of(masked, whole, rescoring=changes)
        other["curriculum"][0]["rows"]["segments"] = 8 // other["rescoring"]["every_steps"]
        with pytest.raises(UserError, match="rescoring: the checkpoint has"):
            check_start(workers.config_of(other), num_ranks=1)


def test_what_a_start_would_cost_and_what_a_step_weighed_are_told(masked, whole: Path, tmp_path: Path) -> None:
    drawn = {"rescoring": {"rows": "upcoming", "measure": "generated"}, "curriculum": [{"weights": BY_PASS_RATE}]}
    notes = dry_run(check_start(workers.config_of(tree_of(masked, tmp_path / "run", **drawn)), num_ranks=1)).notes
    for words in ("3 times, every 4 steps, at most 16 rows each; 12 forwards of 5 rows in all", "8 answers of each"):
        assert words in notes[-1]
    config, tokens = workers.config_of(tree_of(masked, whole)), StoreReader(masked["tokens"])
    at = curriculum_step(config, tokens, step=9, default=0, checkpoints=list_checkpoints(whole))
    scores, micro = scores_at(whole, 8), at.micro_batch(5)
    document = np.repeat(np.arange(3), tokens.tokens_rows([5])[0].doc_lens)
    chance = np.exp(-0.5 * scores.sums["loss"].reshape(NUM_ROWS, 3)[5])[document]
    np.testing.assert_allclose(micro.token_weights, np.where(micro.labels == -100, 0, chance), rtol=1e-5)
    with pytest.raises(UserError, match="no checkpoint holds those of this step"):
        curriculum_step(config, tokens, step=9, default=0)


def test_of_several_sources_those_are_scored_that_the_stage_draws_from(stores, masked, student, tmp_path: Path) -> None:
    """Rows are named over all sources, and ranked within the one that is drawn from."""
    tree = tree_of(masked, tmp_path / "run", run={"max_steps": 8})
    ends = {"other": str(stores["tokens"]), "answers": str(masked["tokens"])}
    tree["data"] = {"sources": {name: {"tokens": place} for name, place in ends.items()}, "global_batch_rows": 4}
    tree["curriculum"] = [{"until": 4}, {"mix": {"answers": 1}, "rows": {**BY_LOSS, "segments": 1}}]
    config = workers.config_of(tree)
    checked = check_run(config, world_size=1)
    decider = rescoring_decider(config, checked)
    assert decider is not None
    assert [decider.next_step(step) for step in (0, 5)] == [4, None], "no stage reads them before step 4"
    rows = decider.rows_to_score(checked.plan, 4)
    first = StoreReader(stores["tokens"]).num_rows
    assert rows.tolist() == list(range(first, first + NUM_ROWS))
    scorer = RowScorer(decider.options, SourceRows(checked.stores.sources), tiny.ROW_LENGTH, Topology(0, 1, CPU))
    scores = scorer.score(student, rows, step=4)
    plan = checked.plan.with_scores(scores)
    best = np.argsort(-scores.statistics["mean_loss"], kind="stable")[: NUM_ROWS // 2] + first
    drawn = np.concatenate([plan.rows(step) for step in range(4, 7)])
    assert sorted(drawn) == sorted(best)
    assert plan.identity() == checked.plan.identity(), "a checkpoint is told by the rule, not by what it came to"
    alone = scorer_of(StoreReader(masked["tokens"]), batch_rows=5).score(student, np.arange(NUM_ROWS), step=4)
    for name, values in alone.sums.items():
        np.testing.assert_array_equal(values, scores.sums[name])
