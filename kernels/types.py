"""Values that cross the borders of the kernels room: sparse targets on a device, loss sums, errors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from potstill.common.errors import UserError

IGNORE_LABEL = -100
MISSING_MASS_MODES = ("tail", "renorm", "support", "label", "raw")


class KernelInputError(UserError):
    """An argument of a kernel function that cannot be right (a ValueError); the message names it and what to do."""


class SelfCheckError(UserError, RuntimeError):
    """The chosen loss path disagrees with float64 on a real batch; training on it would be wrong."""


class SparseTargetArrays(Protocol):
    """Any object with CSR target arrays by these names (NumPy or torch), such as the store's rows.

    One with a method `described()`, name -> (axis, values), hands over whatever columns it has.
    """

    @property
    def offsets(self) -> Any: ...
    @property
    def ids(self) -> Any: ...
    @property
    def logprobs(self) -> Any: ...
    @property
    def log_tail(self) -> Any: ...


Values = Tensor | Mapping[float, Tensor]  # one tensor, or one for each temperature
# Axis and type of the columns that the losses read. Others travel along as they are, on the axis that they come with.
READ = {
    "ids": ("entry", torch.int32),
    "logprobs": ("entry", torch.float32),
    "counts": ("entry", torch.float32),
    "log_weights": ("entry", torch.float32),
    "log_tail": ("token", torch.float32),
    "log_tail_at": ("token", torch.float32),
}


@dataclass(frozen=True, eq=False, init=False)
class SparseTargetTensors:
    """Teacher distributions of N tokens as CSR tensors on one device.

    offsets:     int64 [N + 1], token n owns the entries offsets[n] .. offsets[n + 1]
    columns:     the tensors by name, those that are there; values per token [N, ...], entry [E, ...] or row [R, ...]
    axes:        "token", "entry" or "row" of each
    num_draws:   draws per token behind `counts`; None takes the sum of a token's counts
    max_entries: a bound of the entries per token known on the host. With None it is read from
                 `offsets`, which waits for a GPU once per call.

    The columns that the losses read, also attributes (None where absent):

    ids:         int32 [E], distinct within a token, first the most probable
    logprobs:    float32 [E] true full-vocabulary natural log-probabilities at T = 1, or None
    counts:      [E] draw counts (then logprobs is None), or None
    log_weights: float32 [E] logs of weights t >= 0 with E[t] = p (draws from another proposal than p, then
                 logprobs and counts are None), or None; a token's weights sum to 1 in the mean only
    log_tail:    float32 [N] log of the mass outside the entries at T = 1 (-inf: none)
    log_tail_at: temperature -> float32 [N], the same after a softmax at that temperature
    """

    offsets: Tensor
    columns: Mapping[str, Values]
    axes: Mapping[str, str]
    num_draws: int | None
    max_entries: int | None

    def __init__(
        self,
        *,
        offsets: Tensor,
        columns: Mapping[str, Values] | None = None,
        axes: Mapping[str, str] | None = None,
        num_draws: int | None = None,
        max_entries: int | None = None,
        **named: Values | None,
    ) -> None:
        """Columns given by name replace those of `columns`; None drops one. Raises KernelInputError without an axis."""
        merged = {**(columns or {}), **named}
        present = {name: v for name, v in merged.items() if v is not None and not (isinstance(v, Mapping) and not v)}
        known = {name: axis for name, (axis, _) in READ.items()} | dict(axes or {})
        if not merged.keys() <= known.keys():
            raise KernelInputError(f"columns {sorted(merged.keys() - known.keys())} have no axis; give it in `axes`")
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "columns", present)
        object.__setattr__(self, "axes", {name: known[name] for name in present})
        object.__setattr__(self, "num_draws", num_draws)
        object.__setattr__(self, "max_entries", max_entries)

    @property
    def ids(self) -> Tensor:
        return cast(Tensor, self.columns["ids"])

    @property
    def logprobs(self) -> Tensor | None:
        return cast("Tensor | None", self.columns.get("logprobs"))

    @property
    def counts(self) -> Tensor | None:
        return cast("Tensor | None", self.columns.get("counts"))

    @property
    def log_weights(self) -> Tensor | None:
        return cast("Tensor | None", self.columns.get("log_weights"))

    @property
    def log_tail(self) -> Tensor:
        return cast(Tensor, self.columns["log_tail"])

    @property
    def log_tail_at(self) -> Mapping[float, Tensor]:
        return cast("Mapping[float, Tensor]", self.columns.get("log_tail_at", {}))

    @property
    def num_tokens(self) -> int:
        return int(self.offsets.shape[0]) - 1

    @property
    def num_entries(self) -> int:
        return int(self.ids.shape[0])

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    @property
    def width(self) -> int:
        """A bound of the entries per token, for padded rows."""
        if self.max_entries is not None:
            return self.max_entries
        return int(self.offsets.diff().max()) if self.num_tokens else 0

    def described(self) -> dict[str, tuple[str, Values]]:
        """Axis and values of each column."""
        return {name: (self.axes[name], values) for name, values in self.columns.items()}

    def each(self, function: Callable[[str, Tensor], Tensor], **changes: Any) -> "SparseTargetTensors":
        """These targets with `function(axis, tensor)` in place of each tensor of the columns, and other `changes`."""
        columns: dict[str, Values] = {}
        for name, (axis, values) in self.described().items():
            if isinstance(values, Mapping):
                columns[name] = {key: function(axis, value) for key, value in values.items()}
            else:
                columns[name] = function(axis, values)
        return replace(self, columns=columns, **changes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SparseTargetTensors":
        """A copy on `device`; what is there already is shared."""
        return self.each(
            lambda axis, value: value.to(device, non_blocking=non_blocking),
            offsets=self.offsets.to(device, non_blocking=non_blocking),
            # Read before the move, where it costs no wait.
            max_entries=self.width if self.device.type == "cpu" else self.max_entries,
        )

    def select(self, index: Tensor) -> "SparseTargetTensors":
        """The tokens `index` (int64 [M], repeats allowed), in that order; values of rows stay as they are."""
        index = index.to(self.device)
        counts = self.offsets.diff()[index]  # [M]
        offsets = torch.zeros(index.shape[0] + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        first = torch.repeat_interleave(self.offsets[:-1][index] - offsets[:-1], counts)  # [E']
        places = {"token": index, "entry": first + torch.arange(first.shape[0], device=self.device)}
        return self.each(
            lambda axis, value: value if axis == "row" else value[places[axis]],
            offsets=offsets,
        )

    def spread(self, index: Tensor, *, num_tokens: int) -> "SparseTargetTensors":
        """Targets of `num_tokens` tokens: these at the places `index` (int64 [N], ascending), none at the others."""
        index = index.to(self.device)
        counts = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        counts[index] = self.offsets.diff()
        offsets = torch.zeros(num_tokens + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=offsets[1:])

        def at_places(axis: str, value: Tensor) -> Tensor:
            if axis != "token":
                return value
            return value.new_zeros((num_tokens, *value.shape[1:])).index_copy_(0, index, value)

        return self.each(at_places, offsets=offsets)

    @classmethod
    def from_arrays(cls, arrays: SparseTargetArrays, device: torch.device | str = "cpu") -> "SparseTargetTensors":
        """Tensors of any object that carries the arrays by these names, or describes them as the store's targets do."""
        described: Mapping[str, tuple[str, Any]]
        if hasattr(arrays, "described"):
            described = arrays.described()
        else:
            carried = {name: (axis, getattr(arrays, name, None)) for name, (axis, _) in READ.items()}
            described = {name: (axis, values) for name, (axis, values) in carried.items() if values is not None}

        def tensor(name: str, value: Any) -> Tensor:
            made = _shared(value)
            return made.to(READ[name][1]) if name in READ else made

        return cls(
            offsets=_shared(arrays.offsets).to(torch.int64),
            columns={
                name: {float(key): tensor(name, value) for key, value in values.items()}
                if isinstance(values, Mapping)
                else tensor(name, values)
                for name, (_, values) in described.items()
            },
            axes={name: axis for name, (axis, _) in described.items()},
            num_draws=getattr(arrays, "num_draws", None),
        ).to(device)


def _shared(value: Any) -> Tensor:
    """A tensor of an array, in the same memory where that may be written."""
    # A decoded array may be a read-only view of the file's bytes; torch would share it and warn.
    shared = getattr(getattr(value, "flags", None), "writeable", True)
    return torch.as_tensor(value) if shared else torch.tensor(value)


@dataclass(frozen=True)
class LossSums:
    """Detached 0-d tensors, each a sum over the tokens whose weight w is not 0.

    kd           w * kd_weight * divergence in nats (without alpha and T^2), tokens with a target
    ce           w * cross-entropy in nats, tokens with a label
    z            w * lse^2
    weight       w
    kd_weight    w * kd_weight, tokens with a target
    kept_mass    w * teacher mass on its kept entries (at the teacher's temperature), tokens with a target
    student_mass w * student mass on the same ids (at the student's: 1 when the teacher alone is tempered), likewise
    agreement    w where the student's largest logit is the teacher's first id (a tie counts)
    correct      w where the student's largest logit is the label (a tie counts)
    entropy      w * student entropy in nats at T = 1
    target_weight, label_weight   w over tokens with a target, with a label
    num_targets, num_labels       how many such tokens (unweighted)
    """

    kd: Tensor
    ce: Tensor
    z: Tensor
    weight: Tensor
    kd_weight: Tensor
    kept_mass: Tensor
    student_mass: Tensor
    agreement: Tensor
    correct: Tensor
    entropy: Tensor
    target_weight: Tensor
    label_weight: Tensor
    num_targets: Tensor
    num_labels: Tensor

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(entry.name for entry in fields(cls))

    def stack(self) -> Tensor:
        """All sums as one tensor [14], for a single all-reduce."""
        return torch.stack([getattr(self, name) for name in self.names()])

    @classmethod
    def unstack(cls, values: Tensor) -> "LossSums":
        return cls(**dict(zip(cls.names(), values.unbind(0), strict=True)))

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums.unstack(self.stack() + other.stack())
