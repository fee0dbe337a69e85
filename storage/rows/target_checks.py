"""The rules that SparseTargets must keep, each with an error that names field, token, value and rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from potstill.storage.errors import StoreError

if TYPE_CHECKING:
    from potstill.storage.rows.sparse_targets import SparseTargets

MAX_POSITIVE_LOG = 1e-3
MAX_VOCAB_SIZE = 1 << 24
TABLE_ENTRIES = 1 << 21


def check_structure(targets: SparseTargets) -> None:
    """Shapes, offsets and entries per token."""
    num_tokens, num_entries, offsets = targets.num_tokens, targets.num_entries, targets.offsets
    if len(offsets) != num_tokens + 1:
        raise StoreError(f"offsets: found {len(offsets)} values for {num_tokens} tokens, expected {num_tokens + 1}")
    kept = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != num_entries or (num_tokens and int(kept.min()) < 0):
        raise StoreError(f"offsets: must rise from 0 to the {num_entries} entries, found {offsets[0]}..{offsets[-1]}")
    if num_tokens and int(kept.max()) > 255:
        raise StoreError(f"token {int(kept.argmax())}: {int(kept.max())} entries, at most 255 can be stored; lower k")
    for name in ("logprobs", "counts", "log_weights"):
        value = getattr(targets, name)
        if value is not None and len(value) != num_entries:
            raise StoreError(f"{name}: found {len(value)} values for {num_entries} entries")
    columns = {name: getattr(targets, name) for name in ("entropy", "label_logprob", "label_rank")}
    columns |= {f"log_tail_at[{t}]": v for t, v in targets.log_tail_at.items()}
    for name, value in columns.items():
        if value is not None and len(value) != num_tokens:
            raise StoreError(f"{name}: found {len(value)} values for {num_tokens} tokens")
    if targets.log_weights is not None:
        if targets.logprobs is not None or targets.counts is not None or targets.num_draws is None:
            raise StoreError("log_weights come with num_draws, and with neither logprobs nor counts")
        return
    if targets.logprobs is None and targets.counts is None:
        raise StoreError("targets hold neither logprobs nor counts; give at least one of them")
    if (targets.counts is None) != (targets.num_draws is None):
        raise StoreError("counts and num_draws belong together; give both (sample mode) or none")


def check_entries(targets: SparseTargets, *, vocab_size: int, strict: bool) -> None:
    """Ids, distinctness, order, values and mass."""
    ids, offsets = targets.ids, targets.offsets
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise StoreError(f"vocab_size: found {vocab_size}, expected 1..{MAX_VOCAB_SIZE}")
    if not len(ids):
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        _entry_error(targets, wrong, "ids", f"ids must lie in [0, {vocab_size})", ids)
    kept = np.diff(offsets)
    token_of = np.repeat(np.arange(targets.num_tokens, dtype=np.int64), kept)
    _check_distinct(targets, token_of, vocab_size)
    same_token = token_of[1:] == token_of[:-1]
    if targets.logprobs is not None:
        _check_logprobs(targets, same_token, strict=strict)
    if targets.counts is not None:
        _check_counts(targets, same_token, kept, strict=strict)
    if targets.log_weights is not None:
        _check_log_weights(targets, same_token)


def _check_distinct(targets: SparseTargets, token_of: NDArray[np.int64], vocab_size: int) -> None:
    """Ids are distinct within a token. For usual vocabularies a scatter table finds out five times faster than a sort:
    each entry writes its number at (token, id), and a repeated id finds another number than its own."""
    ids, tokens_per_table = targets.ids, TABLE_ENTRIES // vocab_size
    keys = token_of * vocab_size + ids
    if tokens_per_table >= 4:
        table = np.empty(tokens_per_table * vocab_size, np.uint32)
        for start in range(0, targets.num_tokens, tokens_per_table):
            first, last = targets.offsets[[start, min(start + tokens_per_table, targets.num_tokens)]]
            places = keys[first:last] - start * vocab_size
            numbers = np.arange(last - first, dtype=np.uint32)
            table[places] = numbers
            if not np.array_equal(table[places], numbers):
                break
        else:
            return
    keys.sort()
    twice = keys[1:] == keys[:-1]
    if twice.any():
        key = int(keys[1:][twice][0])
        raise StoreError(f"token {key // vocab_size}: id {key % vocab_size} occurs twice; ids must be distinct")


def _check_logprobs(targets: SparseTargets, same_token: NDArray[np.bool_], *, strict: bool) -> None:
    from potstill.storage.rows.sparse_targets import DECODED_MASS_EPS, STRICT_MASS_EPS

    values = targets.logprobs
    assert values is not None
    wrong = ~(np.isfinite(values) & (values <= MAX_POSITIVE_LOG))
    if wrong.any():
        rule = "log-probabilities must be finite and <= 0; drop entries of probability 0, reject rows with NaN"
        _entry_error(targets, wrong, "logprobs", rule, values)
    step = values[1:] - values[:-1]
    wrong = same_token & (step > 0)
    if strict:
        wrong |= same_token & (step == 0) & (targets.ids[1:] < targets.ids[:-1])
    if wrong.any():
        rule = "entries must be sorted by log-probability descending, then id ascending"
        _entry_error(targets, np.append(False, wrong), "logprobs", rule, values)
    mass = segment_sums(np.exp(values.astype(np.float64)), targets.offsets)
    if targets.counts is None:
        mass = mass + np.where(np.diff(targets.offsets) > 0, np.exp(targets.log_tail.astype(np.float64)), 0.0)
    limit = 1.0 + (STRICT_MASS_EPS if strict else DECODED_MASS_EPS)
    if mass.size and float(mass.max()) > limit:
        token = int(mass.argmax())
        raise StoreError(
            f"token {token}: kept and tail mass sum to {mass[token]:.6f}, expected <= {limit}; "
            "give true log-probabilities over the whole vocabulary"
        )


def _check_counts(
    targets: SparseTargets, same_token: NDArray[np.bool_], kept: NDArray[np.int64], *, strict: bool
) -> None:
    counts, num_draws = targets.counts, targets.num_draws
    assert counts is not None and num_draws is not None
    if not 1 <= num_draws <= 255:
        raise StoreError(f"num_draws: found {num_draws}, expected 1..255")
    if int(counts.min()) < 1:
        _entry_error(targets, counts < 1, "counts", "a kept entry was drawn at least once", counts)
    sums = segment_sums(counts.astype(np.int64), targets.offsets)
    wrong = (kept > 0) & (sums != num_draws)
    if wrong.any():
        token = int(wrong.argmax())
        raise StoreError(f"token {token}: draw counts sum to {sums[token]}, expected num_draws = {num_draws}")
    if targets.logprobs is None:
        step = counts[1:].astype(np.int16) - counts[:-1]
        bad = same_token & ((step > 0) | ((step == 0) & (targets.ids[1:] < targets.ids[:-1])))
        if bad.any():
            rule = "entries without log-probabilities are sorted by count descending, then id ascending"
            _entry_error(targets, np.append(False, bad), "counts", rule, counts)


def _check_log_weights(targets: SparseTargets, same_token: NDArray[np.bool_]) -> None:
    """Values of the grid, heaviest first. Their sum has no bound: it is 1 in the mean over draws only."""
    from potstill.storage.rows.grid import LEAST_LOG_WEIGHT, VALUE_STEP, WEIGHT_TOP

    values, ids = targets.log_weights, targets.ids
    assert values is not None
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= LEAST_LOG_WEIGHT) & (values <= WEIGHT_TOP)) | (
            np.rint(values * VALUE_STEP) / VALUE_STEP != values
        )
    if wrong.any():
        rule = (
            f"log weights must be multiples of 1/{VALUE_STEP} in [{LEAST_LOG_WEIGHT}, {WEIGHT_TOP}]; put them there by "
            "stochastic rounding, which keeps their mean"
        )
        _entry_error(targets, wrong, "log_weights", rule, values)
    step = values[1:] - values[:-1]
    wrong = same_token & ((step > 0) | ((step == 0) & (ids[1:] < ids[:-1])))
    if wrong.any():
        rule = "entries with weights are sorted by weight descending, then id ascending"
        _entry_error(targets, np.append(False, wrong), "log_weights", rule, values)


def check_side_columns(targets: SparseTargets) -> None:
    """Tail, entropy and label columns: no NaN, right sign, neutral values where there is no target."""
    tails = {"log_tail": targets.log_tail} | {f"log_tail_at[{t}]": v for t, v in targets.log_tail_at.items()}
    without = np.diff(targets.offsets) == 0
    for name, value in tails.items():
        wrong = ~(value <= MAX_POSITIVE_LOG) | (without & (value != 0))
        if wrong.any():
            token = int(wrong.argmax())
            raise StoreError(
                f"{name}: token {token} holds {value[token]}, expected <= 0 (and 0 at a token without entries)"
            )
    for temperature in targets.log_tail_at:
        if not (0 < temperature < 1e6) or temperature == 1.0:
            raise StoreError(f"log_tail_at: temperature {temperature} must be positive and not 1")
    if targets.entropy is not None:
        wrong = ~(np.isfinite(targets.entropy) & (targets.entropy >= -MAX_POSITIVE_LOG))
        if wrong.any():
            token = int(wrong.argmax())
            raise StoreError(f"entropy: token {token} holds {targets.entropy[token]}, expected finite and >= 0")
    if targets.label_logprob is not None:
        wrong = ~(targets.label_logprob <= MAX_POSITIVE_LOG)
        if wrong.any():
            token = int(wrong.argmax())
            raise StoreError(f"label_logprob: token {token} holds {targets.label_logprob[token]}, expected <= 0")
    if targets.label_rank is not None and targets.num_tokens and int(targets.label_rank.min()) < 0:
        token = int(targets.label_rank.argmin())
        raise StoreError(f"label_rank: token {token} holds {targets.label_rank[token]}, expected >= 0")


def segment_sums(values: NDArray, offsets: NDArray[np.int64]) -> NDArray:  # type: ignore[type-arg]
    """Sum of `values[offsets[n]:offsets[n+1]]` for each n; empty segments give 0."""
    sums = np.zeros(len(offsets) - 1, dtype=values.dtype)
    filled = np.flatnonzero(offsets[1:] > offsets[:-1])
    if filled.size:
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled])
    return sums


def _entry_error(targets: SparseTargets, wrong: NDArray[np.bool_], name: str, rule: str, values: NDArray) -> None:  # type: ignore[type-arg]
    entry = int(wrong.argmax())
    token = int(np.searchsorted(targets.offsets, entry, side="right")) - 1
    place = entry - int(targets.offsets[token])
    raise StoreError(f"{name}: token {token}, entry {place} holds {values[entry]} (id {targets.ids[entry]}); {rule}")
