"""Whether the targets of a row stand at their tokens: the rules, row by row, and what they leave alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from potstill.storage import (
    FirstChoices,
    MismatchError,
    SparseTargets,
    TargetsRow,
    TokensRow,
    VocabularyMap,
    check_row_alignment,
    concatenate,
    token_digest,
)
from potstill.storage.rows.first_choices import first_choices

VOCAB, LENGTH, KEPT = 200, 400, 12


def chain(sharpness: float = 3.0) -> np.ndarray:
    """Log-probabilities [V, V] of a bigram teacher, which also makes the text."""
    logits = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)) * sharpness
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def text(row: int, doc_lens: tuple[int, ...] = (150, 100, 12, 138)) -> TokensRow:
    rng, p = np.random.default_rng([1, row]), np.exp(chain())
    tokens = [int(rng.integers(VOCAB))]
    while len(tokens) < sum(doc_lens):
        tokens.append(int(rng.choice(VOCAB, p=p[tokens[-1]])))
    return TokensRow(row, np.array(tokens, np.int32), np.array(doc_lens, np.int32))


def taught(tokens: TokensRow, log_p: np.ndarray, *, k: int = KEPT, labels: bool = True) -> TargetsRow:
    """What the format keeps of log_p [n, V] at the places that have a target: on its grid of 1/16 nat."""
    places = tokens.has_target()
    log_p = np.round(log_p * 16) / 16
    ids = np.argsort(-log_p, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(log_p, ids, 1)[places]
    own = log_p[np.arange(len(places)), np.maximum(tokens.labels(), 0)]
    targets = SparseTargets.build(
        offsets=np.concatenate([[0], np.cumsum(np.where(places, k, 0))]).astype(np.int64),
        ids=ids[places].reshape(-1).astype(np.int32),
        logprobs=kept.reshape(-1).astype(np.float32),
        log_tail=_tail(places, kept),
        label_logprob=np.where(places, np.maximum(own, -255 / 16), 0).astype(np.float32) if labels else None,
        vocab_size=VOCAB,
    )
    return TargetsRow(tokens.row, token_digest(tokens.tokens, tokens.doc_lens), targets)


def _tail(places: np.ndarray, kept: np.ndarray) -> np.ndarray:
    tail = np.zeros(len(places), np.float32)
    tail[places] = np.log(np.maximum(1 - np.exp(kept).sum(1), 1e-7))
    return tail


def drawn(tokens: TokensRow, log_p: np.ndarray, *, num_draws: int, labels: bool = True) -> TargetsRow:
    """Draw counts of log_p [n, V]."""
    rng, places, offsets, ids, counts = np.random.default_rng(tokens.row), tokens.has_target(), [0], [], []
    for at, place in enumerate(places):
        found = rng.multinomial(num_draws, np.exp(log_p[at]) / np.exp(log_p[at]).sum()) if place else np.zeros(1, int)
        chosen = np.flatnonzero(found)
        chosen = chosen[np.lexsort((chosen, -found[chosen]))]
        ids.append(chosen)
        counts.append(found[chosen])
        offsets.append(offsets[-1] + len(chosen))
    own = log_p[np.arange(len(places)), np.maximum(tokens.labels(), 0)]
    targets = SparseTargets.build(
        offsets=np.array(offsets, np.int64),
        ids=np.concatenate(ids).astype(np.int32),
        counts=np.concatenate(counts).astype(np.uint8),
        num_draws=num_draws,
        log_tail=np.zeros(len(places), np.float32),
        label_logprob=np.where(places, np.round(own * 16) / 16, 0).astype(np.float32) if labels else None,
        vocab_size=VOCAB,
    )
    return TargetsRow(tokens.row, token_digest(tokens.tokens, tokens.doc_lens), targets)


def shifted(tokens: TokensRow, row: TargetsRow, by: int, documents: slice = slice(None)) -> TargetsRow:
    """The row with the distributions of each of these documents moved by so many positions, at the same places."""
    order, ends = np.arange(len(tokens.tokens)), np.cumsum(tokens.doc_lens)
    for start, end in list(zip(ends - tokens.doc_lens, ends, strict=True))[documents]:
        order[start : end - 1] = np.roll(order[start : end - 1], by)
    return replace(row, targets=concatenate([row.targets.slice(int(at), int(at) + 1) for at in order]))


def weighted(row: TargetsRow) -> TargetsRow:
    """The entries of a row as importance weights of draws, without labels."""
    targets = row.targets
    assert targets.logprobs is not None
    columns = {"logprobs": None, "counts": None, "label_logprob": None, "log_weights": targets.logprobs}
    return replace(row, targets=replace(targets, columns={**targets.columns, **columns}, num_draws=40))


KINDS: dict[str, Any] = {
    "labels": lambda tokens, log_p: taught(tokens, log_p),
    "one entry": lambda tokens, log_p: taught(tokens, log_p, k=1),
    "no labels": lambda tokens, log_p: taught(tokens, log_p, labels=False),
    "draws": lambda tokens, log_p: drawn(tokens, log_p, num_draws=20),
    "one draw": lambda tokens, log_p: drawn(tokens, log_p, num_draws=1),
    "draws without labels": lambda tokens, log_p: drawn(tokens, log_p, num_draws=20, labels=False),
    "weights": lambda tokens, log_p: weighted(taught(tokens, log_p, labels=False)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shifted_row_is_refused_and_a_right_one_passes(kind: str) -> None:
    for number in range(3):
        tokens = text(number)
        row = KINDS[kind](tokens, chain()[tokens.tokens])
        check_row_alignment(tokens, row, where="store")
        for by in (1, -1):
            with pytest.raises(MismatchError, match=rf"store: row {number}: .*shifted or belong to other tokens"):
                check_row_alignment(tokens, shifted(tokens, row, by), where="store")


@pytest.mark.parametrize("by", [1, -1])
def test_a_short_document_that_is_shifted_in_a_long_row_is_named(by: int) -> None:
    tokens = text(0, (700, 14, 500))
    row = taught(tokens, chain()[tokens.tokens])
    with pytest.raises(MismatchError, match=r"in document 1 of the row"):
        check_row_alignment(tokens, shifted(tokens, row, by, slice(1, 2)), where="store")


def test_only_the_entries_are_shifted_and_the_labels_are_not() -> None:
    tokens = text(0)
    row = taught(tokens, chain()[tokens.tokens])
    moved = shifted(tokens, row, 1)
    columns = {**moved.targets.columns, "label_logprob": row.targets.label_logprob}
    with pytest.raises(MismatchError, match="shifted"):
        check_row_alignment(tokens, replace(moved, targets=replace(moved.targets, columns=columns)), where="store")


def test_teachers_that_are_sure_or_know_nothing_pass() -> None:
    """Values below the floor of the label column, ties, and what a teacher near chance has."""
    for sharpness in (0.0, 1e-3, 0.3, 10.0, 60.0):
        for number in range(2):
            tokens = text(number)
            log_p = chain(sharpness)[tokens.tokens]
            for make in KINDS.values():
                check_row_alignment(tokens, make(tokens, log_p), where="store")


@pytest.mark.parametrize("confidence", [0.01, 0.5, 0.98])
def test_an_untrained_teacher_that_copies_what_it_reads_passes(confidence: float) -> None:
    """Tied embeddings make one of the first entry of every position; it is no shifted store."""
    tokens = text(0)
    p = np.full((LENGTH, VOCAB), (1 - confidence) / (VOCAB - 1))
    p[np.arange(LENGTH), tokens.tokens] = confidence
    for make in KINDS.values():
        check_row_alignment(tokens, make(tokens, np.log(p)), where="store")
    found = first_choices([(tokens, taught(tokens, np.log(p), labels=False))])
    assert found.read == found.num > 300 and not found.stands_right and not found.stands_beside


def test_a_row_without_any_target_and_rows_too_short_to_tell_pass() -> None:
    tokens = text(0)
    row = taught(tokens, chain()[tokens.tokens])
    none = replace(row, targets=row.targets.slice(0, 0).without_targets(LENGTH))
    assert check_row_alignment(tokens, none, where="store").num_compared == 0
    short = text(0, (2, 1, 3))
    check_row_alignment(short, taught(short, chain()[short.tokens], labels=False), where="store")


def test_rows_in_another_vocabulary_are_looked_at_in_its_ids() -> None:
    tokens = text(0)
    new_id = np.random.default_rng(5).permutation(VOCAB).astype(np.int32)
    unused = np.setdiff1d(np.arange(VOCAB), tokens.tokens)[:20]
    new_id[unused] = -1
    mapping = VocabularyMap.build(new_id, vocab_size=VOCAB)
    row = taught(tokens, chain()[tokens.tokens])
    found = [mapping.map_row(one) for one in (tokens, row, shifted(tokens, row, 1))]
    assert isinstance(found[0], TokensRow) and isinstance(found[1], TargetsRow) and isinstance(found[2], TargetsRow)
    assert check_row_alignment(found[0], found[1], where="store").num_compared > 100
    with pytest.raises(MismatchError, match="shifted"):
        check_row_alignment(found[0], found[2], where="store")


def test_what_counts_as_a_clearly_better_fit() -> None:
    right = FirstChoices(num=1000, read=30, next=400, after=20, confidence=0.42)
    assert right.stands_right and not right.stands_beside and "1000 positions" in right.text
    late = FirstChoices(num=1000, read=400, next=30, after=20, confidence=0.42)
    assert late.stands_beside and not late.stands_right
    assert replace(late, read=20, after=400).stands_beside
    assert not replace(late, confidence=0.02).stands_beside, "a teacher that is not that sure is not shifted"
    assert not replace(late, read=950, confidence=0.9).stands_beside, "a copy of the input cannot be told from a shift"
    few = FirstChoices(num=30, read=12, next=1, after=0, confidence=0.4)
    assert not few.stands_beside and not few.stands_right, "too few positions"
    unigram = FirstChoices(num=100_000, read=5100, next=4000, after=4100, confidence=0.05)
    assert not unigram.stands_beside and not unigram.stands_right, "one frequent token everywhere"
    nothing = FirstChoices(0, 0, 0, 0, 0.0)
    assert not nothing.stands_beside and not nothing.stands_right and nothing.text
