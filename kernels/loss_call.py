"""One call of a loss: what is given beside LossSettings, checked and laid out on the device in one place."""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import backends
from potstill.kernels.backend import Backend, SlabTokens
from potstill.kernels.checks import check_labels, check_linear, check_targets, check_tensor, validate_targets
from potstill.kernels.settings import LossSettings
from potstill.kernels.types import KernelInputError, LossSums, SparseTargetTensors

CUDA_CHUNK_BYTES = 512 << 20
CPU_CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What belongs to one call, not to a step.

    token_weights (None: all 1), kd_weights (None: all 1): float32 [N], >= 0; kd_weights multiplies the KD
        term only. Tokens with token_weights 0 are dropped before the first product: they cost nothing and
        their gradient is exactly 0, whatever values they hold.
    normalizer (None: sum of token_weights): 0-d tensor, the global sum of weights. 0 makes the loss 0.
    num_active (None): number of tokens with a weight, if the host knows it; saves the one wait for the GPU
        that counting them takes.
    chunk_bytes (None: 512 MiB on a GPU, 32 MiB on a CPU): bound of the logits kept at a time.
    backend ("auto", by device and dtype): "torch", "triton", or "triton_compiled" (docs/kernels.md).
    validate (False): also check every entry (distinct ids, range, mass); waits for a GPU.
    """

    token_weights: Tensor | None = None
    kd_weights: Tensor | None = None
    normalizer: Tensor | None = None
    num_active: int | None = None
    chunk_bytes: int | None = None
    backend: str = "auto"
    validate: bool = False


SETTINGS = tuple(entry.name for entry in fields(LossSettings))
CALL_OPTIONS = tuple(entry.name for entry in fields(CallOptions))


def read_options(settings: LossSettings | None, options: Mapping[str, Any]) -> tuple[LossSettings, CallOptions]:
    """Keyword options sorted into the two; those of LossSettings only where `settings` are not given whole.

    Raises TypeError for a name that is no option, and for a setting beside `settings`; KernelInputError for a value.
    """
    known = (*SETTINGS, *CALL_OPTIONS)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"unknown loss option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    own = {name: value for name, value in options.items() if name in SETTINGS}
    if settings is not None and own:
        raise TypeError(
            f"{sorted(own)} given beside settings, which have them; use dataclasses.replace on the settings"
        )
    rest = {name: value for name, value in options.items() if name in CALL_OPTIONS}
    return LossSettings(**own) if settings is None else settings, CallOptions(**rest)


@dataclass(frozen=True)
class LinearInputs:
    """Hidden states and a head, checked: hidden [N, D], weight [V, D], bias [V], of one floating dtype and device."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def check(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "LinearInputs":
        """The three, in autocast's dtype where autocast is on (gradients flow through the cast)."""
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        check_linear(hidden, weight, bias)
        return cls(hidden, weight, bias)

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, V)."""
        return self.hidden.shape[0], self.weight.shape[0]


@dataclass(frozen=True)
class LossCall:
    """All of a call that is not differentiated. Tensors over all N tokens, on the device of the logits."""

    settings: LossSettings
    targets: SparseTargetTensors | None
    labels: Tensor  # int64 [N]
    factors: Tensor  # [3] alpha, ce_weight, z_loss
    weights: Tensor  # [N], accumulation dtype
    kd_weights: Tensor  # [N]
    inverse_normalizer: Tensor  # 0-d
    rows: Tensor | None  # int64 [M], the tokens with a weight; None is all of them
    chunk_rows: int
    backend: Backend
    width: int  # a bound of the entries per token

    @classmethod
    def make(
        cls,
        settings: LossSettings,
        options: CallOptions,
        *,
        targets: SparseTargetTensors | None,
        labels: Tensor,
        sizes: tuple[int, int],
        like: Tensor,
    ) -> "LossCall":
        """Checks everything but hidden states, head and logits (`like` is one of them); sizes: (N, V).

        Raises KernelInputError.
        """
        (num_tokens, vocab_size), device = sizes, like.device
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        backend = backends.choose(options.backend, device, like.dtype)
        check_targets(targets, settings, num_tokens=num_tokens, vocab_size=vocab_size, device=device)
        read = options.validate or device.type == "cpu"
        check_labels(labels, num_tokens=num_tokens, vocab_size=vocab_size, device=device, read=read)
        if options.validate and targets is not None:
            validate_targets(targets, vocab_size=vocab_size)
        weights = _vector("token_weights", options.token_weights, num_tokens, dtype, device)
        return cls(
            settings=settings,
            targets=targets,
            labels=labels,
            factors=_factors(settings, weights),
            weights=weights,
            kd_weights=_vector("kd_weights", options.kd_weights, num_tokens, dtype, device),
            inverse_normalizer=_inverse_normalizer(options.normalizer, weights),
            rows=None if options.token_weights is None else _active_rows(weights, options.num_active),
            chunk_rows=_chunk_rows(vocab_size, backend.slab_dtype(like.dtype), device, options.chunk_bytes),
            backend=backend,
            width=0 if targets is None else targets.width,
        )

    @property
    def num_rows(self) -> int:
        """M, the tokens that take part."""
        return self.labels.shape[0] if self.rows is None else self.rows.shape[0]

    def chunks(self) -> Iterator[tuple[slice, SlabTokens]]:
        """The tokens that take part, chunk by chunk, and which of the M each chunk has."""
        yield from self.parts(self.rows, self.num_rows, self.chunk_rows)

    def parts(self, rows: Tensor | None, num_rows: int, chunk_rows: int) -> Iterator[tuple[slice, SlabTokens]]:
        """The tokens `rows` (int64 [num_rows]; None: the first num_rows), at most chunk_rows at a time."""
        for start in range(0, num_rows, max(1, chunk_rows)):
            part = slice(start, min(start + chunk_rows, num_rows))
            yield part, self.tokens(None if rows is None else rows[part], start, part.stop - start)

    def tokens(self, rows: Tensor | None, first: int, count: int) -> SlabTokens:
        """The tokens `rows` (int64 [count]; None: first .. first + count - 1) as a backend takes them."""
        return SlabTokens(
            settings=self.settings,
            targets=self.targets,
            labels=self.labels,
            weights=self.weights,
            kd_weights=self.kd_weights,
            factors=self.factors,
            width=self.width,
            rows=rows,
            first=first,
            count=count,
        )

    def table(self) -> Tensor:
        """An empty [15, M] for what the slab passes say of each token: its loss, then the figures of LossSums."""
        num_figures = 1 + len(LossSums.names())
        return torch.empty(num_figures, self.num_rows, dtype=self.weights.dtype, device=self.weights.device)


def _vector(name: str, value: Tensor | None, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if value is None:
        return torch.ones(num_tokens, dtype=dtype, device=device)
    check_tensor(name, value, shape=(num_tokens,), dtypes=(torch.float32, torch.float64), device=device)
    return value.detach().to(dtype)


def _inverse_normalizer(normalizer: Tensor | None, weights: Tensor) -> Tensor:
    """1 / normalizer on the device of the weights (0-d), without a wait; 0 for 0."""
    if normalizer is None:
        normalizer = weights.sum()
    elif normalizer.numel() != 1:
        raise KernelInputError(f"normalizer has shape {list(normalizer.shape)}; expected a 0-d tensor")
    normalizer = normalizer.detach().to(device=weights.device, dtype=weights.dtype).reshape(())
    return torch.where(normalizer == 0, torch.zeros_like(normalizer), 1 / normalizer)


def _factors(settings: LossSettings, like: Tensor) -> Tensor:
    """alpha, ce_weight, z_loss [3], filled on the device: a copy from the host could wait for it."""
    values = (settings.alpha, settings.label_weight, settings.z_loss)
    return torch.stack([torch.full((), v, dtype=like.dtype, device=like.device) for v in values])


def _active_rows(weights: Tensor, num_active: int | None) -> Tensor:
    """The tokens with weight != 0 in ascending order (int64 [M])."""
    if num_active is None:
        return weights.nonzero()[:, 0]
    if not 0 <= num_active <= weights.shape[0]:
        raise KernelInputError(f"num_active is {num_active}; expected 0 .. {weights.shape[0]}")
    # A stable sort of "has no weight" lists the others first, with a length that the host knows.
    return torch.argsort((weights == 0).to(torch.uint8), stable=True)[:num_active]


def logits_chunk_bytes(*, num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the logits that the fused losses hold at a time for `num_tokens` tokens, with the default budget.

    `dtype` is that of the head's weight, `device` where it would lie (nothing is put there).
    """
    backend = backends.choose("auto", device, dtype)
    wide = backend.slab_dtype(dtype)
    rows = min(num_tokens, _chunk_rows(vocab_size, wide, device, None))
    return rows * backend.row_stride(vocab_size) * wide.itemsize


def _chunk_rows(vocab_size: int, dtype: torch.dtype, device: torch.device, chunk_bytes: int | None) -> int:
    """Rows of a chunk: as many as the budget holds, whole multiples of 128 above 128."""
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
    if chunk_bytes < 1:
        raise KernelInputError(f"chunk_bytes is {chunk_bytes}; expected at least 1")
    rows = max(1, chunk_bytes // (vocab_size * math.ceil(torch.finfo(dtype).bits / 8)))
    return rows - rows % 128 if rows > 128 else rows
