"""The codec: fidelity on real and extreme distributions, every vocabulary width, refusals, determinism."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.store_codec import measure, select
from benchmarks.teacher_stand_in import make_dumps
from potstill.storage import RunSpec, SparseTargets, StoreError, concatenate
from potstill.storage.rows.codec import decode_targets, encode_targets
from potstill.storage.rows.planes import num_id_planes
from potstill.storage.rows.value_grid import decode_odds, decode_tail, encode_odds, encode_tail
from tests.storage.stores import make_targets, same_targets, targets_spec

KL_MEAN, KL_P99 = 1e-4, 3e-4


def spec_of(vocab_size, k=255, **changes):
    return targets_spec(1, "in", vocab_size=vocab_size, selection={"mode": "top_k", "k": k}, **changes)


def round_trip(targets, spec):
    planes = encode_targets(targets, spec=spec)
    return decode_targets(planes, spec=spec, num_entries=targets.num_entries)


def one_token(ids, probs, tail, vocab_size=1000, **more):
    return SparseTargets.build(
        offsets=[0, len(ids)],
        ids=ids,
        logprobs=np.log(np.array(probs)).astype(np.float32),
        log_tail=np.array([tail], np.float32),
        vocab_size=vocab_size,
        strict=True,
        **more,
    )


def divergence(true, stored):
    """KL over the k+1 buckets, each side renormalised by its sum, per token with entries (float64)."""
    out = []
    for n in range(true.num_tokens):
        span = slice(int(true.offsets[n]), int(true.offsets[n + 1]))
        if span.start == span.stop:
            continue
        p = np.exp(np.append(true.logprobs[span], true.log_tail[n]).astype(np.float64))
        q = np.exp(np.append(stored.logprobs[span], stored.log_tail[n]).astype(np.float64))
        p, q = p / p.sum(), q / q.sum()
        some = p > 0
        out.append(float((p[some] * np.log(p[some] / q[some])).sum()))
    return np.array(out)


@pytest.mark.parametrize("k", [1, 8, 64, 255])
@pytest.mark.parametrize("vocab_size", [300, 128_256])
def test_divergence_of_the_grid_obeys_its_theory(vocab_size, k):
    """A uniform rounding error of step s costs at most s^2/24 on average and (s/2)^2/2 at worst, here s = 1/16."""
    targets = make_targets(k, 300, vocab_size, k=k)
    kl = divergence(targets, round_trip(targets, spec_of(vocab_size)))
    assert kl.mean() <= 1.1 / (16**2 * 24) and kl.max() <= 1.01 / (2 * 32**2)
    assert kl.min() >= -1e-9


@pytest.mark.parametrize(
    ("mode", "entropy", "most_bytes"),
    [("topp95", 2.1, 95), ("topp95", 1.4, 50), ("k64", 2.1, 125), ("draws50", 2.1, 29)],
)
def test_stand_in_teacher_stays_inside_the_budgets(stand_in, mode, entropy, most_bytes):
    dump = stand_in[entropy]
    targets = select(dump, mode)
    result = measure("test", targets, mode, dump.vocab_size, dump.unigram)
    # A toy vocabulary has flatter tokens and a thousand of them a noisy quantile, hence the tenth more.
    assert result.kl_mean <= 1.1 * KL_MEAN and result.kl_p99 <= 1.1 * KL_P99
    assert result.side_bytes <= 4 and result.store_bytes <= most_bytes
    if targets.logprobs is None:
        return
    mass = np.add.reduceat(np.exp(targets.logprobs.astype(np.float64)), targets.offsets[:-1])
    if mode == "topp95":
        assert ((mass >= 0.95 - 1e-6) | (np.diff(targets.offsets) == 100)).all()


@pytest.fixture(scope="module")
def stand_in():
    return make_dumps(4000, (2.1, 1.4), positions=1024)


@pytest.mark.parametrize(
    "vocab_size", [1, 2, 255, 256, 257, 65_535, 65_536, 65_537, 131_072, 131_073, 1 << 18, 1 << 24]
)
def test_vocabulary_widths_keep_every_id(vocab_size):
    assert num_id_planes(vocab_size) == (2 if vocab_size <= 65_536 else 3)
    ids = sorted({0, vocab_size // 2, max(0, vocab_size - 2), vocab_size - 1})
    p = np.full(len(ids), 0.9 / len(ids))
    targets = one_token(ids, p, np.log(0.1), vocab_size)
    assert round_trip(targets, spec_of(vocab_size)).ids.tolist() == ids
    with pytest.raises(StoreError, match=r"ids: token 0, entry 0 holds .* must lie in"):
        one_token([vocab_size], [0.5], np.log(0.5), vocab_size)


def test_extreme_distributions():
    cases = {
        "near one-hot": one_token([5, 9], [1 - 1e-9, 5e-10], np.log(5e-10)),
        "two points": one_token([0, 1], [0.5, 0.5], -np.inf),
        "uniform": one_token(list(range(200)), [1 / 1000] * 200, np.log(0.8)),
        "tail of nearly everything": one_token([3], [1e-5], np.log1p(-1e-5)),
        "steep steps": one_token([1, 2, 3], [1 - 2e-9, 1e-9, 1e-21], np.log(1e-9)),
    }
    for name, targets in cases.items():
        stored = round_trip(targets, spec_of(1000))
        assert divergence(targets, stored)[0] <= 3e-4, name
        SparseTargets.build(
            offsets=stored.offsets, ids=stored.ids, logprobs=stored.logprobs, log_tail=stored.log_tail, vocab_size=1000
        )
    assert round_trip(cases["two points"], spec_of(1000)).log_tail[0] == -np.inf
    # A saturated first step must not shift the entries behind it.
    steep = round_trip(cases["steep steps"], spec_of(1000)).logprobs
    assert steep.tolist() == [0.0, -255 / 16, -510 / 16]


def test_saturated_steps_catch_up():
    logs = np.array([-0.0, -20.0, -21.0, -22.0], np.float32)
    targets = SparseTargets.build(
        offsets=[0, 4], ids=[4, 3, 2, 1], logprobs=logs, log_tail=np.float32([-np.inf]), vocab_size=10, strict=True
    )
    assert round_trip(targets, spec_of(10)).logprobs.tolist() == [0.0, -255 / 16, -21.0, -22.0]


def test_no_target_positions_come_back_neutral():
    targets = concatenate([make_targets(1, 3, k=4, temperatures=(2.0,)), make_targets(2, 2, k=4, temperatures=(2.0,))])
    stored = round_trip(targets, spec_of(1000, temperatures=(2.0,)))
    for n in (2, 4):
        assert stored.offsets[n] == stored.offsets[n + 1]
        assert stored.log_tail[n] == 0 and stored.entropy[n] == 0 and stored.label_logprob[n] == 0
        assert stored.label_rank[n] == 255 and stored.log_tail_at[2.0][n] == 0


def test_tails_at_other_temperatures_keep_their_odds():
    mass = np.array([1e-4, 0.01, 0.3, 0.5, 0.97, 0.9995], np.float64)
    counts = np.full(6, 3, np.uint8)
    stored = np.exp(decode_odds(encode_odds(np.log(mass).astype(np.float32), counts), counts).astype(np.float64))
    odds_error = np.abs(np.log(stored / (1 - stored)) - np.log(mass / (1 - mass)))
    assert odds_error.max() <= 1 / 24 + 1e-3
    kl = mass * np.log(mass / stored) + (1 - mass) * np.log((1 - mass) / (1 - stored))
    assert kl.max() <= 2.5e-4
    assert decode_odds(encode_odds(np.float32([-np.inf, 0.0]), counts[:2]), counts[:2])[0] == -np.inf


def test_tail_codes_are_monotone_and_keep_infinity():
    values = np.float32([0.0, -0.01, -1.0, -15.0, -15.9, -40.0, -np.inf])
    stored = decode_tail(encode_tail(values))
    assert stored[-1] == -np.inf and np.isfinite(stored[:-1]).all() and (np.diff(stored[:-1]) <= 0).all()


def test_prefix_property():
    """The first j entries of a k store are the entries of a j store."""
    whole = make_targets(5, 50, k=32, last=False)
    stored = round_trip(whole, spec_of(1000))
    for n in range(50):
        first, last = int(whole.offsets[n]), int(whole.offsets[n + 1])
        j = min(4, last - first)
        probs = np.exp(whole.logprobs[first : first + j].astype(np.float64))
        part = one_token(whole.ids[first : first + j], probs, np.log(max(1e-9, 1 - probs.sum())))
        again = round_trip(part, spec_of(1000))
        np.testing.assert_array_equal(again.ids, stored.ids[first : first + j])
        np.testing.assert_array_equal(again.logprobs, stored.logprobs[first : first + j])


def sample_targets():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(50, 0.2))
    rows = []
    for _ in range(20):
        ids, counts = np.unique(rng.choice(50, 50, p=p), return_counts=True)
        order = np.lexsort((ids, -counts))
        rows.append((ids[order], counts[order]))
    ids = np.concatenate([r[0] for r in rows]).astype(np.int32)
    return SparseTargets.build(
        offsets=np.concatenate([[0], np.cumsum([len(r[0]) for r in rows])]),
        ids=ids,
        counts=np.concatenate([r[1] for r in rows]),
        num_draws=50,
        log_tail=np.full(20, -3, np.float32),
        vocab_size=50,
        strict=True,
    )


def test_sample_mode_keeps_counts_exactly():
    targets = sample_targets()
    selection = {"mode": "sample", "num_draws": 50, "power": 1.0}
    spec = targets_spec(1, "in", vocab_size=50, selection=selection)
    assert not spec.stores("logprobs") and spec.stores("counts") and not spec.stores("log_weights")
    assert spec.to_json()["required_features"] == ["planes"]
    stored = round_trip(targets, spec)
    np.testing.assert_array_equal(stored.counts, targets.counts)
    np.testing.assert_array_equal(stored.ids, targets.ids)
    assert stored.logprobs is None and stored.num_draws == 50 and stored.log_weights is None
    assert (np.add.reduceat(stored.counts.astype(int), stored.offsets[:-1]) == 50).all()


def test_draw_counts_of_a_store_are_an_unbiased_estimate():
    """10^4 tokens of one distribution: the mean of counts/n is within 4 standard errors of p."""
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(30, 0.5))
    draws = rng.choice(30, (10_000, 25), p=p)
    ids, counts, offsets = [], [], [0]
    for row in draws:
        i, c = np.unique(row, return_counts=True)
        order = np.lexsort((i, -c))
        ids.append(i[order])
        counts.append(c[order])
        offsets.append(offsets[-1] + len(i))
    targets = SparseTargets.build(
        offsets=offsets, ids=np.concatenate(ids), counts=np.concatenate(counts), num_draws=25,
        log_tail=np.full(10_000, -2, np.float32), vocab_size=30, strict=True,
    )  # fmt: skip
    stored = round_trip(targets, targets_spec(1, "in", vocab_size=30, selection={"mode": "sample", "num_draws": 25}))
    estimate = np.bincount(stored.ids, weights=stored.counts, minlength=30) / (25 * 10_000)
    assert (np.abs(estimate - p) <= 4 * np.sqrt(p * (1 - p) / (25 * 10_000)) + 1e-9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [3, 3]}, "id 3 occurs twice"),
        ({"ids": [-1, 3]}, "ids: token 0, entry 0 holds -1"),
        ({"logprobs": np.float32([-2, -1])}, "sorted by log-probability descending"),
        ({"logprobs": np.float32([-1, -1]), "ids": [4, 3]}, "then id ascending"),
        ({"logprobs": np.float32([np.nan, -1])}, "reject rows with NaN"),
        ({"logprobs": np.float32([-1, -np.inf])}, "finite"),
        ({"logprobs": np.float32([np.inf, -1])}, "finite"),
        ({"logprobs": np.float32([-0.1, -0.2])}, "mass sum to"),
        ({"log_tail": np.float32([np.nan])}, "log_tail: token 0 holds nan"),
        ({"log_tail": np.float32([0.5])}, "mass sum to"),
        ({"offsets": [0, 3]}, "must rise from 0 to the 2 entries"),
        ({"offsets": [0, 1, 2]}, "found 3 values for 1 tokens"),
        ({"entropy": np.float32([-1])}, "entropy: token 0 holds -1"),
        ({"entropy": np.float32([1, 2])}, "found 2 values for 1 tokens"),
        ({"label_rank": np.int32([-3])}, "label_rank: token 0 holds -3"),
        ({"label_logprob": np.float32([2])}, "label_logprob: token 0 holds 2"),
        ({"log_tail_at": {2.0: np.float32([0.5])}}, r"log_tail_at\[2.0\]: token 0 holds 0.5"),
        ({"counts": np.uint8([1, 1])}, "counts and num_draws belong together"),
        ({"counts": np.uint8([1, 1]), "num_draws": 3}, "draw counts sum to 2"),
        ({"ids": np.float32([1, 2])}, "found dtype float32"),
        ({"ids": [[1, 2]]}, "found shape"),
        ({"logprobs": None}, "neither logprobs nor counts"),
        ({"log_tail_at": {1.0: np.float32([-1])}}, "temperature 1.0"),
    ],
)
def test_build_refuses_by_rule(change, message):
    good = {"offsets": [0, 2], "ids": [1, 3], "logprobs": np.float32([-1, -2]), "log_tail": np.float32([-1])}
    SparseTargets.build(vocab_size=10, strict=True, **good)
    with pytest.raises(StoreError, match=message):
        SparseTargets.build(vocab_size=10, strict=True, **(good | change))


def test_more_than_255_entries_are_refused():
    ids = list(range(256))
    with pytest.raises(StoreError, match="256 entries, at most 255"):
        one_token(ids, [1 / 1000] * 256, np.log(0.7))
    assert one_token(ids[:255], [1 / 1000] * 255, np.log(0.7)).num_entries == 255


@pytest.mark.parametrize(
    "selection",
    [
        {"mode": "top_k", "k": 0},
        {"mode": "top_k", "k": 256},
        {"mode": "top_k", "k": True},
        {"mode": "top_k"},
        {"mode": "top_p_k", "k": 5, "p": 0.0},
        {"mode": "top_p_k", "k": 5, "p": 1.5},
        {"mode": "sample", "num_draws": 300},
        {"mode": "sample", "num_draws": 5, "k": 2},
        {"mode": "sample", "num_draws": 5, "power": 0.4},
        {"mode": "sample", "num_draws": 5, "power": 1.6},
        {"mode": "sample", "num_draws": 5, "power": float("nan")},
        {"mode": "best"},
    ],
)
def test_bad_selections_are_refused(selection):
    with pytest.raises(StoreError, match="selection"):
        targets_spec(1, "in", selection=selection)


def test_p_of_one_is_allowed():
    assert targets_spec(1, "in", selection={"mode": "top_p_k", "p": 1.0, "k": 255}).max_entries == 255


@given(
    seed=st.integers(0, 2**31),
    vocab_size=st.sampled_from([3, 256, 257, 65_536, 65_537, 200_000]),
    num_tokens=st.integers(1, 40),
    k=st.integers(1, 255),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_targets_survive(seed, vocab_size, num_tokens, k):
    targets = make_targets(seed, num_tokens, vocab_size, k=k, temperatures=(3.0,))
    spec = spec_of(vocab_size, temperatures=(3.0,))
    stored = round_trip(targets, spec)
    np.testing.assert_array_equal(stored.ids, targets.ids)
    np.testing.assert_array_equal(stored.offsets, targets.offsets)
    reachable = targets.logprobs > -15
    assert np.abs(stored.logprobs - targets.logprobs)[reachable].max(initial=0) <= 1 / 32 + 1e-5
    # Stored values are fixed points: encoding them again changes nothing.
    assert same_targets(round_trip(stored, spec), stored)
    SparseTargets.build(
        offsets=stored.offsets, ids=stored.ids, logprobs=stored.logprobs, log_tail=stored.log_tail,
        log_tail_at=stored.log_tail_at, entropy=stored.entropy, label_logprob=stored.label_logprob,
        label_rank=stored.label_rank, vocab_size=vocab_size,
    )  # fmt: skip


def test_slices_and_joins():
    targets = make_targets(3, 20, temperatures=(2.0,))
    parts = [targets.slice(0, 7), targets.slice(7, 7), targets.slice(7, 20)]
    assert same_targets(concatenate(parts), targets)
    with pytest.raises(StoreError, match="outside the 20 tokens"):
        targets.slice(3, 21)


DIGEST = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from tests.storage.stores import make_targets, targets_spec
from potstill.storage import TargetsRow
from potstill.storage.files.unit_file import encode_unit
rows = [TargetsRow(r, 7, make_targets(r, 32, k=16), {"mean_loss": 1.0}) for r in range(4)]
print(encode_unit(rows, spec=targets_spec(4, "in"), unit=0, id_map=None).sha256)
"""


def test_bytes_are_the_same_in_every_process():
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
    found = set()
    for seed in ("0", "1", "random"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        out = subprocess.run(
            [sys.executable, "-c", DIGEST, root], env=env, capture_output=True, text=True, timeout=60, check=True
        )
        found.add(out.stdout.strip())
    assert len(found) == 1 and len(found.pop()) == 64


def test_spec_round_trips_through_json_and_keeps_unknown_fields():
    spec = targets_spec(5, "in", temperatures=(2.0, 0.5), info={"note": "x"})
    assert RunSpec.from_json(spec.to_json()) == spec
    newer = RunSpec.from_json({**spec.to_json(), "color": "red", "format": {"major": 1, "minor": 7}})
    assert newer.unknown["color"] == "red" and newer.fingerprint != spec.fingerprint
    assert RunSpec.from_json(newer.to_json()).fingerprint == newer.fingerprint
