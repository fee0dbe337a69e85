"""Rows in the ids of another vocabulary, against the dense distribution with the dropped ids merged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from potstill.storage import (
    EpochPlan,
    Loader,
    MismatchError,
    RowDataset,
    SparseTargets,
    StoreError,
    StoreReader,
    TokensRow,
    VocabularyMap,
    dropped_mass,
)
from potstill.storage.rows.validation import validate
from tests.storage.stores import write_targets, write_tokens
from tests.storage.vocabularies import TEMPERATURES, V, merged_kl, softmax, sparse, teacher_logits, trimmed


def sparse_kl(targets: SparseTargets, student: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """KL [N] of the k + 1 buckets against student logits [N, V], as the loss has it (docs/kernels.md)."""
    q_all = softmax(student / temperature)
    out = np.zeros(targets.num_tokens)
    assert targets.logprobs is not None
    for n in range(targets.num_tokens):
        part = slice(targets.offsets[n], targets.offsets[n + 1])
        if part.start == part.stop:
            continue
        ids, values = targets.ids[part], targets.logprobs[part].astype(np.float64) / temperature
        tail = float(np.exp((targets.log_tail if temperature == 1.0 else targets.log_tail_at[temperature])[n]))
        p = np.exp(values) / np.exp(values).sum() * (1.0 - tail)
        q = q_all[n, ids]
        out[n] = (p * np.log(p / q)).sum() + (tail * np.log(tail / (1.0 - q.sum())) if tail > 0 else 0.0)
    return out


@pytest.mark.parametrize("temperature", [1.0, *TEMPERATURES])
@pytest.mark.parametrize("k", [1, 4, 20, V])
def test_dropped_ids_are_merged_into_the_tail(temperature: float, k: int) -> None:
    """The divergence is that of the dense distribution with one bucket for all that the student lacks."""
    logits, mapping = teacher_logits(), trimmed()
    student = np.random.default_rng(8).normal(size=(len(logits), mapping.vocab_size))
    found = mapping.map_targets(sparse(logits, k))
    validate(found, vocab_size=mapping.vocab_size, strict=True)
    wanted = merged_kl(logits, student, mapping.new_id, k, temperature=temperature)
    np.testing.assert_allclose(sparse_kl(found, student, temperature=temperature), wanted, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_new_ids_belong_to_the_tail(temperature: float) -> None:
    """A superset: what the student gives its further ids counts against the teacher's tail, and nothing is lost."""
    logits, mapping = teacher_logits(), trimmed(0, new=4)
    student = np.random.default_rng(8).normal(size=(len(logits), V + 4))
    targets = sparse(logits, 6)
    found = mapping.map_targets(targets)
    np.testing.assert_array_equal(found.log_tail, targets.log_tail)
    np.testing.assert_array_equal(found.ids, mapping.new_id[targets.ids])
    wanted = merged_kl(logits, student, mapping.new_id, 6, temperature=temperature)
    np.testing.assert_allclose(sparse_kl(found, student, temperature=temperature), wanted, atol=2e-6)


def test_a_token_whose_entries_are_all_dropped_has_no_target() -> None:
    """A tail alone says nothing of any token of the student: the position is as one without a target."""
    logits, mapping = teacher_logits(), trimmed()
    targets = sparse(logits, 1)
    found = mapping.map_targets(targets)
    gone = np.append(mapping.new_id[targets.ids] < 0, False)
    assert gone.any() and not gone[:-1].all()
    np.testing.assert_array_equal(np.diff(found.offsets), np.where(gone, 0, np.diff(targets.offsets)))
    assert (found.log_tail[gone] == 0).all() and (found.log_tail_at[2.0][gone] == 0).all()
    np.testing.assert_array_equal(found.label_logprob, targets.label_logprob)


def test_untouched_tokens_keep_their_bytes() -> None:
    logits, mapping = teacher_logits(), trimmed(3)
    targets = sparse(logits, 4)
    found, lost = mapping.map_targets(targets), dropped_mass(targets, mapping)
    assert (lost == 0).any() and (lost > 0).any()
    np.testing.assert_array_equal(found.log_tail[lost == 0], targets.log_tail[lost == 0])
    np.testing.assert_allclose(
        np.exp(found.log_tail) - np.exp(targets.log_tail), lost * (np.diff(found.offsets) > 0), atol=1e-6
    )


def test_an_identity_is_no_work() -> None:
    mapping = VocabularyMap.build(np.arange(V), vocab_size=V + 8)
    row, targets = TokensRow(0, np.arange(4, dtype=np.int32), np.array([4], np.int32)), sparse(teacher_logits(), 4)
    assert mapping.map_tokens(row) is row and mapping.map_targets(targets) is targets


def test_draws_are_renamed_in_their_order_and_refused_with_a_subset() -> None:
    def draws(counts: list[int], ids: list[int]) -> SparseTargets:
        return SparseTargets.build(
            offsets=[0, len(ids)], ids=ids, counts=counts, num_draws=sum(counts), log_tail=[0.0], vocab_size=V
        )

    turned = VocabularyMap.build(np.arange(V)[::-1], vocab_size=V)
    found = turned.map_targets(draws([5, 2, 2], [7, 1, 3]))
    validate(found, vocab_size=V, strict=True)
    assert found.ids.tolist() == [V - 8, V - 4, V - 2] and found.counts is not None
    assert found.counts.tolist() == [5, 2, 2]
    table = np.arange(V)
    table[3] = -1
    with pytest.raises(MismatchError, match="store of draws"):
        VocabularyMap.build(table, vocab_size=V).map_targets(draws([5, 2, 2], [7, 1, 3]))


@pytest.mark.parametrize(
    ("table", "size", "words"),
    [
        ([0, 3, 1], 3, "id 1 becomes 3, expected"),
        ([0, -2, 1], 3, "id 1 becomes -2"),
        ([0, 2, 2], 3, r"the ids \[1, 2\] both become 2"),
        ([-1, -1], 3, "nothing in common"),
        ([0.0, 1.0], 3, "expected one integer"),
        ([0, 1], 0, "vocab_size 0"),
    ],
)
def test_maps_that_are_none(table: list[float], size: int, words: str) -> None:
    with pytest.raises(StoreError, match=words):
        VocabularyMap.build(table, vocab_size=size)


def test_a_text_with_a_dropped_id_is_an_error() -> None:
    mapping, row = trimmed(), TokensRow(17, np.arange(V, dtype=np.int32), np.array([V], np.int32))
    first = int(np.flatnonzero(mapping.new_id < 0)[0])
    with pytest.raises(StoreError, match=rf"row 17, position {first}: token id {first} .*9 of the row's 40"):
        mapping.map_tokens(row)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, StoreReader]:
    folder = tmp_path_factory.mktemp("stores")
    tokens = write_tokens(folder / "tokens", 12)
    return {"tokens": tokens, "targets": write_targets(folder / "targets", tokens)}


def shuffled(vocab_size: int, *, seed: int = 1) -> VocabularyMap:
    order = np.random.default_rng(seed).permutation(vocab_size + 5)[:vocab_size]
    return VocabularyMap.build(order, vocab_size=vocab_size + 5)


def plan(*joined: str) -> EpochPlan:
    return EpochPlan(12, global_batch=4, seed=0, joined=joined)


def test_a_reader_serves_the_ids_of_its_map(readers: Mapping[str, StoreReader]) -> None:
    mapping = shuffled(1000)
    tokens, targets = (readers[name].with_vocabulary(mapping) for name in ("tokens", "targets"))
    assert tokens.vocab_size == 1005 and readers["tokens"].vocab_size == 1000
    with Loader(plan("teacher"), tokens, {"teacher": targets}) as loader:
        batch = next(loader)
    plain = readers["tokens"].tokens_rows(batch.rows)
    for mapped, stored, taught, said in zip(
        batch.tokens, plain, batch.targets("teacher"), readers["targets"].targets_rows(batch.rows), strict=True
    ):
        np.testing.assert_array_equal(mapped.tokens, mapping.new_id[stored.tokens])
        np.testing.assert_array_equal(taught.targets.ids, mapping.new_id[said.targets.ids])
    sample = RowDataset(tokens, {"teacher": targets})[3]
    np.testing.assert_array_equal(sample.tokens.tokens, mapping.new_id[readers["tokens"].tokens_rows([3])[0].tokens])


def test_stores_and_states_of_another_map_are_refused(readers: Mapping[str, StoreReader]) -> None:
    tokens, targets = readers["tokens"].with_vocabulary(shuffled(1000)), readers["targets"]
    with pytest.raises(MismatchError, match="vocabulary map is None"):
        Loader(plan(), tokens, {"teacher": targets})
    with pytest.raises(MismatchError, match="1000 ids, the vocabulary map is one of 40"):
        targets.with_vocabulary(trimmed())

    few = VocabularyMap.build(np.where(np.arange(1000) < 16, np.arange(1000), -1), vocab_size=16)
    with pytest.raises(MismatchError, match="may keep 16 entries, as many as the student has ids"):
        targets.with_vocabulary(few)

    def loader(reader: StoreReader) -> Loader:
        return Loader(plan(), reader, {})

    state = loader(tokens).state_dict()
    loader(tokens).load_state_dict(state)
    for other in (readers["tokens"], readers["tokens"].with_vocabulary(shuffled(1000, seed=2))):
        with pytest.raises(MismatchError, match=r"stores differs .*vocabulary: saved"):
            loader(other).load_state_dict(state)
    assert "vocabulary" not in loader(readers["tokens"]).state_dict()["stores"]
