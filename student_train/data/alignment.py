"""The last look at rows before they come into a loss: their targets must stand at their tokens."""

from __future__ import annotations

from potstill.storage import LoadedBatch, TargetsRow, check_row_alignment


def check_aligned(batch: LoadedBatch) -> None:
    """Look at every row of targets of the batch. Raises MismatchError that names store and row (its global id).

    In the thread that has read the rows: about 0.3 ms for 2048 tokens of 64 entries.
    """
    for name, rows in batch.joined.items():
        for tokens, row in zip(batch.tokens, rows, strict=True):
            if isinstance(row, TargetsRow):
                check_row_alignment(tokens, row, where=f"targets store {name!r}")
