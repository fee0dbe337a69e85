"""SparseTargets: a teacher's truncated predictions for N tokens in compressed sparse rows (NumPy).

Legend: N tokens, E entries, R rows, V vocabulary. `build` is the one place that validates; inner code trusts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from potstill.storage.errors import StoreError
from potstill.storage.rows.array_types import Float32, Int32, Int64, UInt8
from potstill.storage.rows.column import Array, Axis, StoreView, Values, as_array
from potstill.storage.rows.columns import COLUMNS, known, stored_columns
from potstill.storage.rows.validation import validate

EntryKind = Literal["probability", "weight", "share"]
Span = slice  # the builtin, where a method has its name


class Candidates(NamedTuple):
    """What a teacher keeps of one token's distribution.

    ids [k] int32, most probable first; probs [k] float32: full-vocabulary probabilities at T=1, or, where a store of
    draws keeps no log-probabilities, their unbiased estimates (share of the draws, or weights); tail: probability of
    all other ids together. k and tail are 0 where there is no target.
    """

    ids: Int32
    probs: Float32
    tail: float


@dataclass(frozen=True, eq=False, init=False)
class SparseTargets:
    """Teacher distributions of N tokens; positions without a target have no entries and `log_tail` 0.

    offsets [N+1] int64: token n owns the entries offsets[n] .. offsets[n+1]. columns: the arrays by name, those that
    are there; `storage/rows/columns.py` says what each is. num_draws: draws per token (sample mode), or None.

    The columns of the format, also attributes (None where absent): ids [E] int32 (distinct within a token, order:
    log-probability descending, then id ascending), logprobs [E] float32 natural logs of full-vocabulary probabilities
    at T=1 (absent in sample mode unless kept), counts [E] uint8 draw counts (sample mode, power 1), log_weights [E]
    float32 logs of weights whose mean is the probability, on the grid of the store (sample mode at another power: no
    logprobs, no counts; order: weight descending, then id ascending; their sum may exceed 1), log_tail [N] float32 log
    mass outside the entries (-inf: none), entropy / label_logprob [N] float32, label_rank [N] int32 (0 is the argmax),
    log_tail_at {T: [N] float32} log tail mass after a softmax at temperature T.
    """

    offsets: Int64
    columns: Mapping[str, Values]
    num_draws: int | None

    def __init__(
        self,
        *,
        offsets: Int64,
        columns: Mapping[str, Values] | None = None,
        num_draws: int | None = None,
        **named: Values | None,
    ) -> None:
        """Nothing is copied or checked but the names. Columns given by name replace those of `columns`; None drops."""
        merged = {**(columns or {}), **named}
        known(merged)
        present = {name: v for name, v in merged.items() if v is not None and not (isinstance(v, Mapping) and not v)}
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "columns", present)
        object.__setattr__(self, "num_draws", num_draws)

    @classmethod
    def build(
        cls,
        *,
        offsets: ArrayLike,
        vocab_size: int,
        num_draws: int | None = None,
        strict: bool = False,
        **columns: ArrayLike | Mapping[float, ArrayLike] | None,
    ) -> SparseTargets:
        """Validate and build; raises StoreError that names the field, the token, the value and the rule.

        `columns` are the arrays by name; ids and log_tail are due. Values read back from a store pass (ties in any id
        order, mass up to e^(1/32)); `strict=True` asks for what the encoder asks for: ties by ascending id and mass
        <= 1 + 1e-3.
        """
        known(columns)
        given = {name: value for name, value in columns.items() if value is not None}
        arrays: dict[str, Values] = {}
        for column in COLUMNS.values():
            value = given.get(column.name)
            if column.per_temperature and isinstance(value, Mapping):
                at = {float(t): v for t, v in value.items()}
                arrays[column.name] = {t: column.as_array(f"{column.name}[{t}]", v) for t, v in at.items()}
            elif value is not None:
                arrays[column.name] = column.as_array(column.name, value)
        draws = None if num_draws is None else int(num_draws)
        targets = cls(offsets=as_array("offsets", offsets, np.int64), columns=arrays, num_draws=draws)
        validate(targets, vocab_size=vocab_size, strict=strict)
        return targets

    @classmethod
    def empty(cls, num_tokens: int, *, spec: StoreView) -> SparseTargets:
        """`num_tokens` positions of one row without any target, with the columns that a store of that run has."""
        arrays: dict[str, Values] = {}
        for column in stored_columns(spec):
            shape = () if column.vector is None else (column.vector(spec),)
            if column.per_temperature:
                arrays[column.name] = {t: column.blank(num_tokens, shape) for t in spec.temperatures}
            else:
                arrays[column.name] = column.blank(num_tokens, shape)
        return cls(offsets=np.zeros(num_tokens + 1, np.int64), columns=arrays, num_draws=spec.num_draws)

    @property
    def num_tokens(self) -> int:
        return len(self.log_tail)

    @property
    def num_entries(self) -> int:
        return len(self.ids)

    @property
    def ids(self) -> Int32:
        return cast("Int32", self.columns["ids"])

    @property
    def logprobs(self) -> Float32 | None:
        return cast("Float32 | None", self.columns.get("logprobs"))

    @property
    def counts(self) -> UInt8 | None:
        return cast("UInt8 | None", self.columns.get("counts"))

    @property
    def log_weights(self) -> Float32 | None:
        return cast("Float32 | None", self.columns.get("log_weights"))

    @property
    def log_tail(self) -> Float32:
        return cast("Float32", self.columns["log_tail"])

    @property
    def entropy(self) -> Float32 | None:
        return cast("Float32 | None", self.columns.get("entropy"))

    @property
    def label_logprob(self) -> Float32 | None:
        return cast("Float32 | None", self.columns.get("label_logprob"))

    @property
    def label_rank(self) -> Int32 | None:
        return cast("Int32 | None", self.columns.get("label_rank"))

    @property
    def log_tail_at(self) -> Mapping[float, Float32]:
        return cast("Mapping[float, Float32]", self.columns.get("log_tail_at", {}))

    def described(self) -> dict[str, tuple[Axis, Values]]:
        """Axis and values of each column that a loss may use: all that a copy on a device needs to know of them."""
        return {name: (COLUMNS[name].axis, values) for name, values in self.columns.items() if COLUMNS[name].on_device}

    def each(self, function: Callable[[str, Array], Array], *, offsets: Int64 | None = None) -> SparseTargets:
        """These targets with `function(name, array)` in place of each array of a column, and new offsets if given."""
        changed: dict[str, Values] = {
            name: {t: function(name, v) for t, v in values.items()}
            if isinstance(values, Mapping)
            else function(name, values)
            for name, values in self.columns.items()
        }
        return SparseTargets(
            offsets=self.offsets if offsets is None else offsets, columns=changed, num_draws=self.num_draws
        )

    @property
    def entry_column(self) -> tuple[EntryKind, Array]:
        """What is kept of entries, and the column [E]: log-probabilities, log weights of draws, or draw counts."""
        if self.logprobs is not None:
            return "probability", self.logprobs
        if self.log_weights is not None:
            return "weight", self.log_weights
        assert self.counts is not None
        return "share", self.counts

    def entry_mass(self, dtype: type[np.floating[Any]] = np.float32) -> tuple[EntryKind, Array]:
        """Probability of each entry [E]: the teacher's own, or its estimate, a weight or a share of the draws."""
        kind, values = self.entry_column
        if kind == "share":
            assert self.num_draws is not None
            return kind, values.astype(dtype) / dtype(self.num_draws)
        return kind, np.exp(values.astype(dtype, copy=False))

    def candidates(self, token: int) -> Candidates:
        """The kept entries of token `token` (0 .. num_tokens - 1) as probabilities. Raises StoreError outside of it."""
        if not 0 <= token < self.num_tokens:
            raise StoreError(f"candidates: token {token} does not exist, these targets have {self.num_tokens}")
        one = self.slice(token, token + 1)
        return Candidates(one.ids, one.entry_mass()[1], float(np.exp(one.log_tail[0])) if one.num_entries else 0.0)

    def slice(self, start: int, stop: int, *, rows: Span | None = None) -> SparseTargets:
        """Tokens [start, stop) as views where possible; `rows`: which rows they are of (None: all that there are)."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise StoreError(f"slice [{start}, {stop}) is outside the {self.num_tokens} tokens of these targets")
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        parts: dict[Axis, slice] = {
            "token": slice(start, stop),
            "entry": slice(first, last),
            "row": slice(None) if rows is None else rows,
        }
        return self.each(
            lambda name, array: array[parts[COLUMNS[name].axis]], offsets=self.offsets[start : stop + 1] - first
        )

    def spread(self, mask: NDArray[np.bool_]) -> SparseTargets:
        """These N targets at the places that `mask` [M] marks, in order; no target at the others."""
        entries = np.zeros(len(mask), np.int64)
        entries[mask] = np.diff(self.offsets)

        def at_places(name: str, array: Array) -> Array:
            if COLUMNS[name].axis != "token":
                return array
            wide = np.full((len(mask), *array.shape[1:]), COLUMNS[name].fill, array.dtype)
            wide[mask] = array
            return wide

        return self.each(at_places, offsets=offsets_of(entries))

    def keep_entries(self, live: NDArray[np.bool_]) -> SparseTargets:
        """Without the entries that `live` [E] does not mark."""
        token_of = np.repeat(np.arange(self.num_tokens), np.diff(self.offsets))[live]
        entries = np.bincount(token_of, minlength=self.num_tokens)
        return self.each(
            lambda name, array: array[live] if COLUMNS[name].axis == "entry" else array, offsets=offsets_of(entries)
        )

    def take_entries(self, order: NDArray[np.int64]) -> SparseTargets:
        """The entries in another `order` [E] within their tokens."""
        return self.each(lambda name, array: array[order] if COLUMNS[name].axis == "entry" else array)

    def without_targets(self, num_tokens: int) -> SparseTargets:
        """`num_tokens` positions of one row without any target, with the columns that these targets have."""
        return self.each(
            lambda name, array: COLUMNS[name].blank(num_tokens, array.shape[1:]),
            offsets=np.zeros(num_tokens + 1, np.int64),
        )


def offsets_of(entries: NDArray[np.int64]) -> Int64:
    """offsets [N+1] int64 of tokens with that many entries [N]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(entries, dtype=np.int64)])


def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Join targets token-wise; all parts must hold the same columns and the same number of draws."""
    if not parts:
        raise StoreError("concatenate needs at least one SparseTargets, found none")
    head = parts[0]
    if len(parts) == 1:
        return head
    columns: dict[str, Values] = {}
    for column in COLUMNS.values():
        values = [part.columns.get(column.name) for part in parts]
        if not column.per_temperature and len({value is None for value in values}) > 1:
            if not (column.optional and column.axis == "entry"):
                raise StoreError(
                    f"concatenate: some parts have {column.name} and some have not; drop or add it everywhere"
                )
            # An optional value of entries is stored as no bytes, as is that of a row without entries.
            values = _filled(parts, values, column.name)
        if column.per_temperature:
            maps = [cast("Mapping[float, Array]", value or {}) for value in values]
            if len({tuple(at) for at in maps}) > 1:
                raise StoreError(f"concatenate: the parts differ in num_draws or in the temperatures of {column.name}")
            columns[column.name] = {t: np.concatenate([at[t] for at in maps]) for t in maps[0]}
        elif values[0] is not None:
            columns[column.name] = np.concatenate(cast("list[Array]", values))
    if len({part.num_draws for part in parts}) > 1:
        raise StoreError("concatenate: the parts differ in num_draws or in the temperatures of log_tail_at")
    shifts = np.cumsum([0] + [part.num_entries for part in parts[:-1]])
    offsets = [part.offsets[1:] + shift for part, shift in zip(parts, shifts, strict=True)]
    return SparseTargets(
        offsets=np.concatenate([np.zeros(1, np.int64), *offsets]), columns=columns, num_draws=head.num_draws
    )


def _filled(parts: Sequence[SparseTargets], values: list[Values | None], name: str) -> list[Values | None]:
    """`values` with no entries where a part without entries lacks them."""
    shape = next(cast("Array", value).shape[1:] for value in values if value is not None)
    filled = list(values)
    for number, part in enumerate(parts):
        if values[number] is None:
            if part.num_entries:
                raise StoreError(f"concatenate: some parts have {name} and some have not; drop or add it everywhere")
            filled[number] = COLUMNS[name].blank(0, shape)
    return filled
