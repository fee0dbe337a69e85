"""The columns that a tokens store may have besides its tokens and documents. A new one is one entry of TOKENS_COLUMNS.

A run names them in `columns`; each has a feature, so that a reader without the entry refuses the store. The entry
drives the planes, the coding, the checks of the writer and of the reader, and verify.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from potstill.storage.errors import CorruptError, StoreError
from potstill.storage.rows.array_types import UInt8
from potstill.storage.rows.column import Array, StoreView
from potstill.storage.rows.planes import Plane


@dataclass(frozen=True, kw_only=True)
class TokensColumn:
    """A column of a tokens store: one value per token [n] or one for the row [1], in one plane named like it.

    name     key of the array: TokensRow.column(name)
    axis     what its plane has `width` bytes for: token or row; or bit: one bit per token, ceil(n/8) bytes
    dtype    of the array
    encode   array -> its bytes; decode(bytes, n) is the inverse, and raises CorruptError for bytes that no writer makes
    check    raises StoreError that names the value and the rule; None: every value of the dtype may be
    feature  name in required_features of a store that has the column
    implied  optional columns only: whether an array says no more than its absence. Then the plane is empty, as it is
             where the row has no array, so that equal rows have equal bytes; readers give None for both
    """

    name: str
    axis: Literal["bit", "token", "row"]
    dtype: type[np.generic]
    encode: Callable[[Array], UInt8]
    decode: Callable[[UInt8, int], Array]
    feature: str
    width: int = 1
    check: Callable[[Array], None] | None = None
    implied: Callable[[Array], bool] | None = None

    @property
    def optional(self) -> bool:
        """Whether a row may come without it."""
        return self.implied is not None

    @property
    def plane(self) -> Plane:
        """Its plane. No reader may leave it out: what a row says would be another thing without it."""
        return Plane(self.name, self.axis, self.width, self.optional)

    @property
    def feature_rule(self) -> str:
        """What a reader says where feature and columns of a run contradict each other."""
        return f"{self.name} and the feature {self.feature} come together"

    def is_stored(self, spec: StoreView) -> bool:
        """Whether a store of that run has the column."""
        return spec.kind == "tokens" and self.name in spec.columns

    def check_row(self, values: Array | None, *, num_tokens: int, spec: StoreView) -> None:
        """Raise StoreError unless the array of a row fits its store."""
        if values is None:
            if self.is_stored(spec) and not self.optional:
                raise StoreError(f"{self.name} is missing, and the run names it; its columns are {list(spec.columns)}")
            return
        if not self.is_stored(spec):
            raise StoreError(
                f"{self.name} does not fit: the run does not name the column, its columns are {list(spec.columns)}; "
                f"create the store with columns=({self.name!r},), or leave it out of the row"
            )
        shape = (1 if self.axis == "row" else num_tokens,)
        if values.dtype != self.dtype or values.shape != shape:
            wanted = f"{np.dtype(self.dtype)} of shape {shape}"
            raise StoreError(f"{self.name}: found {values.dtype} of shape {values.shape}, expected {wanted}")
        if self.check is not None:
            self.check(values)

    def to_bytes(self, values: Array | None) -> UInt8:
        """The plane of one row."""
        if values is None or (self.implied is not None and self.implied(values)):
            return np.zeros(0, np.uint8)
        return self.encode(values)

    def from_bytes(self, plane: UInt8, *, num_tokens: int) -> Array | None:
        """Inverse of to_bytes for a row of `num_tokens`; CorruptError for what to_bytes never gives."""
        if not plane.size and self.optional:
            return None
        values = self.decode(plane, num_tokens)
        if self.implied is not None and self.implied(values):
            raise CorruptError(f"plane {self.name} spells out what an empty one says")
        return values


def pack_mask(mask: Array) -> UInt8:
    """Bools [n] -> ceil(n/8) bytes: token 8b + i is bit i of byte b, counted from the lowest; the rest is 0."""
    return np.packbits(mask, bitorder="little")


def unpack_mask(plane: UInt8, num_tokens: int) -> Array:
    """Inverse of pack_mask. Raises CorruptError where a bit is set behind the last token."""
    bits = np.unpackbits(plane, bitorder="little")
    if bits[num_tokens:].any():
        raise CorruptError(f"plane mask has bits behind the last of {num_tokens} tokens")
    return bits[:num_tokens].view(np.bool_)


def _all_on(mask: Array) -> bool:
    return bool(mask.all())


_TABLE = (
    TokensColumn(
        name="mask",
        axis="bit",
        dtype=np.bool_,
        encode=pack_mask,
        decode=unpack_mask,
        feature="loss_mask",
        implied=_all_on,
    ),
)
TOKENS_COLUMNS: dict[str, TokensColumn] = {column.name: column for column in _TABLE}


def stored_tokens_columns(spec: StoreView) -> list[TokensColumn]:
    """The columns of a tokens store of that run, in file order."""
    return [column for column in TOKENS_COLUMNS.values() if column.is_stored(spec)]
