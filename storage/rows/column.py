"""Column: the one description of a column of targets. Whatever handles columns reads it and names none itself.

Legend: a *place* is a token, an entry or a row, by the axis of the column. N tokens, E entries, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from potstill.storage.errors import StoreError
from potstill.storage.rows.array_types import Int64, UInt8
from potstill.storage.rows.planes import Plane

Axis = Literal["token", "entry", "row"]
Array = NDArray[Any]
Values = Array | Mapping[float, Array]  # one array, or one for each temperature


class StoreView(Protocol):
    """What a column may ask of the store that it lies in; RunSpec has all of it."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def selection(self) -> Mapping[str, Any] | None: ...
    @property
    def temperatures(self) -> tuple[float, ...]: ...
    @property
    def num_draws(self) -> int | None: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def info(self) -> Mapping[str, Any]: ...


class TargetArrays(Protocol):
    """What a check sees of targets: offsets int64 [N+1] and the arrays of the columns by name."""

    @property
    def offsets(self) -> Int64: ...
    @property
    def columns(self) -> Mapping[str, Values]: ...
    @property
    def num_draws(self) -> int | None: ...


@dataclass(frozen=True)
class Coding:
    """What encoding and decoding know besides the values of the column.

    offsets int64 [N+1]; counts uint8 [N], entries per token; id_table int32 [V] or None: where ids are stored by
    frequency rank, the rank of each id (encoding) or the id of each rank (decoding).
    """

    spec: StoreView
    offsets: Int64
    counts: UInt8
    id_table: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Examined:
    """Targets under check. `strict` asks for what the encoder asks for, else for what a decoder may give."""

    targets: TargetArrays
    vocab_size: int
    strict: bool

    @cached_property
    def kept(self) -> Int64:
        """Entries per token, [N]."""
        kept: Int64 = np.diff(self.targets.offsets)
        return kept

    @cached_property
    def token_of(self) -> Int64:
        """Token of each entry, [E]."""
        return np.repeat(np.arange(len(self.kept), dtype=np.int64), self.kept)

    @cached_property
    def same_token(self) -> NDArray[np.bool_]:
        """Whether entry e + 1 is of the token of entry e, [E-1]."""
        same: NDArray[np.bool_] = self.token_of[1:] == self.token_of[:-1]
        return same


@dataclass(frozen=True)
class Condition:
    """When a store has a column, and how errors name what the selection of its run does in either case.

    holds: whether a store of that run has it; rule, otherwise: what the selection then does, and else. No `otherwise`:
    targets that differ from it already break the rule of another column.
    """

    holds: Callable[[StoreView], bool]
    rule: str = ""
    otherwise: str = ""


def one_plane(spec: StoreView) -> int:
    """Number of planes of most columns."""
    return 1


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of targets: what its values are, which bytes hold them, and which rules they keep.

    name      key of the array, and its attribute where SparseTargets has one
    axis      one value per token [N], per entry [E] or per row [R]
    dtype     of the array; with `vector` values per place its shape is [places, vector(spec)]
    encode    array -> its byte planes, each of `value_bytes` bytes per value; decode is its inverse up to the grid
    check     raises StoreError that names the column, the place, the value and the rule; None: every value may be
    feature   name in required_features of a store that has the column; a reader without it refuses the store, and
              `feature_rule` is what it says where feature and run contradict each other
    stored    when a store has it; None: when the run names it in `columns` (then a feature is due)
    optional  a row may come without it
    per_temperature  one array for each declared temperature other than 1, as {temperature: array}
    fill      value at a token without a target
    on_device False: for readers on the host only, not part of the tensors that a loss works on
    plane     name of its planes in the file where it is not `name`, numbered by temperature and where `num_planes`
              gives more than one
    """

    name: str
    axis: Axis
    dtype: type[np.generic]
    encode: Callable[[Array, Coding], Sequence[UInt8]]
    decode: Callable[[Sequence[UInt8], Coding], Array]
    check: Callable[[Array, str, Examined], None] | None = None
    feature: str | None = None
    feature_rule: str = ""
    stored: Condition | None = None
    optional: bool = False
    per_temperature: bool = False
    vector: Callable[[StoreView], int] | None = None
    value_bytes: int = 1
    fill: float = 0
    on_device: bool = True
    plane: str = ""
    num_planes: Callable[[StoreView], int] = one_plane

    def __post_init__(self) -> None:
        if self.stored is None and self.feature is None:
            raise StoreError(f"column {self.name}: needs a feature, so that a reader without it refuses the store")

    @property
    def stem(self) -> str:
        """First part of the names of its planes."""
        return self.plane or self.name

    @property
    def skippable(self) -> bool:
        """Whether a reader may leave it out: what every loss needs must be decoded."""
        return self.optional or self.per_temperature or self.stored is None

    def is_stored(self, spec: StoreView) -> bool:
        """Whether a store of that run has the column."""
        if self.stored is not None:
            return self.stored.holds(spec)
        return spec.kind == "targets" and self.name in spec.columns

    def plane_names(self, spec: StoreView) -> list[list[str]]:
        """Names of its planes in a store of that run: one group, or one for each temperature."""
        number = self.num_planes(spec)
        stems = [f"{self.stem}{i}" for i in range(len(spec.temperatures))] if self.per_temperature else [self.stem]
        return [[stem] if number == 1 else [f"{stem}{i}" for i in range(number)] for stem in stems]

    def planes_in(self, spec: StoreView) -> list[Plane]:
        """Its planes in a store of that run, in file order."""
        skip = self.stem if self.skippable else None
        width = self.value_bytes * (1 if self.vector is None else self.vector(spec))
        names = (name for group in self.plane_names(spec) for name in group)
        return [Plane(name, self.axis, width, self.optional, skip) for name in names]

    def labelled(self, values: Values) -> list[tuple[str, Array]]:
        """The arrays with the names that errors give them."""
        if isinstance(values, Mapping):
            return [(f"{self.name}[{temperature}]", array) for temperature, array in values.items()]
        return [(self.name, values)]

    def blank(self, num_tokens: int, shape: tuple[int, ...] = ()) -> Array:
        """Its array where no token has a target: [N, *shape], no entry, or one row."""
        places = {"token": num_tokens, "entry": 0, "row": 1}[self.axis]
        return np.full((places, *shape), self.fill, self.dtype)

    def as_array(self, name: str, value: Any) -> Array:
        """`value` as a contiguous array of the column's type. Raises StoreError where shape or type do not fit."""
        return as_array(name, value, self.dtype, num_dims=1 if self.vector is None else 2)


def as_array(name: str, value: Any, dtype: type[np.generic], *, num_dims: int = 1) -> Array:
    """`value` as a contiguous array of `dtype`. Raises StoreError where dimensions, type or range do not fit."""
    array = np.asarray(value)
    if array.ndim != num_dims:
        wanted = "one dimension; flatten the tokens" if num_dims == 1 else f"{num_dims} dimensions"
        raise StoreError(f"{name}: found shape {array.shape}, expected {wanted}")
    wanted_kind = "f" if np.dtype(dtype).kind == "f" else "iu"
    if array.size and array.dtype.kind not in wanted_kind:
        raise StoreError(f"{name}: found dtype {array.dtype}, expected {np.dtype(dtype)}; convert it explicitly")
    if array.size and wanted_kind == "iu":
        limits = np.iinfo(cast("type[np.integer[Any]]", dtype))
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise StoreError(f"{name}: values {array.min()}..{array.max()} do not fit {np.dtype(dtype)}")
    return np.ascontiguousarray(array, dtype=dtype)
