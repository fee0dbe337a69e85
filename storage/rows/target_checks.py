"""The rules that the values of a column keep, each with an error that names column, place, value and rule.

Each check takes the array, the name that errors give it, and the targets under check (docs/format.md has the rules).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.storage.errors import StoreError
from potstill.storage.rows.array_types import DECODED_MASS_EPS, STRICT_MASS_EPS, Int64
from potstill.storage.rows.column import Array, Examined, TargetArrays
from potstill.storage.rows.value_grid import LEAST_LOG_WEIGHT, VALUE_STEP, WEIGHT_TOP

MAX_POSITIVE_LOG = 1e-3
TABLE_ENTRIES = 1 << 21


def check_ids(ids: Array, name: str, found: Examined) -> None:
    """Ids [E] of the vocabulary, distinct within a token."""
    wrong = (ids < 0) | (ids >= found.vocab_size)
    if wrong.any():
        raise entry_error(found, wrong, name, f"ids must lie in [0, {found.vocab_size})", ids)
    _check_distinct(ids, found)


def _check_distinct(ids: Array, found: Examined) -> None:
    """For usual vocabularies a scatter table finds out five times faster than a sort: each entry writes its number
    at (token, id), and a repeated id finds another number than its own."""
    vocab_size, offsets, num_tokens = found.vocab_size, found.targets.offsets, len(found.kept)
    tokens_per_table = TABLE_ENTRIES // vocab_size
    keys = found.token_of * vocab_size + ids
    if tokens_per_table >= 4:
        table = np.empty(tokens_per_table * vocab_size, np.uint32)
        for start in range(0, num_tokens, tokens_per_table):
            first, last = offsets[[start, min(start + tokens_per_table, num_tokens)]]
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


def check_logprobs(values: Array, name: str, found: Examined) -> None:
    """Log-probabilities [E], finite, at most 0, falling within a token; with the tail their mass is at most 1."""
    wrong = ~(np.isfinite(values) & (values <= MAX_POSITIVE_LOG))
    if wrong.any():
        rule = "log-probabilities must be finite and <= 0; drop entries of probability 0, reject rows with NaN"
        raise entry_error(found, wrong, name, rule, values)
    columns = found.targets.columns
    step, ids = values[1:] - values[:-1], _one(columns["ids"])
    wrong = found.same_token & (step > 0)
    if found.strict:
        wrong |= found.same_token & (step == 0) & (ids[1:] < ids[:-1])
    if wrong.any():
        rule = "entries must be sorted by log-probability descending, then id ascending"
        raise entry_error(found, np.append(False, wrong), name, rule, values)
    mass = segment_sums(np.exp(values.astype(np.float64)), found.targets.offsets)
    if columns.get("counts") is None:
        mass = mass + np.where(found.kept > 0, np.exp(_one(columns["log_tail"]).astype(np.float64)), 0.0)
    limit = 1.0 + (STRICT_MASS_EPS if found.strict else DECODED_MASS_EPS)
    if mass.size and float(mass.max()) > limit:
        token = int(mass.argmax())
        raise StoreError(
            f"token {token}: kept and tail mass sum to {mass[token]:.6f}, expected <= {limit}; "
            "give true log-probabilities over the whole vocabulary"
        )


def check_kept_normaliser(targets: TargetArrays, *, strict: bool) -> None:
    """Entries [E] of a store whose normaliser is `kept`: nothing outside of them is known, so they sum to 1.

    `strict` as in `validate`. Raises StoreError that names the token.
    """
    counts, tail = np.diff(targets.offsets), _one(targets.columns["log_tail"])
    wrong = (counts > 0) & ~np.isneginf(tail)
    rule = "the normaliser of the run is `kept`: what lies outside of the entries is unknown, so it must be -inf"
    _first_wrong(wrong, tail, "log_tail", rule)
    mass = segment_sums(np.exp(_one(targets.columns["logprobs"]).astype(np.float64)), targets.offsets)
    off = np.where(counts > 0, np.abs(mass - 1), 0.0)
    limit = STRICT_MASS_EPS if strict else DECODED_MASS_EPS
    if off.size and float(off.max()) > limit:
        token = int(off.argmax())
        raise StoreError(
            f"token {token}: the entries sum to {mass[token]:.6f}, expected 1 within {limit}, because the normaliser "
            "of the run is `kept`; subtract the logarithm of their sum from the log-probabilities of each token"
        )


def check_counts(counts: Array, name: str, found: Examined) -> None:
    """Draw counts [E], at least 1, num_draws in each token; alone they fall within a token."""
    num_draws = found.targets.num_draws
    assert num_draws is not None
    if not 1 <= num_draws <= 255:
        raise StoreError(f"num_draws: found {num_draws}, expected 1..255")
    if int(counts.min()) < 1:
        raise entry_error(found, counts < 1, name, "a kept entry was drawn at least once", counts)
    sums = segment_sums(counts.astype(np.int64), found.targets.offsets)
    wrong = (found.kept > 0) & (sums != num_draws)
    if wrong.any():
        token = int(wrong.argmax())
        raise StoreError(f"token {token}: draw counts sum to {sums[token]}, expected num_draws = {num_draws}")
    if found.targets.columns.get("logprobs") is None:
        rule = "entries without log-probabilities are sorted by count descending, then id ascending"
        _check_falling(counts.astype(np.int16), counts, name, rule, found)


def check_grid_weights(values: Array, name: str, found: Examined) -> None:
    """Log weights [E] of the grid, heaviest first. Their sum has no bound: it is 1 in the mean over draws only."""
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= LEAST_LOG_WEIGHT) & (values <= WEIGHT_TOP)) | (
            np.rint(values * VALUE_STEP) / VALUE_STEP != values
        )
    if wrong.any():
        rule = (
            f"log weights must be multiples of 1/{VALUE_STEP} in [{LEAST_LOG_WEIGHT}, {WEIGHT_TOP}]; put them there by "
            "stochastic rounding, which keeps their mean"
        )
        raise entry_error(found, wrong, name, rule, values)
    rule = "entries with weights are sorted by weight descending, then id ascending"
    _check_falling(values, values, name, rule, found)


def check_log_mass(values: Array, name: str, found: Examined) -> None:
    """Log masses [N] of a tail: at most 0, and 0 at a token without entries."""
    _first_wrong(
        ~(values <= MAX_POSITIVE_LOG) | ((found.kept == 0) & (values != 0)),
        values,
        name,
        "expected <= 0 (and 0 at a token without entries)",
    )


def check_entropy(values: Array, name: str, found: Examined) -> None:
    """Entropies [N] in nats."""
    _first_wrong(~(np.isfinite(values) & (values >= -MAX_POSITIVE_LOG)), values, name, "expected finite and >= 0")


def check_log_probability(values: Array, name: str, found: Examined) -> None:
    """Log-probabilities [N]; -inf is one."""
    _first_wrong(~(values <= MAX_POSITIVE_LOG), values, name, "expected <= 0")


def check_rank(values: Array, name: str, found: Examined) -> None:
    """Ranks [N], 0 the argmax."""
    if values.size and int(values.min()) < 0:
        token = int(values.argmin())
        raise StoreError(f"{name}: token {token} holds {values[token]}, expected >= 0")


def segment_sums(values: Array, offsets: Int64) -> Array:
    """Sum of `values[offsets[n]:offsets[n+1]]` for each n; empty segments give 0."""
    sums = np.zeros(len(offsets) - 1, dtype=values.dtype)
    filled = np.flatnonzero(offsets[1:] > offsets[:-1])
    if filled.size:
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled])
    return sums


def entry_error(found: Examined, wrong: NDArray[np.bool_], name: str, rule: str, values: Array) -> StoreError:
    """The error of the first entry that is `wrong` [E]: its token, place, value and id, and the rule it breaks."""
    entry = int(wrong.argmax())
    token = int(np.searchsorted(found.targets.offsets, entry, side="right")) - 1
    place = entry - int(found.targets.offsets[token])
    identity = _one(found.targets.columns["ids"])[entry]
    return StoreError(f"{name}: token {token}, entry {place} holds {values[entry]} (id {identity}); {rule}")


def _check_falling(keys: Array, values: Array, name: str, rule: str, found: Examined) -> None:
    """Within a token `keys` fall, and ids rise where keys are equal; errors show `values`."""
    step, ids = keys[1:] - keys[:-1], _one(found.targets.columns["ids"])
    wrong = found.same_token & ((step > 0) | ((step == 0) & (ids[1:] < ids[:-1])))
    if wrong.any():
        raise entry_error(found, np.append(False, wrong), name, rule, values)


def _first_wrong(wrong: NDArray[np.bool_], values: Array, name: str, rule: str) -> None:
    if wrong.any():
        token = int(wrong.argmax())
        raise StoreError(f"{name}: token {token} holds {values[token]}, {rule}")


def _one(values: Any) -> Array:
    """The array of a column that has one only."""
    array: Array = values
    return array
