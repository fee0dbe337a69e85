"""From loaded rows to the tensors of one micro-batch: ids, restarting positions, labels, targets, weights.

Legend: B rows of length L in a micro-batch, N = their real tokens (rows shorter than L are padded for the backbone,
and their padding never reaches the head).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from potstill.kernels.types import IGNORE_LABEL, SparseTargetTensors
from potstill.storage import LoadedBatch, ScoresRow, TargetsRow, TokensRow, alike, concatenate
from potstill.student_train.curriculum.step_objective import StepObjective, TokenChoice
from potstill.student_train.curriculum.token_selector import choose, known_active, known_weight_sum

if TYPE_CHECKING:
    from potstill.student_train.model.term import LossTerm

JoinedRow = TargetsRow | ScoresRow
T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward. There is never an attention mask: positions that restart keep documents apart.

    input_ids, position_ids int64 [B, L]; labels int64 [N] (-100: none); token_weights, kd_weights float32 [N] or None
    (all ones); token_index int64 [N] places of the real tokens in the B*L grid, or None when every row is full;
    row int64 [N] row of each token; columns: figures of stores for a choice that needs the student as well;
    extras: what loss terms take from the stores' rows, by names of their own;
    weight_sum: sum of the token weights, known before the forward; num_active: how many of them are not 0, where that
    is known as well (a GPU need not be asked then).
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    targets: SparseTargetTensors | None
    token_weights: Tensor | None
    kd_weights: Tensor | None
    token_index: Tensor | None
    row: Tensor
    columns: Mapping[str, Tensor]
    extras: Mapping[str, Tensor]
    weight_sum: float
    num_active: int | None

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> MicroBatch:
        """A copy on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | SparseTargetTensors)
        }
        for name in ("columns", "extras"):
            moved[name] = {n: c.to(device, non_blocking=True) for n, c in getattr(self, name).items()}
        return replace(self, **moved)


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """`value` with `function` of every tensor in it, also inside of dataclasses and mappings; all else as it is."""
    found: Any = value
    if isinstance(value, Tensor):
        found = function(value)
    elif isinstance(value, Mapping):
        found = {key: map_tensors(item, function) for key, item in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: map_tensors(getattr(value, field.name), function) for field in fields(value)}
        found = replace(value, **changes)
    return cast("T", found)


def position_ids(doc_lens: np.ndarray, length: int) -> np.ndarray:
    """0, 1, 2, ... from each document's first token; padding behind them is a document of its own. [length]"""
    lens = np.append(doc_lens, length - doc_lens.sum()).astype(np.int64)
    starts = np.repeat(np.cumsum(lens) - lens, lens)
    return np.arange(length, dtype=np.int64) - starts


def _random_key(row: TokensRow) -> np.ndarray:
    """Uniform numbers in [0, 1) per position, a function of the row id alone. [n]"""
    return np.random.Generator(np.random.Philox(key=row.row)).random(len(row.tokens))


def store_columns(rows: Sequence[JoinedRow], prefix: str = "") -> dict[str, np.ndarray]:
    """loss, rank and entropy [N] of a store's rows."""
    sides = [row.targets if isinstance(row, TargetsRow) else row for row in rows]
    found: dict[str, np.ndarray] = {}
    for column, attribute, sign in (
        ("loss", "label_logprob", -1),
        ("rank", "label_rank", 1),
        ("entropy", "entropy", 1),
    ):
        values = [getattr(side, attribute) for side in sides]
        if all(value is not None for value in values):
            found[prefix + column] = sign * np.concatenate(values)
    return found


def _columns(choice: TokenChoice, batch: LoadedBatch, part: slice) -> dict[str, Tensor]:
    """What the stores know for a choice; the student's own figures are added inside the forward pass."""
    selector, columns = choice.selector, {}
    needs = selector.entry.needs
    if "key" in needs:
        columns["key"] = np.concatenate([_random_key(row) for row in batch.tokens[part]])
    if selector.entry.needs_source and selector.source != "student":
        columns |= store_columns(cast("Sequence[JoinedRow]", batch.joined[selector.source][part]))
    if selector.reference is not None:
        columns |= store_columns(cast("Sequence[JoinedRow]", batch.joined[selector.reference][part]), "reference_")
    return {name: torch.from_numpy(np.ascontiguousarray(columns[name])) for name in needs if name in columns}


def collate(
    batch: LoadedBatch,
    objective: StepObjective,
    *,
    micro_batch_rows: int,
    row_length: int,
    terms: Sequence[LossTerm] = (),
) -> list[MicroBatch]:
    """Cut this rank's rows into micro-batches, on the CPU, with what these loss terms take from the rows."""
    parts = [slice(first, first + micro_batch_rows) for first in range(0, len(batch.tokens), micro_batch_rows)]
    micros = [_micro_batch(batch, objective, part, row_length) for part in parts]
    if not terms:
        return micros
    return [
        replace(micro, extras={name: value for term in terms for name, value in term.columns(batch, part).items()})
        for micro, part in zip(micros, parts, strict=True)
    ]


def _micro_batch(batch: LoadedBatch, objective: StepObjective, part: slice, row_length: int) -> MicroBatch:
    rows = batch.tokens[part]
    lengths = [len(row.tokens) for row in rows]
    input_ids = np.zeros((len(rows), row_length), np.int64)
    positions = np.empty_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : lengths[number]] = row.tokens
        positions[number] = position_ids(row.doc_lens, row_length)
    labels = torch.from_numpy(np.concatenate([row.labels() for row in rows]))
    index = None
    if min(lengths) < row_length:
        grid = np.concatenate([np.arange(n) + number * row_length for number, n in enumerate(lengths)])
        index = torch.from_numpy(grid)
    num_labelled = int((labels != IGNORE_LABEL).sum())
    targets = None
    if objective.targets is not None:
        parts = [cast(TargetsRow, row).targets for row in batch.joined[objective.targets][part]]
        # Teachers of several sources need not have stored the same; what the stage needs was checked at the start.
        targets = SparseTargetTensors.from_arrays(concatenate(parts if batch.source is None else alike(parts)))
    micro = MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        labels=labels,
        targets=targets,
        token_weights=None,
        kd_weights=None,
        token_index=index,
        row=torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)),
        columns={},
        extras={},
        weight_sum=float(num_labelled),
        num_active=num_labelled,
    )
    return (
        micro if objective.tokens is None else _chosen(micro, objective.tokens, _columns(objective.tokens, batch, part))
    )


def _chosen(micro: MicroBatch, choice: TokenChoice, columns: dict[str, Tensor]) -> MicroBatch:
    """Weights from figures that are known now, or the columns for a choice inside the forward pass."""
    labelled = micro.labels != IGNORE_LABEL
    if choice.uses_student:
        if choice.selector.applies_to == "kd":
            return replace(micro, columns=columns)
        counts = torch.bincount(micro.row[labelled], minlength=micro.num_rows)
        num_labelled = counts.tolist()
        return replace(
            micro,
            columns=columns,
            weight_sum=known_weight_sum(choice, num_labelled),
            num_active=known_active(choice, num_labelled),
        )
    weights = choose(choice, columns, labelled=labelled, row=micro.row, num_rows=micro.num_rows)
    if choice.selector.applies_to == "kd":
        return replace(micro, kd_weights=weights)
    return replace(
        micro,
        token_weights=weights,
        weight_sum=float(weights.double().sum()),
        num_active=int((weights != 0).sum()),
    )
