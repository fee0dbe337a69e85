"""Packed rows as tensors for a training loop of one's own: ids, restarting positions, labels, targets, one grid.

The loop of `potstill train` has its own form (batch.py), which leaves padding out before the head; here everything
lies on the grid [B, L] of the rows, which is easier to work with, and what has no label costs nothing in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.common.packed import as_lines
from potstill.kernels.types import IGNORE_LABEL, SparseTargetTensors
from potstill.storage import JoinedRow, StoreError, TargetsRow, TokensRow, concatenate


@dataclass(frozen=True)
class PackedBatch:
    """B packed rows of L positions. There is never an attention mask: positions that restart keep documents apart.

    input_ids int64 [B, L] (0 at padding); position_ids int64 [B, L], from 0 in each document (padding counts as one);
    labels int64 [B, L], the next token of the same document, -100 at a document's last token and at padding;
    targets: the teacher's distributions of the B * L positions, row by row, or None; num_labels: labels that are not
    -100, known without asking the device.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    targets: SparseTargetTensors | None
    num_labels: int

    @property
    def token_weights(self) -> Tensor:
        """float32 [B * L] for the loss: 1 where there is a label, else 0 (such positions cost nothing there)."""
        return (self.labels.flatten() != IGNORE_LABEL).float()

    def model_inputs(self, config: Any) -> dict[str, Any]:
        """Arguments of a transformers model of this `config`, such that attention stays inside each document.

        Without a cache (with one, positions that restart would be ignored), and as one line [1, B * L] where the
        attention needs that to tell documents apart (flash attention). Flatten what comes out: `.flatten(0, 1)`.
        """
        input_ids, position_ids = as_lines(config, self.input_ids, self.position_ids)
        return {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """A copy on `device`."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            position_ids=self.position_ids.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            targets=None if self.targets is None else self.targets.to(device, non_blocking=non_blocking),
        )


def collate_rows(
    tokens: Sequence[TokensRow], targets: Sequence[JoinedRow] | None = None, *, row_length: int | None = None
) -> PackedBatch:
    """Rows of a tokens store, and of a targets store (the same rows in the same order), as tensors on the CPU.

    Rows shorter than `row_length` (None: the longest of these) are padded at the end. Raises StoreError when the rows
    do not belong together, are longer than `row_length`, or `targets` come from a store of scores.
    """
    lengths = [len(row.tokens) for row in tokens]
    length = max(lengths, default=0) if row_length is None else row_length
    if not tokens or max(lengths) > length:
        raise StoreError(f"collate_rows: rows of {lengths} tokens, expected at least one row and {length} at most")
    input_ids = np.zeros((len(tokens), length), np.int64)
    positions = np.zeros_like(input_ids)
    labels = np.full_like(input_ids, IGNORE_LABEL)
    for number, row in enumerate(tokens):
        input_ids[number, : lengths[number]] = row.tokens
        positions[number, : lengths[number]] = row.position_ids()
        positions[number, lengths[number] :] = np.arange(length - lengths[number])
        labels[number, : lengths[number]] = row.labels()
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        targets=None if targets is None else _target_tensors(tokens, targets, length),
        num_labels=int((labels != IGNORE_LABEL).sum()),
    )


def _target_tensors(tokens: Sequence[TokensRow], targets: Sequence[JoinedRow], length: int) -> SparseTargetTensors:
    """Targets of the grid [B * L]: none at padding."""
    found = [row for row in targets if isinstance(row, TargetsRow)]
    if len(found) < len(targets):
        raise StoreError("collate_rows: targets hold rows of a scores store, expected rows of a targets store")
    if [(row.row, row.targets.num_tokens) for row in found] != [(row.row, len(row.tokens)) for row in tokens]:
        raise StoreError(
            f"collate_rows: tokens are of the rows {[row.row for row in tokens]}, targets of the rows "
            f"{[row.row for row in found]}, or their lengths differ; give the same rows in the same order"
        )
    packed = SparseTargetTensors.from_arrays(concatenate([row.targets for row in found]))
    if all(len(row.tokens) == length for row in tokens):
        return packed
    places = [np.arange(len(row.tokens)) + number * length for number, row in enumerate(tokens)]
    return packed.spread(torch.from_numpy(np.concatenate(places)), num_tokens=len(tokens) * length)
