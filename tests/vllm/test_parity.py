"""Engine vllm against engine hf on real text, through the project's own selection: packed rows, masked rows, draws."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from potstill.storage import TokensRow
from potstill.teacher_dump.batches import packed_batch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.loading import load_engine
from potstill.teacher_dump.engines.vllm_engine.engine import VllmEngine
from potstill.teacher_dump.engines.vllm_engine.runner import WrongAnswerError
from potstill.teacher_dump.on_device import batch_sample, batch_topk
from tests.teacher_dump.prompt_runners import Liar, head_and_reference
from tests.teacher_dump.test_vllm_engine import LIES
from tests.vllm.conftest import RealText

pytest.importorskip("vllm", reason="no vLLM here: `make test-vllm` installs it into an environment of its own")
ROW_LENGTH, K, BATCH, TEMPERATURE = 512, 64, 8, 2.0
Found = dict[str, torch.Tensor]


def over(rows: list[TokensRow], compute: Callable[[Any], Any]) -> list[Any]:
    return [
        compute(packed_batch(rows[start : start + BATCH], length=ROW_LENGTH)) for start in range(0, len(rows), BATCH)
    ]


def top_k(engine: Any, text: RealText) -> Found:
    """Every figure of the top-k of all target positions, float64 or int64 [M] and [M, k]."""
    options: dict[str, Any] = {"k": K, "vocab_size": 8192, "temperatures": [TEMPERATURE], "chunk_bytes": None}
    found = over(text.rows, lambda batch: batch_topk(engine, batch, **options).wait())
    names = ("ids", "logprobs", "lse", "entropy", "label_logprob", "label_rank", "log_tail")
    every = {name: torch.cat([getattr(one, name) for one in found]) for name in names}
    every["log_tail_at"] = torch.cat([one.log_tail_at[TEMPERATURE] for one in found])
    return {name: value.double() if value.is_floating_point() else value.long() for name, value in every.items()}


def draws(engine: Any, rows: list[TokensRow]) -> list[dict[int, Counter[int]]]:
    """For each batch, by position: how often each id was drawn."""
    options: dict[str, Any] = {"num_draws": 50, "power": 1.0, "seed": 3, "vocab_size": 8192, "chunk_bytes": None}

    def counts(batch: Any) -> dict[int, Counter[int]]:
        targets = batch_sample(engine, batch, **options).wait().targets
        assert targets.counts is not None
        ids, times, bounds = targets.ids.tolist(), targets.counts.tolist(), targets.offsets.tolist()
        spans = enumerate(itertools.pairwise(bounds))
        return {t: Counter(dict(zip(ids[a:b], times[a:b], strict=True))) for t, (a, b) in spans}

    return over(rows, counts)


def same_sets(a: Found, b: Found) -> torch.Tensor:
    """bool [M]: whether the k ids are the same, in any order."""
    return (a["ids"].sort(1).values == b["ids"].sort(1).values).all(1)


def worst(a: Found, b: Found, name: str) -> float:
    return float((a[name] - b[name]).abs().max())


@pytest.fixture(scope="module")
def exact(real_text: RealText) -> Found:
    """What engine hf says in float32."""
    return top_k(load_engine(TeacherConfig(model=real_text.teacher, dtype="float32")), real_text)


@pytest.fixture(scope="module")
def engine(real_text: RealText) -> Iterator[Any]:
    """Engine vllm in float32, for the tests of this module that need no other."""
    held = [load_engine(TeacherConfig(model=real_text.teacher, engine="vllm", dtype="float32"), row_length=ROW_LENGTH)]
    yield held[0]
    held.clear()
    gc.collect()


def assert_exact(found: Found, exact: Found) -> None:
    """The demand on float32: the same ids at 99.9 % of the positions, the normaliser within 1e-4."""
    same = same_sets(found, exact)
    assert float(same.double().mean()) >= 0.999
    for name in ("lse", "entropy", "label_logprob"):
        assert worst(found, exact, name) <= 1e-4, name
    # What is outside of the ids is comparable where the ids are the same.
    for name in ("log_tail", "log_tail_at"):
        assert float((found[name] - exact[name])[same].abs().max()) <= 1e-3, name
    ranks = found["label_rank"] == exact["label_rank"]
    assert float(ranks.double().mean()) >= 0.999
    in_order = found["logprobs"].sort(1).values - exact["logprobs"].sort(1).values
    assert float(in_order.abs().max()) <= 1e-4


def test_float32_is_that_of_hf(real_text: RealText, exact: Found, engine: Any) -> None:
    rows = real_text.rows
    assert max(len(row.doc_lens) for row in rows) > 2 and any(row.mask is not None for row in rows)
    assert len(exact["lse"]) > 8000
    assert_exact(top_k(engine, real_text), exact)


def test_draws_are_those_of_hf(real_text: RealText, engine: Any) -> None:
    """A draw is a place on the cumulated probabilities, keyed by row and position. It falls on another id only where
    the last bits of float32 move a bound across it: all but one draw in a thousand can be asked for, and are."""
    rows = real_text.rows[::3]
    found = draws(engine, rows)
    expected = draws(load_engine(TeacherConfig(model=real_text.teacher, dtype="float32")), rows)
    moved = sum(sum((one[t] - other[t]).values()) for one, other in zip(found, expected, strict=True) for t in one)
    drawn = sum(one[t].total() for one in expected for t in one)
    assert drawn == 50 * sum(len(one) for one in expected) > 100_000
    assert moved <= drawn / 1000, (moved, drawn)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lie_about_vllm_itself_is_found(real_text: RealText, engine: VllmEngine, lie: Any) -> None:
    head, reference = head_and_reference(TeacherConfig(model=real_text.teacher, dtype="float32"), 512, torch.float32)
    options: dict[str, Any] = {"head": head, "dtype": "float32", "reference": reference}
    VllmEngine(Liar(engine.runner, []), **options)
    with pytest.raises(WrongAnswerError):
        VllmEngine(Liar(engine.runner, [lie]), **options)


def test_bfloat16_is_no_worse_than_that_of_transformers(real_text: RealText, exact: Found) -> None:
    found = {}
    for name in ("hf", "vllm"):
        settings = TeacherConfig(model=real_text.teacher, engine=name, dtype="bfloat16")
        found[name] = top_k(load_engine(settings, row_length=ROW_LENGTH), real_text)
        gc.collect()
    share = {name: float(same_sets(one, exact).double().mean()) for name, one in found.items()}
    # Two samples of so many positions: three standard errors of their difference.
    chance = 3 * (2 * share["hf"] * (1 - share["hf"]) / len(exact["lse"])) ** 0.5
    assert share["vllm"] >= share["hf"] - chance, share
    for name in ("label_logprob", "lse", "entropy"):
        mean = {one: float((found[one][name] - exact[name]).abs().mean()) for one in found}
        most = {one: worst(found[one], exact, name) for one in found}
        print(f"{name}: mean error {mean}, most {most}; same sets {share}")
        assert mean["vllm"] <= 1.1 * mean["hf"], (name, mean)
        assert most["vllm"] <= 2 * most["hf"], (name, most)


def test_documents_in_pieces_are_the_same(real_text: RealText, exact: Found) -> None:
    pieces = {"max_num_batched_tokens": 100, "max_num_seqs": 16, "enable_chunked_prefill": True}
    longest = max(int(row.doc_lens.max()) for row in real_text.rows)
    assert longest > 400
    settings = TeacherConfig(model=real_text.teacher, engine="vllm", dtype="float32", load_options=pieces)
    chunked: Any = load_engine(settings, row_length=ROW_LENGTH)
    assert chunked.runner.at_once == 100
    assert_exact(top_k(chunked, real_text), exact)
