"""collate_rows: labels, positions and targets of packed rows on one grid, with padding between the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.kernels.loss import linear_sparse_loss
from potstill.storage import StoreError, StoreReader
from potstill.student_train import collate_rows
from tests.student_train import tiny

LAST = 39  # the short row of the tiny stores: 20 tokens


def test_every_position_has_its_row_s_label_and_target(stores: dict[str, Path]) -> None:
    ids = [3, LAST, 7]  # padding in the middle of the grid
    tokens, targets = StoreReader(stores["tokens"]), StoreReader(stores["teacher"])
    batch = collate_rows(tokens.tokens_rows(ids), targets.targets_rows(ids))
    assert batch.input_ids.shape == batch.position_ids.shape == batch.labels.shape == (3, tiny.ROW_LENGTH)
    assert batch.targets is not None and batch.targets.num_tokens == 3 * tiny.ROW_LENGTH
    for number, (row, target) in enumerate(zip(tokens.tokens_rows(ids), targets.targets_rows(ids), strict=True)):
        start = 0
        for length in row.doc_lens:
            places = range(start, start + length)
            assert batch.input_ids[number, start : start + length].tolist() == row.tokens[places].tolist()
            assert batch.position_ids[number, start : start + length].tolist() == list(range(length))
            labels = [*row.tokens[start + 1 : start + length].tolist(), -100]
            assert batch.labels[number, start : start + length].tolist() == labels
            start += length
        for n in range(tiny.ROW_LENGTH):
            place = number * tiny.ROW_LENGTH + n
            first, last = batch.targets.offsets[place : place + 2].tolist()
            expected = target.targets.candidates(n) if n < len(row.tokens) else None
            assert batch.targets.ids[first:last].tolist() == ([] if expected is None else expected.ids.tolist())
            if expected is not None and last > first:
                assert float(batch.targets.log_tail[place].exp()) == pytest.approx(expected.tail)
                assert float(batch.targets.log_tail_at[2.0][place]) == target.targets.log_tail_at[2.0][n]
            # A position has a target exactly where it has a label: never at a document's last token.
            assert (last > first) == (int(batch.labels[number, n]) != -100)
    assert batch.position_ids[1, 20:].tolist() == list(range(12))
    assert batch.labels[1, 20:].tolist() == [-100] * 12
    assert batch.num_labels == int((batch.labels != -100).sum()) == int(batch.token_weights.sum())


def test_padding_does_not_change_the_loss(stores: dict[str, Path]) -> None:
    tokens = StoreReader(stores["tokens"]).tokens_rows([LAST, 5])
    targets = StoreReader(stores["teacher"]).targets_rows([LAST, 5])
    torch.manual_seed(0)
    weight = torch.randn(tiny.VOCAB, 8)
    table = torch.randn(tiny.VOCAB, 8)
    found = []
    for length in (None, tiny.ROW_LENGTH + 9):
        batch = collate_rows(tokens, targets, row_length=length)
        hidden = table[batch.input_ids].flatten(0, 1).requires_grad_()
        loss, sums = linear_sparse_loss(
            hidden=hidden,
            weight=weight,
            targets=batch.targets,
            labels=batch.labels.flatten(),
            token_weights=batch.token_weights,
            alpha=0.7,
            temperature=2.0,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        assert int(sums.num_targets) == int(sums.num_labels) == batch.num_labels
        assert not hidden.grad[batch.labels.flatten() == -100].any()
        found.append((float(loss.detach()), hidden.grad[batch.labels.flatten() != -100]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_flash_attention_gets_one_line(stores: dict[str, Path]) -> None:
    from transformers import LlamaConfig

    batch = collate_rows(StoreReader(stores["tokens"]).tokens_rows([0, 1]))
    assert batch.targets is None
    plain = batch.model_inputs(LlamaConfig(attn_implementation="sdpa"))
    assert plain["input_ids"].shape == (2, tiny.ROW_LENGTH) and plain["use_cache"] is False
    config = LlamaConfig()
    config._attn_implementation_internal = "flash_attention_2"  # as set by a model on a GPU that has it
    flash = batch.model_inputs(config)
    assert flash["input_ids"].shape == flash["position_ids"].shape == (1, 2 * tiny.ROW_LENGTH)
    assert int((flash["position_ids"] == 0).sum()) == int((batch.position_ids == 0).sum())


def test_rows_that_do_not_belong_together_are_refused(stores: dict[str, Path]) -> None:
    tokens, targets = StoreReader(stores["tokens"]), StoreReader(stores["teacher"])
    rows = tokens.tokens_rows([1, 2])
    with pytest.raises(StoreError, match=r"rows \[1, 2\], targets of the rows \[2, 1\]"):
        collate_rows(rows, targets.targets_rows([2, 1]))
    with pytest.raises(StoreError, match="rows of a scores store"):
        collate_rows(rows, StoreReader(stores["scores"]).scores_rows([1, 2]))
    with pytest.raises(StoreError, match="at least one row and 16 at most"):
        collate_rows(rows, row_length=16)
    with pytest.raises(StoreError, match="at least one row"):
        collate_rows([])


def test_spread_is_the_inverse_of_select(stores: dict[str, Path]) -> None:
    targets = StoreReader(stores["sampled"]).targets_rows([0])
    batch = collate_rows(StoreReader(stores["tokens"]).tokens_rows([0]), targets)
    assert batch.targets is not None and batch.targets.counts is not None
    index = torch.from_numpy(np.flatnonzero(np.arange(2 * tiny.ROW_LENGTH) % 2))
    wide = batch.targets.spread(index, num_tokens=2 * tiny.ROW_LENGTH)
    back = wide.select(index)
    assert wide.num_tokens == 2 * tiny.ROW_LENGTH and wide.num_draws == batch.targets.num_draws
    assert torch.equal(back.offsets, batch.targets.offsets) and torch.equal(back.ids, batch.targets.ids)
    assert torch.equal(back.log_tail, batch.targets.log_tail)
    assert back.counts is not None and torch.equal(back.counts, batch.targets.counts)
    others = wide.select(index - 1)
    assert others.num_entries == 0
