"""Which tokens of the noisy text are noise, and how much noise a choice of rows or of positions keeps.

The noisy corpus names each noisy span in characters. Packing puts documents end to end, so that the tokens of a store,
read in order, are those of its documents with an end-of-text after each; that is checked.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from potstill.common.errors import UserError
from potstill.storage import StoreReader, StoreWriter, seal_store

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def noisy_characters(spans: Sequence[Sequence[object]], length: int) -> Bools:
    """Which characters [length] of a document lie in one of its spans [start, end, kind]."""
    noisy = np.zeros(length, bool)
    for start, end, _ in spans:
        noisy[int(str(start)) : int(str(end))] = True
    return noisy


def noise_of_rows(corpus: Path, tokenizer: Path, tokens: str) -> list[Bools]:
    """For each row of a tokens store: which of its tokens [n] begin in noise. Raises UserError: other text."""
    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids: list[int] = []
    noisy: list[bool] = []
    reader = StoreReader(tokens)
    rows = reader.tokens_rows(range(reader.num_rows))
    eos = int(rows[-1].tokens[-1])  # a store ends where its last document ends
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            marks = noisy_characters(record["spans"], len(record["text"]))
            encoding = encoder.encode(record["text"], add_special_tokens=False)
            ids += [*encoding.ids, eos]
            noisy += [*(bool(marks[start]) for start, _ in encoding.offsets), False]
    lengths = [len(row.tokens) for row in rows]
    if not np.array_equal(np.concatenate([row.tokens for row in rows]), np.array(ids)):
        raise UserError(f"{tokens} holds other tokens than {corpus} with {tokenizer}; delete the folder of the setting")
    return np.split(np.array(noisy), np.cumsum(lengths)[:-1])


def auc(score: Floats, positive: Bools) -> float:
    """Chance that a positive item's score lies above a negative one's, ties counting half; NaN without both kinds."""
    if positive.all() or not positive.any():
        return float("nan")
    order = np.argsort(score, kind="stable")
    ranks = np.empty(len(score))
    ranks[order] = np.arange(1, len(score) + 1)
    _, group = np.unique(score, return_inverse=True)
    ranks = (np.bincount(group, ranks) / np.bincount(group))[group]  # equal scores share their mean rank
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(score) - count)))


def loss_difference(scores: str, targets: str) -> list[Floats]:
    """Loss of the scores store minus that of the targets store at each position [n] of each row; NaN without label."""
    small, teacher = StoreReader(scores), StoreReader(targets)
    found = []
    for ours, theirs in zip(
        small.scores_rows(range(small.num_rows)), teacher.targets_rows(range(teacher.num_rows)), strict=True
    ):
        label = theirs.targets.label_logprob
        if label is None:
            raise UserError(f"{targets}: row {theirs.row} has no probability of its labels; dump it again with them")
        found.append(np.where(np.isfinite(label), label - ours.label_logprob, np.nan).astype(np.float64))
    return found


def upper_part(score: Floats, share: float) -> Bools:
    """The largest ceil(share * labelled) of a row's scores [n]; NaN is never one of them, ties go to the earlier."""
    labelled = int(np.isfinite(score).sum())
    order = np.argsort(np.where(np.isfinite(score), -score, np.inf), kind="stable")
    chosen = np.zeros(len(score), bool)
    chosen[order[: int(np.ceil(share * labelled - 1e-9))]] = True
    return chosen


def write_masked(source: str, output: Path, chosen: Sequence[Bools]) -> None:
    """A tokens store like `source` of which the chosen positions [n] of each row alone are measured; once.

    A mask is over labels: position t is measured where token t + 1 is on.
    """
    if (output / "manifest.json").is_file():
        return
    reader = StoreReader(source)
    writer = StoreWriter.create(
        str(output), dataclasses.replace(reader.spec, num_rows=reader.num_rows, columns=("mask",)), force=True
    )
    for unit in writer.todo():
        rows = []
        for row in reader.tokens_rows(writer.unit_rows(unit)):
            mask = np.concatenate([[False], chosen[row.row][:-1]])
            rows.append(dataclasses.replace(row, mask=mask))
        writer.commit_unit(unit, rows)
    seal_store(str(output))
