"""One call of a loss: what is given beside LossSettings, checked and laid out on the device in one place."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import backends, call_tensors
from potstill.kernels.backend import Backend, SlabTokens
from potstill.kernels.checks import check_labels, check_linear, check_targets, validate_targets
from potstill.kernels.chunks import chunk_budget, even_rows, even_sizes, rows_within
from potstill.kernels.settings import LossSettings
from potstill.kernels.types import LossSums, SparseTargetTensors


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What belongs to one call, not to a step.

    token_weights (None: all 1), kd_weights (None: all 1): float32 [N], >= 0; kd_weights multiplies the KD
        term only. Tokens with token_weights 0 are dropped before the first product: they cost nothing and
        their gradient is exactly 0, whatever values they hold.
    normalizer (None: sum of token_weights): 0-d tensor, the global sum of weights. 0 makes the loss 0.
    num_active (None): number of tokens with a weight, if the host knows it; saves the one wait for the GPU
        that counting them takes.
    chunk_bytes (None: 704 MiB on a GPU, 32 MiB on a CPU): bound of the logits kept at a time.
    groups, group_sums (None): int64 [N] in 0 .. G - 1, which group each token is of, and [G, 14] in the accumulation
        dtype (float32, float64 for float64 inputs), which the call fills with the figures of LossSums of each group.
    backend ("auto", by device and dtype): "torch", "triton", or "triton_compiled" (docs/kernels.md).
    validate (False): also check every entry (distinct ids, range, mass); waits for a GPU.
    """

    token_weights: Tensor | None = None
    kd_weights: Tensor | None = None
    normalizer: Tensor | None = None
    num_active: int | None = None
    chunk_bytes: int | None = None
    groups: Tensor | None = None
    group_sums: Tensor | None = None
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
    factors: Tensor  # [4] alpha, ce_weight, z_loss, off_weight
    weights: Tensor  # [N], accumulation dtype
    kd_weights: Tensor  # [N]
    inverse_normalizer: Tensor  # 0-d
    rows: Tensor | None  # int64 [M], the tokens with a weight; None is all of them
    chunk_rows: int  # at most
    backend: Backend
    width: int  # a bound of the entries per token
    groups: Tensor | None = None  # int64 [N]
    group_sums: Tensor | None = None  # [G, 14], filled by `sums`

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
        lists_rows: bool = True,
    ) -> "LossCall":
        """Checks everything but hidden states, head and logits (`like` is one of them); sizes: (N, V).

        lists_rows: whether tokens of weight 0 are to be left out even where the backend passes over them by itself.
        Raises KernelInputError.
        """
        (num_tokens, vocab_size), device = sizes, like.device
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        backend = backends.choose(options.backend, device, like.dtype)
        check_targets(targets, settings, num_tokens=num_tokens, vocab_size=vocab_size, device=device)
        check_labels(labels, num_tokens=num_tokens, vocab_size=vocab_size, device=device, read=options.validate)
        if options.validate and targets is not None:
            validate_targets(targets, vocab_size=vocab_size)
        weights = call_tensors.vector("token_weights", options.token_weights, num_tokens, dtype, device)
        given = None if options.token_weights is None else weights
        lists_rows = lists_rows or not backend.skips_unused
        return cls(
            settings=settings,
            targets=targets,
            labels=labels,
            factors=call_tensors.factors(settings, dtype, device),
            weights=weights,
            kd_weights=call_tensors.vector("kd_weights", options.kd_weights, num_tokens, dtype, device),
            inverse_normalizer=call_tensors.inverse_normalizer(options.normalizer, given, num_tokens, dtype, device),
            rows=call_tensors.active_rows(given, options.num_active) if lists_rows else None,
            chunk_rows=_chunk_rows(vocab_size, like.dtype, backend, device, options.chunk_bytes),
            backend=backend,
            width=0 if targets is None else targets.width,
            groups=call_tensors.groups(options.groups, options.group_sums, num_tokens, dtype, device),
            group_sums=options.group_sums,
        )

    @property
    def num_rows(self) -> int:
        """M, the tokens that take part."""
        return self.labels.shape[0] if self.rows is None else self.rows.shape[0]

    def chunks(self, sizes: list[int] | None = None) -> Iterator[tuple[slice, SlabTokens]]:
        """The tokens that take part, chunk by chunk, and which of the M each chunk has; sizes (None: even): rows of
        each, M in all."""
        start = 0
        for size in even_sizes(self.num_rows, self.chunk_rows) if sizes is None else sizes:
            part = slice(start, start + size)
            yield part, self.tokens(None if self.rows is None else self.rows[part], start, size)
            start += size

    @property
    def largest_chunk(self) -> int:
        """Rows of the largest of the even chunks."""
        return even_rows(self.num_rows, self.chunk_rows)

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

    def sums(self, table: Tensor) -> Tensor:
        """[15]: the sums over a filled table [15, M]; those of the groups go where the caller wants them.

        Sums of masked copies: no float is added by an atomic, so they come out the same at every run, and nothing waits
        for the device. A NaN stays in its own group.
        """
        if self.groups is not None and self.group_sums is not None:
            own = self.groups if self.rows is None else self.groups.index_select(0, self.rows)
            numbers = torch.arange(self.group_sums.shape[0], device=own.device)
            chosen = torch.where((own == numbers[:, None])[:, None], table[1:], 0.0)  # [G, 14, M]
            torch.sum(chosen, 2, out=self.group_sums)
        return table.sum(1)


def logits_chunk_bytes(
    *, num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device, backend: str = "auto"
) -> int:
    """Bytes of the logits that the fused losses hold at a time for `num_tokens` tokens, with the default budget.

    `dtype` is that of the head's weight, `device` where it would lie (nothing is put there).
    """
    chosen = backends.choose(backend, device, dtype)
    rows = even_rows(num_tokens, _chunk_rows(vocab_size, dtype, chosen, device, None))
    return rows * chosen.row_stride(vocab_size) * chosen.slab_dtype(dtype).itemsize


def _chunk_rows(
    vocab_size: int, dtype: torch.dtype, backend: Backend, device: torch.device, chunk_bytes: int | None
) -> int:
    """The most rows of a chunk, for a head of `dtype`."""
    row_bytes = vocab_size * backend.slab_dtype(dtype).itemsize
    return rows_within(chunk_budget(device, chunk_bytes), row_bytes)
