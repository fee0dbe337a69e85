"""Several tokens stores under one loader: row ids, joins by source, what is refused, worlds and resume."""

from __future__ import annotations

import json

import numpy as np
import pytest

from potstill.storage import (
    EpochPlan,
    Loader,
    MismatchError,
    MixturePlan,
    Source,
    SourceRows,
    StoreError,
    StoreReader,
    StoreWriter,
    seal_store,
)
from tests.storage.stores import make_scores_row, same_targets, targets_spec, write_targets, write_tokens

SIZES = {"novels": 9, "maths": 14, "noisy": 7}
OFFSETS = [0, 9, 23, 30]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three sources; two have a teacher, each its own, and one has scores."""
    root = tmp_path_factory.mktemp("sources")
    found = []
    for number, (name, size) in enumerate(SIZES.items()):
        tokens = write_tokens(root / name, size, last_tokens=5 + number)
        joined = {}
        if name != "noisy":
            joined["teacher"] = write_targets(root / f"{name}_teacher", tokens, seed=number)
        else:
            spec = targets_spec(size, tokens.digest, kind="scores", selection=None)
            writer = StoreWriter.create(root / "scores", spec)
            for unit in writer.todo():
                writer.commit_unit(unit, [make_scores_row(tokens.row(r), spec) for r in writer.unit_rows(unit)])
            seal_store(root / "scores")
            joined["slm"] = StoreReader(root / "scores")
        found.append(Source(name, tokens, joined))
    return tuple(found)


def plan_of(**changes):
    values = {"global_batch": 8, "seed": 1, "joined": ("teacher", "slm")}
    return EpochPlan(OFFSETS[-1], **{**values, **changes})


def test_rows_have_global_ids_and_say_what_their_own_source_says(sources):
    with Loader(plan_of(), sources, num_threads=3) as loader:
        batches = [next(loader) for _ in range(4)]
    seen = np.concatenate([batch.rows for batch in batches])
    assert sorted(seen[: OFFSETS[-1]].tolist()) == list(range(OFFSETS[-1]))
    for batch in batches:
        assert [row.row for row in batch.tokens] == batch.rows.tolist()
        for place, row in enumerate(batch.rows.tolist()):
            number = int(np.searchsorted(OFFSETS, row, side="right")) - 1
            source, inner = sources[number], row - OFFSETS[number]
            assert batch.source[place] == number
            np.testing.assert_array_equal(batch.tokens[place].tokens, source.tokens.row(inner).tokens)
            teacher, score = batch.joined["teacher"][place], batch.joined["slm"][place]
            if number == 2:
                assert teacher is None and score.row == row
                np.testing.assert_array_equal(score.label_rank, source.joined["slm"].row(inner).label_rank)
            else:
                assert score is None and teacher.row == row
                assert same_targets(teacher.targets, source.joined["teacher"].row(inner).targets)
    with_none = next(batch for batch in batches if 2 in batch.source)
    with pytest.raises(MismatchError, match="is of a source that has no store teacher"):
        with_none.targets("teacher")


def test_any_world_and_any_resume_give_the_same_batches(sources):
    def taken(world, first=0, state=None):
        ranks = [Loader(plan_of(), sources, rank=rank, world=world) for rank in range(world)]
        found = []
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(first, 6):
            parts = [next(loader) for loader in ranks]
            for loader, part in zip(ranks, parts, strict=True):
                loader.commit(part.batch)
            found.append([(row.row, row.tokens.tolist()) for part in parts for row in part.tokens])
        for loader in ranks:
            loader.close()
        return found

    whole = taken(1)
    assert taken(3) == whole
    with Loader(plan_of(), sources) as loader:
        for _ in range(2):
            loader.commit(next(loader).batch)
        state = loader.state_dict()
    assert len(json.dumps(state)) < 1024
    assert taken(2, 2, state) == whole[2:]


def test_a_state_is_refused_by_other_stores_of_a_source(sources, tmp_path):
    with Loader(plan_of(), sources) as loader:
        state = loader.state_dict()
    first = sources[0]
    other = Source(first.name, first.tokens, {"teacher": write_targets(tmp_path / "t", first.tokens, seed=7)})
    for changed, words in (
        ((other, *sources[1:]), "stores differs .*novels: saved"),
        ((*sources[1:], first), "sources.maths: saved"),  # its rows would have other ids
        ((Source("tales", first.tokens, first.joined), *sources[1:]), "tales"),
    ):
        with Loader(plan_of(), changed) as loader, pytest.raises(MismatchError, match=words):
            loader.load_state_dict(state)


def test_one_source_is_a_plain_run(sources):
    only = sources[0]
    plan = EpochPlan(SIZES["novels"], global_batch=4, seed=1, joined=("teacher",))
    with Loader(plan, [only]) as named, Loader(plan, only.tokens, only.joined) as plain:
        one, other = next(named), next(plain)
        assert one.source is None and other.source is None
        np.testing.assert_array_equal(one.rows, other.rows)
        assert named.state_dict() == plain.state_dict()
        assert set(plain.state_dict()["stores"]) == {"tokens", "joined.teacher"}


def test_stores_that_do_not_go_together_are_refused(sources, tmp_path):
    novels, maths, noisy = sources
    longer = write_tokens(tmp_path / "longer", 5, row_length=64)
    other = write_tokens(tmp_path / "other", 5, tokenizer_digest="elsewhere")
    for given, words in (
        ([novels, Source("long", longer, {})], r"source long .*row_length is 64, source novels has 32"),
        ([novels, Source("other", other, {})], "tokenizer_digest is 'elsewhere'"),
        ([novels, Source("maths", maths.tokens, novels.joined)], r"joined store teacher .*input_digest"),
        (
            [novels, Source("x", noisy.tokens, {"teacher": noisy.joined["slm"]})],
            "teacher is of kind scores in source x",
        ),
        ([novels, Source("novels", maths.tokens, {})], "two sources have the same name"),
        ([Source("x", novels.joined["teacher"], {})], "of kind targets, expected tokens"),
    ):
        with pytest.raises(StoreError, match=words):
            SourceRows(given)
    with pytest.raises(StoreError, match="no source of rows"):
        SourceRows([])
    with pytest.raises(StoreError, match="each source names its own"):
        Loader(plan_of(), sources, {"teacher": novels.joined["teacher"]})
    with Loader(plan_of(joined=("nobody",)), sources) as loader, pytest.raises(StoreError, match=r"\['nobody'\]"):
        next(loader)


@pytest.mark.parametrize("mode", ["global", "block"])
def test_a_mixture_plan_draws_by_shares_and_goes_through_each_source(sources, mode):
    plan = MixturePlan(sources, {"novels": 1, "maths": 2, "noisy": 1}, global_batch=8, seed=1, mode=mode)
    rows = np.concatenate([plan.rows(batch) for batch in range(14)])
    numbers = SourceRows(sources).source_of(rows)
    assert np.bincount(numbers).tolist() == [28, 56, 28]
    for number, size in enumerate(SIZES.values()):
        mine = rows[numbers == number][: size * 2].reshape(2, size)
        assert all(sorted(part.tolist()) == list(range(OFFSETS[number], OFFSETS[number + 1])) for part in mine)
    every = MixturePlan(sources, global_batch=6, seed=1, mode=mode)
    assert sorted(np.concatenate([every.rows(batch) for batch in range(5)]).tolist()) == list(range(OFFSETS[-1]))
    assert every.position(5) == {"epoch": 1, "stage": 0, "rows_consumed": 30}
    with Loader(plan, sources) as loader:
        state = loader.state_dict()
    other = MixturePlan(sources, {"novels": 1, "maths": 3, "noisy": 1}, global_batch=8, seed=1, mode=mode)
    with Loader(other, sources) as loader, pytest.raises(MismatchError, match=r"plan differs .*weights"):
        loader.load_state_dict(json.loads(json.dumps(state)))


def test_shares_that_a_mixture_plan_cannot_have(sources):
    for shares, words in (
        ({"novel": 1}, r"shares name \['novel'\]"),
        ({"novels": 0}, "shares"),
        ({"novels": -1, "maths": 2}, "shares"),
    ):
        with pytest.raises(StoreError, match=words):
            MixturePlan(sources, shares, global_batch=8, seed=1)
    with pytest.raises(StoreError, match="a batch of 0 rows"):
        MixturePlan(sources, global_batch=0, seed=1)
