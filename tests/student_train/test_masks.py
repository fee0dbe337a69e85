"""Masks, short rows, rows without a teacher: what is not trained on, and padding, has no part in loss and gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from potstill.common.errors import UserError
from potstill.storage import LoadedBatch, SparseTargets, StoreReader, TargetsRow, TokensRow
from potstill.student_train.config.stages import Objective, Stage
from potstill.student_train.curriculum.step_objective import StepObjective, step_objective
from potstill.student_train.data.batch import GRID_STEP, MicroBatch, collate
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.data.targets import row_targets
from potstill.student_train.evaluation.bits_per_byte import _written_bytes
from potstill.student_train.evaluation.heldout import HeldoutEvaluation, SourcesEvaluation, heldout_figures
from potstill.student_train.evaluation.samples import _before_the_answer
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import StudentModel, TrainRequest, build_student
from potstill.student_train.run.loop import check_due
from potstill.student_train.run.run_parts import SelfChecks
from tests.common.test_packed import NAME, by_contract
from tests.storage.stores import kept_only
from tests.student_train import tiny, workers

LENGTH = 3 * GRID_STEP  # of a row in these tests
TABLE = tiny.transition()


@pytest.fixture(scope="module")
def student(start_weights: Path) -> StudentModel:
    tree = {"run": {"output_dir": "x", "max_steps": 1}, "model": {"path": str(start_weights)}}
    config = workers.config_of({**tree, "data": {"tokens": "x", "global_batch_rows": 1}}).model
    return build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0).double()


def row_of(number: int, *doc_lens: int, masked: Sequence[int] | None = None, seed: int = 0) -> TokensRow:
    """A row of documents of these lengths; `masked`: tokens that are not trained on."""
    rng = np.random.default_rng(seed + number)
    tokens = rng.integers(tiny.VOCAB, size=sum(doc_lens)).astype(np.int32)
    mask = None
    if masked is not None:
        mask = np.ones(len(tokens), bool)
        mask[list(masked)] = False
    return TokensRow(number, tokens, np.array(doc_lens, np.int32), mask)


def stage_objective(**stage: Any) -> StepObjective:
    return step_objective(Objective(), Stage.model_validate({"targets": "teacher", "alpha": 0.6, **stage}), 0.0)


def everywhere(row: TokensRow, table: np.ndarray = TABLE) -> TargetsRow:
    """Targets of a teacher that does not know of the mask."""
    return tiny.targets_row(replace(row, mask=None), table, temperatures=(2.0,))


def loaded(rows: Sequence[TokensRow], targets: Sequence[TargetsRow | None] | None = None) -> LoadedBatch:
    found = [everywhere(row) for row in rows] if targets is None else list(targets)
    return LoadedBatch(0, np.array([row.row for row in rows]), list(rows), {"teacher": found})


def micro_of(batch: LoadedBatch, objective: StepObjective, *, fixed: bool = False) -> MicroBatch:
    sizes = {"micro_batch_rows": len(batch.tokens), "row_length": LENGTH}
    return collate(batch, objective, **sizes, fixed_length=fixed)[0]


def outcome(student: StudentModel, micro: MicroBatch, objective: StepObjective) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of all weights as one vector."""
    student.zero_grad()
    loss, _ = student(TrainRequest(micro, objective, torch.tensor(10.0), 1))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def with_other_targets(row: TokensRow) -> TargetsRow:
    """Targets as ever where the row trains, and those of another teacher elsewhere."""
    ours, theirs = (everywhere(row, table) for table in (TABLE, tiny.transition(9)))
    kept = np.repeat(row.has_target(), np.diff(ours.targets.offsets))
    columns = dict(ours.targets.columns)
    for name in ("ids", "logprobs"):
        columns[name] = np.where(kept, getattr(ours.targets, name), getattr(theirs.targets, name))
        assert (columns[name] != getattr(ours.targets, name)).any()
    return replace(ours, targets=SparseTargets(offsets=ours.targets.offsets, columns=columns))


def test_labels_and_targets_under_a_mask_have_no_part_in_loss_or_gradient(student: StudentModel) -> None:
    """Targets at masked positions may be any, and masked tokens at the end of a document, which nothing attends to."""
    rows = [row_of(0, 20, 30, masked=[*range(1, 5), 18, 19, *range(45, 50)]), row_of(1, 40, masked=range(25, 40))]
    others = []
    for row, ends in zip(rows, ([18, 19, *range(45, 50)], range(25, 40)), strict=True):
        tokens = row.tokens.copy()
        tokens[list(ends)] = (tokens[list(ends)] + 7) % tiny.VOCAB
        others.append(replace(row, tokens=tokens))
    objective = stage_objective(off_kd="ce")
    plain = micro_of(loaded(rows), objective)
    loss, grad = outcome(student, plain, objective)
    targets = [with_other_targets(row) for row in others]
    again, again_grad = outcome(student, micro_of(loaded(others, targets), objective), objective)
    assert torch.equal(loss, again) and torch.equal(grad, again_grad) and bool(grad.any())
    assert plain.weight_sum == float(sum(row.has_target().sum() for row in rows)) == plain.num_active
    free = micro_of(loaded([replace(row, mask=None) for row in others], targets), objective)
    assert not torch.allclose(outcome(student, free, objective)[0], loss), "the test could not see the mask"


def test_padding_changes_neither_loss_nor_gradient(student: StudentModel) -> None:
    rows = [row_of(0, 30, 20), row_of(1, 17), row_of(2, 60)]
    objective = stage_objective(tokens={"policy": "top_entropy", "share": 0.5})
    short, whole = micro_of(loaded(rows), objective), micro_of(loaded(rows), objective, fixed=True)
    assert short.input_ids.shape == (3, GRID_STEP) and whole.input_ids.shape == (3, LENGTH)
    found, wanted = outcome(student, short, objective), outcome(student, whole, objective)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
    # A full row: the micro-batch is as it was before grids followed their rows.
    full = [row_of(3, LENGTH), rows[1]]
    for micro in (micro_of(loaded(full), objective), micro_of(loaded(full), objective, fixed=True)):
        assert micro.input_ids.shape == (2, LENGTH)
    longer = micro_of(loaded([row_of(0, GRID_STEP + 1)]), objective)
    assert longer.input_ids.shape == (1, 2 * GRID_STEP)


def test_an_attention_of_one_line_gets_no_padding(student: StudentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the contract of flash attention (tests/common): rows and documents stay apart, and only real tokens go in."""
    rows = [row_of(0, 30, 20), row_of(1, 17), row_of(2, 60)]
    objective = stage_objective()
    micro = micro_of(loaded(rows), objective)
    wanted = outcome(student, micro, objective)
    AttentionInterface.register(NAME, by_contract)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    monkeypatch.setattr(student.hf.config, "_attn_implementation_internal", NAME)
    seen: list[torch.Size] = []
    backbone = student.hf.model
    hook = backbone.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    try:
        found = outcome(student, micro, objective)
        monkeypatch.setattr(student, "_fixed_shapes", True)
        again = outcome(student, micro, objective)
    finally:
        hook.remove()
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)
    assert seen == [(1, 50 + 17 + 60), (1, 3 * GRID_STEP)], "a compiled backbone keeps its shape"
    for other in (found, again):
        torch.testing.assert_close(other, wanted, rtol=1e-10, atol=1e-12)


def test_a_micro_batch_without_a_trained_position_gives_nothing(student: StudentModel) -> None:
    rows = [row_of(0, 12, masked=range(12)), row_of(1, 3, masked=[1, 2])]
    for stage in ({}, {"tokens": {"policy": "top_loss", "share": 0.3}}, {"tokens": {"policy": "paced"}}):
        objective = stage_objective(**stage)
        micro = micro_of(loaded(rows), objective)
        assert micro.weight_sum == 0.0
        loss, grad = outcome(student, micro, objective)
        assert float(loss) == 0.0 and not grad.any()


def test_the_first_micro_batch_of_a_stage_is_not_checked_where_it_trains_nothing(stores: dict[str, Path]) -> None:
    """Compared with float64 is one that has something to compare; else the stage would never be looked at."""
    config = workers.config_of(tiny.config_tree(stores, Path("run")))
    plan = build_plan(config, open_stores(config))
    run: Any = SimpleNamespace(self_checks=SelfChecks(wanted=True), plan=plan, state=SimpleNamespace(step=0))
    objective = stage_objective()
    empty, real = (micro_of(loaded([row_of(0, 12, masked=masked)]), objective) for masked in (range(12), [3]))
    batch: Any = SimpleNamespace(objective=objective)
    assert [check_due(run, micro, batch) for micro in (empty, real, real)] == [False, True, False]


def test_shares_of_rows_count_trained_positions_alone(student: StudentModel) -> None:
    rows = [row_of(0, 20, masked=range(10)), row_of(1, 30)]
    objective = stage_objective(tokens={"policy": "top_entropy", "share": 0.5})
    micro = micro_of(loaded(rows), objective)
    hidden = student.hidden_states(micro)
    weights, _ = student.hf.lm_head.choice(hidden, micro, objective)
    assert weights[:20].sum() == 5 and weights[20:].sum() == 15 and micro.weight_sum == 20.0
    assert not weights[micro.labels == -100].any()


def test_a_row_of_a_source_without_a_teacher_has_labels_alone(student: StudentModel) -> None:
    """None in the place of a row's targets; with off_kd: ce its labels count fully."""
    rows = [row_of(0, 20), row_of(1, 30)]
    known = tiny.targets_row(rows[0], TABLE, temperatures=(2.0,))
    objective = stage_objective(off_kd="ce", alpha=0.75)
    both = micro_of(loaded(rows, [known, None]), objective)
    assert both.targets is not None and both.targets.offsets.diff()[20:].sum() == 0
    sums = student(TrainRequest(both, objective, torch.tensor(1.0), 1))[1]
    counted = dict(zip(student.sum_names, sums.tolist(), strict=True))
    assert (counted["positions"], counted["kd_positions"]) == (19 + 29, 19), "no KD where there is no target"
    apart = [micro_of(loaded([row], [own]), objective) for row, own in zip(rows, [known, None], strict=True)]
    assert apart[1].targets is None
    found, wanted = outcome(student, both, objective), [outcome(student, micro, objective) for micro in apart]
    torch.testing.assert_close(found[0], wanted[0][0] + wanted[1][0], rtol=1e-10, atol=0)
    torch.testing.assert_close(found[1], wanted[0][1] + wanted[1][1], rtol=1e-9, atol=1e-12)
    plain = step_objective(Objective(), Stage.model_validate({}), 0.0)
    torch.testing.assert_close(wanted[1], outcome(student, micro_of(loaded(rows[1:]), plain), plain))


def test_rows_of_several_stores_have_what_all_of_them_hold() -> None:
    rows = [row_of(0, 9), row_of(1, 7)]
    first, second = (
        tiny.targets_row(r, TABLE, temperatures=t) for r, t in zip(rows, [(2.0, 3.0), (2.0,)], strict=True)
    )
    columns = {name: values for name, values in second.targets.columns.items() if name != "entropy"}
    bare = replace(second, targets=SparseTargets(offsets=second.targets.offsets, columns=columns))
    joined = row_targets([first, bare], [9, 7])
    assert joined is not None and set(joined.log_tail_at) == {2.0} and joined.num_tokens == 16
    alone = row_targets([first], [9])
    assert alone is not None and set(alone.log_tail_at) == {2.0, 3.0}
    assert row_targets([None, None], [9, 7]) is None


def test_held_out_rows_without_a_trained_position_are_refused() -> None:
    with pytest.raises(UserError, match="2 held-out rows have no trained position"):
        heldout_figures({"label_weight": 0.0}, 2)


def test_held_out_targets_that_do_not_know_their_tail_have_no_kl(
    stores: dict[str, Path], student: StudentModel, tmp_path: Path
) -> None:
    """Relative to the kept entries, the figure would be another one under the same name."""
    tokens, whole = (StoreReader(stores[name]) for name in ("heldout", "heldout_teacher"))
    spec = replace(whole.spec, normaliser="kept", temperatures=(), stats=())
    made = tokens.tokens_rows(range(tokens.num_rows))
    rows = [tiny.targets_row(row, TABLE, temperatures=()) for row in made]
    kept = tiny.write_store(
        tmp_path / "kept", spec, [replace(row, targets=kept_only(row.targets), stats={}) for row in rows]
    )
    options: dict[str, Any] = {"max_rows": None, "batch_rows": 4, "rank": 0, "world_size": 1}
    parts = {
        name: HeldoutEvaluation.create(tokens, targets, device=torch.device("cpu"), **options)
        for name, targets in (("whole", whole), ("kept", kept))
    }
    found = SourcesEvaluation(parts, None).measure(student)
    of_whole, of_kept = found["sources"]["whole"], found["sources"]["kept"]
    assert of_whole["teacher_kl"] > 0 and of_kept["teacher_kl"] is None and found["teacher_kl"] is None
    assert of_kept["agreement"] == of_whole["agreement"] and of_kept["heldout_loss"] == of_whole["heldout_loss"]


def test_a_prompt_is_what_comes_before_the_first_trained_token() -> None:
    row = row_of(0, 5, 8, masked=[*range(5), 5, 6, 7])
    first, last = _before_the_answer(row) or (0, 0)
    assert (first, last) == (5, 8) and row.mask is not None and row.mask[last]
    assert _before_the_answer(row_of(0, 5, masked=range(5))) is None


class Letters:
    """A tokenizer whose token n is n + 1 letters."""

    def decode(self, ids: Sequence[int], **options: bool) -> str:
        return "".join("x" * (token + 1) for token in ids)


def test_bytes_are_those_of_the_trained_tokens() -> None:
    row = row_of(0, 6, 3, masked=[1, 4, 5, 6])
    trained = [2, 3, 7, 8]
    assert _written_bytes(row, Letters()) == sum(int(row.tokens[t]) + 1 for t in trained)
    plain = replace(row, mask=None)
    assert _written_bytes(plain, Letters()) == sum(int(row.tokens[t]) + 1 for t in (1, 2, 3, 4, 5, 7, 8))
