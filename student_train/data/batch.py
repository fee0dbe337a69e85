"""From loaded rows to the tensors of one micro-batch: ids, restarting positions, labels, targets, weights.

Legend: B rows in a micro-batch, L = tokens of its grid, N = its real tokens (rows shorter than L are padded for the
backbone, and their padding never reaches the head). L is the row length of the store, or less where no row is as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from potstill.kernels.types import IGNORE_LABEL, SparseTargetTensors
from potstill.storage import LoadedBatch, ScoresRow, TargetsRow, TokensRow
from potstill.student_train.config.weights import Weights
from potstill.student_train.curriculum.live_scores import LiveRow, LiveScores
from potstill.student_train.curriculum.step_objective import StepObjective, TokenChoice
from potstill.student_train.curriculum.token_selector import choose, known_active, known_weight_sum
from potstill.student_train.data.targets import row_targets
from potstill.student_train.data.unit_sums import UnitSums, unit_sums
from potstill.student_train.data.weights import token_factors

if TYPE_CHECKING:
    from potstill.student_train.model.term import LossTerm

JoinedRow = TargetsRow | ScoresRow
T = TypeVar("T")
GRID_STEP = 64  # a grid's length is a multiple: few shapes for the allocator of a GPU, whole tiles for its products


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward. There is never an attention mask: positions that restart keep documents apart.

    input_ids, position_ids int64 [B, L]; labels int64 [N] (-100: none); token_weights, kd_weights float32 [N] or None
    (all ones); token_index int64 [N] places of the real tokens in the B*L grid, or None when every row is full;
    row int64 [N] row of each token; columns: figures of stores for a choice that needs the student as well;
    extras: what loss terms take from the stores' rows, by names of their own;
    weight_sum: sum of the token weights, known before the forward; num_active: how many of them are not 0, where that
    is known as well (a GPU need not be asked then); source: int64 [N] number of the source of each token, None with one
    source; kd_weight_sum: sum of token weight times weight of row or document
    where such weights are of KD alone, else None: all KD weights are then divided by their mean over the global batch;
    unit_sums: where the mean of weights is taken over rows or documents, else None.

    Where the student's own figures choose positions, token_weights and kd_weights hold the weights of rows and
    documents, which the choice is multiplied by.
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
    kd_weight_sum: float | None = None
    source: Tensor | None = None
    unit_sums: UnitSums | None = None

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
    fixed_length: bool = False,
    live: LiveScores | None = None,
) -> list[MicroBatch]:
    """Cut this rank's rows into micro-batches, on the CPU, with what these loss terms take from the rows.

    live: the scores that the run has made itself, if weights are by them.
    fixed_length: lay every micro-batch out to row_length, for a compiled backbone; else to its longest row.
    """
    parts = [slice(first, first + micro_batch_rows) for first in range(0, len(batch.tokens), micro_batch_rows)]
    sizes: dict[str, Any] = {"row_length": row_length, "fixed_length": fixed_length}
    micros = [_micro_batch(batch, objective, part, live=live, **sizes) for part in parts]
    if not terms:
        return micros
    return [
        replace(micro, extras={name: value for term in terms for name, value in term.columns(batch, part).items()})
        for micro, part in zip(micros, parts, strict=True)
    ]


def grid_length(longest: int, row_length: int) -> int:
    """Tokens of a grid whose longest row has `longest`: a multiple of GRID_STEP, or the row length of the store."""
    return min(row_length, -(-longest // GRID_STEP) * GRID_STEP)


def _micro_batch(
    batch: LoadedBatch,
    objective: StepObjective,
    part: slice,
    *,
    row_length: int,
    fixed_length: bool,
    live: LiveScores | None,
) -> MicroBatch:
    rows = batch.tokens[part]
    lengths = [len(row.tokens) for row in rows]
    length = row_length if fixed_length else grid_length(max(lengths), row_length)
    input_ids = np.zeros((len(rows), length), np.int64)
    positions = np.empty_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, : lengths[number]] = row.tokens
        positions[number] = position_ids(row.doc_lens, length)
    labels = torch.from_numpy(np.concatenate([row.labels() for row in rows]))
    index = None
    if min(lengths) < length:
        grid = np.concatenate([np.arange(n) + number * length for number, n in enumerate(lengths)])
        index = torch.from_numpy(grid)
    num_labelled = int((labels != IGNORE_LABEL).sum())
    targets = None
    if objective.targets is not None:
        joined = cast("list[TargetsRow | None]", batch.joined[objective.targets][part])
        targets = row_targets(joined, lengths)
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
        source=None if batch.source is None else torch.from_numpy(np.repeat(batch.source[part], lengths)),
    )
    columns = {} if objective.tokens is None else _columns(objective.tokens, batch, part)
    choice, weights = objective.tokens, objective.weights
    if weights is None:
        return micro if choice is None else _chosen(micro, choice, columns)
    factors = token_factors(weights, rows, _figures(batch, weights, part, live))
    found = _weighed(micro, torch.from_numpy(factors), of_kd=weights.applies_to == "kd")
    found = found if choice is None else _chosen(found, choice, columns)
    if weights.mean_over == "positions":
        return found
    plain = micro if choice is None else _chosen(micro, choice, columns)
    return replace(found, unit_sums=unit_sums(rows, labels.numpy(), factors, of=weights.of, chosen=plain.weight_sum))


def _figures(
    batch: LoadedBatch, weights: Weights, part: slice, live: LiveScores | None
) -> Sequence[JoinedRow | LiveRow | None]:
    """What the rows are weighed by: of a store, or of the scores that the run has made itself."""
    if live is not None and live.name == weights.store:
        return live.of_rows(batch.rows[part])
    return batch.joined[weights.store][part]


def _weighed(micro: MicroBatch, factors: Tensor, *, of_kd: bool) -> MicroBatch:
    """The micro-batch with what its rows or documents count, factors float32 [N], at its labelled positions."""
    factors = torch.where(micro.labels != IGNORE_LABEL, factors, 0.0)
    total = float(factors.double().sum())
    if of_kd:
        return replace(micro, kd_weights=factors, kd_weight_sum=total)
    return replace(micro, token_weights=factors, weight_sum=total, num_active=int((factors != 0).sum()))


def _chosen(micro: MicroBatch, choice: TokenChoice, columns: dict[str, Tensor]) -> MicroBatch:
    """Weights from figures that are known now, or the columns for a choice inside the forward pass.

    What rows and documents count, if the micro-batch has such weights, is multiplied with the choice.
    """
    labelled = micro.labels != IGNORE_LABEL
    if choice.uses_student:
        micro = replace(micro, columns=columns)
        return micro if choice.selector.applies_to == "kd" else _known_sums(micro, choice, labelled)
    weights = choose(choice, columns, labelled=labelled, row=micro.row, num_rows=micro.num_rows)
    if choice.selector.applies_to == "kd":
        return replace(micro, kd_weights=weights if micro.kd_weights is None else weights * micro.kd_weights)
    if micro.token_weights is not None:
        weights = weights * micro.token_weights
    kd_weight_sum = micro.kd_weight_sum
    if micro.kd_weights is not None:
        kd_weight_sum = float((weights.double() * micro.kd_weights.double()).sum())
    return replace(
        micro,
        token_weights=weights,
        weight_sum=float(weights.double().sum()),
        num_active=int((weights != 0).sum()),
        kd_weight_sum=kd_weight_sum,
    )


def _known_sums(micro: MicroBatch, choice: TokenChoice, labelled: Tensor) -> MicroBatch:
    """The sums before the student has chosen; weights beside its choice are then of whole rows (config/stages.py)."""
    num_labelled = torch.bincount(micro.row[labelled], minlength=micro.num_rows).tolist()

    def of_rows(factors: Tensor | None) -> list[float] | None:
        if factors is None:
            return None
        return factors.new_zeros(micro.num_rows).scatter_reduce(0, micro.row, factors, "amax").tolist()

    weights, kd_weights = of_rows(micro.token_weights), of_rows(micro.kd_weights)
    counted = (
        num_labelled if weights is None else [n if w > 0 else 0 for n, w in zip(num_labelled, weights, strict=True)]
    )
    return replace(
        micro,
        weight_sum=known_weight_sum(choice, num_labelled, weights),
        num_active=known_active(choice, counted),
        kd_weight_sum=None if kd_weights is None else known_weight_sum(choice, num_labelled, kd_weights),
    )
