"""Values that cross the borders of the kernels room: sparse targets on a device, loss sums, errors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

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
    """Any object with CSR target arrays by these names (NumPy or torch), such as the store's rows."""

    @property
    def offsets(self) -> Any: ...
    @property
    def ids(self) -> Any: ...
    @property
    def logprobs(self) -> Any: ...
    @property
    def log_tail(self) -> Any: ...


@dataclass(frozen=True)
class SparseTargetTensors:
    """Teacher distributions of N tokens as CSR tensors on one device.

    offsets:     int64 [N + 1], token n owns the entries offsets[n] .. offsets[n + 1]
    ids:         int32 [E], distinct within a token, first the most probable
    logprobs:    float32 [E] true full-vocabulary natural log-probabilities at T = 1, or None
    counts:      [E] draw counts (then logprobs is None), or None
    num_draws:   draws per token behind `counts`; None takes the sum of a token's counts
    log_weights: float32 [E] logs of weights t >= 0 with E[t] = p (draws from another proposal than p, then
                 logprobs and counts are None), or None; a token's weights sum to 1 in the mean only
    log_tail:    float32 [N] log of the mass outside the entries at T = 1 (-inf: none)
    log_tail_at: temperature -> float32 [N], the same after a softmax at that temperature
    max_entries: a bound of the entries per token known on the host. With None it is read from
                 `offsets`, which waits for a GPU once per call.
    """

    offsets: Tensor
    ids: Tensor
    logprobs: Tensor | None
    counts: Tensor | None
    num_draws: int | None
    log_tail: Tensor
    log_tail_at: Mapping[float, Tensor] = field(default_factory=dict)
    max_entries: int | None = None
    log_weights: Tensor | None = None

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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SparseTargetTensors":
        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=non_blocking)

        return SparseTargetTensors(
            offsets=self.offsets.to(device, non_blocking=non_blocking),
            ids=self.ids.to(device, non_blocking=non_blocking),
            logprobs=move(self.logprobs),
            counts=move(self.counts),
            num_draws=self.num_draws,
            log_tail=self.log_tail.to(device, non_blocking=non_blocking),
            log_tail_at={
                temperature: value.to(device, non_blocking=non_blocking)
                for temperature, value in self.log_tail_at.items()
            },
            # Read before the move, where it costs no wait.
            max_entries=self.width if self.device.type == "cpu" else self.max_entries,
            log_weights=move(self.log_weights),
        )

    def select(self, index: Tensor) -> "SparseTargetTensors":
        """The tokens `index` (int64 [M], repeats allowed), in that order."""
        index = index.to(self.device)
        counts = self.offsets.diff()[index]  # [M]
        offsets = torch.zeros(index.shape[0] + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=offsets[1:])
        first = torch.repeat_interleave(self.offsets[:-1][index] - offsets[:-1], counts)  # [E']
        entries = first + torch.arange(first.shape[0], device=self.device)
        return SparseTargetTensors(
            offsets=offsets,
            ids=self.ids[entries],
            logprobs=None if self.logprobs is None else self.logprobs[entries],
            counts=None if self.counts is None else self.counts[entries],
            num_draws=self.num_draws,
            log_tail=self.log_tail[index],
            log_tail_at={temperature: value[index] for temperature, value in self.log_tail_at.items()},
            max_entries=self.max_entries,
            log_weights=None if self.log_weights is None else self.log_weights[entries],
        )

    def spread(self, index: Tensor, *, num_tokens: int) -> "SparseTargetTensors":
        """Targets of `num_tokens` tokens: these at the places `index` (int64 [N], ascending), none at the others."""
        index = index.to(self.device)
        counts = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        counts[index] = self.offsets.diff()
        offsets = torch.zeros(num_tokens + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts, 0, out=offsets[1:])

        def at_places(value: Tensor) -> Tensor:
            return value.new_zeros(num_tokens).index_copy_(0, index, value)

        return replace(
            self,
            offsets=offsets,
            log_tail=at_places(self.log_tail),
            log_tail_at={temperature: at_places(value) for temperature, value in self.log_tail_at.items()},
        )

    @classmethod
    def from_arrays(cls, arrays: SparseTargetArrays, device: torch.device | str = "cpu") -> "SparseTargetTensors":
        """Tensors of any object that carries the arrays by these names (for one, the store's targets)."""

        def tensor(value: Any, dtype: torch.dtype) -> Tensor:
            # A decoded array may be a read-only view of the file's bytes; torch would share it and warn.
            shared = getattr(getattr(value, "flags", None), "writeable", True)
            return (torch.as_tensor(value) if shared else torch.tensor(value)).to(dtype)

        logprobs, counts = arrays.logprobs, getattr(arrays, "counts", None)
        log_weights = getattr(arrays, "log_weights", None)
        tails: Mapping[float, Any] = getattr(arrays, "log_tail_at", {})
        return cls(
            offsets=tensor(arrays.offsets, torch.int64),
            ids=tensor(arrays.ids, torch.int32),
            logprobs=None if logprobs is None else tensor(logprobs, torch.float32),
            counts=None if counts is None else tensor(counts, torch.float32),
            num_draws=getattr(arrays, "num_draws", None),
            log_tail=tensor(arrays.log_tail, torch.float32),
            log_tail_at={float(t): tensor(value, torch.float32) for t, value in tails.items()},
            log_weights=None if log_weights is None else tensor(log_weights, torch.float32),
        ).to(device)


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
