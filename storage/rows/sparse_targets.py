"""SparseTargets: a teacher's truncated predictions for N tokens in compressed sparse rows (NumPy).

Legend: N tokens, E entries, V vocabulary. `build` is the one place that validates; inner code trusts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from potstill.storage.errors import StoreError

MAX_ENTRIES_PER_TOKEN = 255
NO_RANK = 255
STRICT_MASS_EPS = 1e-3
# One grid step is 1/16 nat, so a stored mass may exceed the true one by e^(1/32).
DECODED_MASS_EPS = 0.0324

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]


class Candidates(NamedTuple):
    """What a teacher keeps of one token's distribution.

    ids [k] int32, most probable first; probs [k] float32: full-vocabulary probabilities at T=1, or, where a store of
    draws keeps no log-probabilities, their unbiased estimates (share of the draws, or weights); tail: probability of
    all other ids together. k and tail are 0 where there is no target.
    """

    ids: Int32
    probs: Float32
    tail: float


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseTargets:
    """Teacher distributions of N tokens; positions without a target have no entries and `log_tail` 0.

    offsets [N+1] int64, ids [E] int32 (distinct within a token, order: log-probability descending, then id
    ascending), logprobs [E] float32 natural logs of full-vocabulary probabilities at T=1 (None in sample mode
    unless kept), counts [E] uint8 draw counts (sample mode, power 1), log_weights [E] float32 logs of weights whose
    mean is the probability, on the grid of the store (sample mode at another power: no logprobs, no counts; order:
    weight descending, then id ascending; their sum may exceed 1), log_tail [N] float32 log mass outside the
    entries (-inf: none), entropy / label_logprob [N] float32, label_rank [N] int32 (0 is the argmax),
    log_tail_at {T: [N] float32} log tail mass after a softmax at temperature T.
    """

    offsets: Int64
    ids: Int32
    logprobs: Float32 | None
    counts: UInt8 | None
    num_draws: int | None
    log_tail: Float32
    entropy: Float32 | None
    label_logprob: Float32 | None
    label_rank: Int32 | None
    log_tail_at: Mapping[float, Float32] = field(default_factory=dict)
    log_weights: Float32 | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.log_tail)

    @property
    def num_entries(self) -> int:
        return len(self.ids)

    @classmethod
    def build(
        cls,
        *,
        offsets: ArrayLike,
        ids: ArrayLike,
        log_tail: ArrayLike,
        vocab_size: int,
        logprobs: ArrayLike | None = None,
        counts: ArrayLike | None = None,
        log_weights: ArrayLike | None = None,
        num_draws: int | None = None,
        entropy: ArrayLike | None = None,
        label_logprob: ArrayLike | None = None,
        label_rank: ArrayLike | None = None,
        log_tail_at: Mapping[float, ArrayLike] | None = None,
        strict: bool = False,
    ) -> SparseTargets:
        """Validate and build; raises StoreError that names the field, the token, the value and the rule.

        Values read back from a store pass (ties in any id order, mass up to e^(1/32)); `strict=True` asks for
        what the encoder asks for: ties by ascending id and mass <= 1 + 1e-3.
        """
        targets = cls(
            offsets=_array("offsets", offsets, np.int64),
            ids=_array("ids", ids, np.int32),
            logprobs=_optional("logprobs", logprobs, np.float32),
            counts=_optional("counts", counts, np.uint8),
            log_weights=_optional("log_weights", log_weights, np.float32),
            num_draws=None if num_draws is None else int(num_draws),
            log_tail=_array("log_tail", log_tail, np.float32),
            entropy=_optional("entropy", entropy, np.float32),
            label_logprob=_optional("label_logprob", label_logprob, np.float32),
            label_rank=_optional("label_rank", label_rank, np.int32),
            log_tail_at={float(t): _array(f"log_tail_at[{t}]", v, np.float32) for t, v in (log_tail_at or {}).items()},
        )
        validate(targets, vocab_size=vocab_size, strict=strict)
        return targets

    @classmethod
    def empty(
        cls,
        num_tokens: int,
        *,
        num_draws: int | None = None,
        with_logprobs: bool = True,
        with_weights: bool = False,
        temperatures: Sequence[float] = (),
    ) -> SparseTargets:
        """`num_tokens` positions without any target, with the arrays that a store of this selection has."""
        return cls(
            offsets=np.zeros(num_tokens + 1, np.int64),
            ids=np.zeros(0, np.int32),
            logprobs=np.zeros(0, np.float32) if with_logprobs else None,
            counts=None if num_draws is None or with_weights else np.zeros(0, np.uint8),
            log_weights=np.zeros(0, np.float32) if with_weights else None,
            num_draws=num_draws,
            log_tail=np.zeros(num_tokens, np.float32),
            entropy=np.zeros(num_tokens, np.float32),
            label_logprob=np.zeros(num_tokens, np.float32),
            label_rank=np.full(num_tokens, NO_RANK, np.int32),
            log_tail_at={t: np.zeros(num_tokens, np.float32) for t in temperatures},
        )

    def candidates(self, token: int) -> Candidates:
        """The kept entries of token `token` (0 .. num_tokens - 1) as probabilities. Raises StoreError outside of it."""
        if not 0 <= token < self.num_tokens:
            raise StoreError(f"candidates: token {token} does not exist, these targets have {self.num_tokens}")
        first, last = int(self.offsets[token]), int(self.offsets[token + 1])
        if self.logprobs is not None:
            probs = np.exp(self.logprobs[first:last])
        elif self.log_weights is not None:
            probs = np.exp(self.log_weights[first:last])
        else:
            assert self.counts is not None and self.num_draws is not None
            probs = self.counts[first:last].astype(np.float32) / np.float32(self.num_draws)
        return Candidates(self.ids[first:last], probs, float(np.exp(self.log_tail[token])) if last > first else 0.0)

    def slice(self, start: int, stop: int) -> SparseTargets:
        """Tokens [start, stop) as views where possible."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise StoreError(f"slice [{start}, {stop}) is outside the {self.num_tokens} tokens of these targets")
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return SparseTargets(
            offsets=self.offsets[start : stop + 1] - first,
            ids=self.ids[first:last],
            logprobs=None if self.logprobs is None else self.logprobs[first:last],
            counts=None if self.counts is None else self.counts[first:last],
            log_weights=None if self.log_weights is None else self.log_weights[first:last],
            num_draws=self.num_draws,
            log_tail=self.log_tail[start:stop],
            entropy=None if self.entropy is None else self.entropy[start:stop],
            label_logprob=None if self.label_logprob is None else self.label_logprob[start:stop],
            label_rank=None if self.label_rank is None else self.label_rank[start:stop],
            log_tail_at={t: v[start:stop] for t, v in self.log_tail_at.items()},
        )


def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Join targets token-wise; all parts must hold the same optional arrays and the same number of draws."""
    if not parts:
        raise StoreError("concatenate needs at least one SparseTargets, found none")
    head = parts[0]
    if len(parts) == 1:
        return head
    for name in ("logprobs", "counts", "log_weights", "entropy", "label_logprob", "label_rank"):
        if len({getattr(part, name) is None for part in parts}) > 1:
            raise StoreError(f"concatenate: some parts have {name} and some have not; drop or add it everywhere")
    if len({part.num_draws for part in parts}) > 1 or len({tuple(part.log_tail_at) for part in parts}) > 1:
        raise StoreError("concatenate: the parts differ in num_draws or in the temperatures of log_tail_at")

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else np.concatenate(values)

    shifts = np.cumsum([0] + [part.num_entries for part in parts[:-1]])
    offsets = [part.offsets[1:] + shift for part, shift in zip(parts, shifts, strict=True)]
    return SparseTargets(
        offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
        ids=np.concatenate([part.ids for part in parts]),
        logprobs=joined("logprobs"),
        counts=joined("counts"),
        log_weights=joined("log_weights"),
        num_draws=head.num_draws,
        log_tail=np.concatenate([part.log_tail for part in parts]),
        entropy=joined("entropy"),
        label_logprob=joined("label_logprob"),
        label_rank=joined("label_rank"),
        log_tail_at={t: np.concatenate([part.log_tail_at[t] for part in parts]) for t in head.log_tail_at},
    )


def _array(name: str, value: ArrayLike, dtype: type) -> NDArray:  # type: ignore[type-arg]
    array = np.asarray(value)
    if array.ndim != 1:
        raise StoreError(f"{name}: found shape {array.shape}, expected one dimension; flatten the tokens")
    wanted_kind = "f" if np.dtype(dtype).kind == "f" else "iu"
    if array.size and array.dtype.kind not in wanted_kind:
        raise StoreError(f"{name}: found dtype {array.dtype}, expected {np.dtype(dtype)}; convert it explicitly")
    if array.size and wanted_kind == "iu":
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise StoreError(f"{name}: values {array.min()}..{array.max()} do not fit {np.dtype(dtype)}")
    return np.ascontiguousarray(array, dtype=dtype)


def _optional(name: str, value: ArrayLike | None, dtype: type) -> NDArray | None:  # type: ignore[type-arg]
    return None if value is None else _array(name, value, dtype)


def validate(targets: SparseTargets, *, vocab_size: int, strict: bool) -> None:
    """Check every rule of the class docstring; raises StoreError on the first one broken."""
    from potstill.storage.rows.target_checks import check_entries, check_side_columns, check_structure

    check_structure(targets)
    check_entries(targets, vocab_size=vocab_size, strict=strict)
    check_side_columns(targets)
