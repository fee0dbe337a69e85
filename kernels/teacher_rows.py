"""Teacher logits chunk by chunk, from hidden states or from given logits, with their tile statistics."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.kernels import backends, products, tiles
from potstill.kernels.backend import Backend
from potstill.kernels.checks import FLOAT_DTYPES, check_labels, check_logits, check_tensor
from potstill.kernels.settings import check_scale_and_cap
from potstill.kernels.soft_cap import scale_and_cap_
from potstill.kernels.teacher_pass import TeacherRows
from potstill.kernels.types import IGNORE_LABEL, KernelInputError

CUDA_CHUNK_BYTES = 1 << 30
CPU_CHUNK_BYTES = 64 << 20
NO_RANK = 255


@dataclass(frozen=True)
class TeacherChunk:
    """One chunk: padded float32 logits [B, n * TILE] (only read from here on) and their statistics."""

    slab: Tensor
    labels: Tensor  # int64 [B]
    stats: tiles.TileStats
    excluded_lse: Tensor  # [B] over the head's rows that are no ids; -inf without any
    temperatures: tuple[float, ...]

    def best(self, k: int) -> tiles.BestIds:
        return tiles.best_ids(self.slab, self.stats, k, self.temperatures)

    @property
    def log_totals(self) -> Tensor:
        """log of the sum of exp((z - top) / T) [1 + nT, B], T = 1 first."""
        return self.stats.sums.sum(2).log()

    @property
    def lse(self) -> Tensor:
        """[1 + nT, B] logsumexp(z / T)."""
        # Number by number: a tensor of the temperatures would be a copy from the host, which waits for a GPU's queue.
        top = torch.stack([self.stats.top / temperature for temperature in (1.0, *self.temperatures)])
        return torch.where(self.is_empty, -math.inf, top + self.log_totals)

    @property
    def is_empty(self) -> Tensor:
        """bool [B]: no id has any mass, because all logits are -Inf."""
        return self.stats.top <= tiles.RULED_OUT

    def logprobs(self, logits: Tensor) -> Tensor:
        """log p [B, m] of logits [B, m] of this chunk; -inf where the logit was -Inf."""
        return torch.where(logits <= tiles.RULED_OUT, -math.inf, logits - self.lse[0][:, None])

    @property
    def entropy(self) -> Tensor:
        totals = self.stats.sums[0].sum(1)
        # Rounding must not make the entropy of a certain teacher negative.
        entropy = (totals.log() - self.stats.moment / totals).clamp_min(0)
        return torch.where(self.is_empty, math.nan, entropy)

    @property
    def has_label(self) -> Tensor:
        return self.labels >= 0

    @property
    def label_logprob(self) -> Tensor:
        logit = self.slab.gather(1, self.labels.clamp_min(0)[:, None])
        return torch.where(self.has_label, self.logprobs(logit)[:, 0], 0.0)

    @property
    def label_rank(self) -> Tensor:
        return torch.where(self.has_label, self.stats.above, NO_RANK)

    @property
    def excluded_mass(self) -> Tensor:
        return torch.sigmoid(self.excluded_lse - self.lse[0])


@dataclass(frozen=True)
class LogitSource:
    """Checked arguments of a teacher call; `chunks` yields its rows in order."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logits: Tensor | None
    labels: Tensor
    vocab_size: int
    head_size: int
    temperatures: tuple[float, ...]
    soft_cap: float | None
    logit_scale: float
    chunk_rows: int
    chunk_bytes: int
    backend: Backend

    @classmethod
    def check(
        cls,
        *,
        hidden: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        logits: Tensor | None = None,
        vocab_size: int | None = None,
        temperatures: Sequence[float] = (),
        labels: Tensor | None = None,
        soft_cap: float | None = None,
        logit_scale: float = 1.0,
        chunk_bytes: int | None = None,
        backend: str = "auto",
    ) -> "LogitSource":
        num_tokens, head_size, device = _check_inputs(hidden, weight, bias, logits)
        vocab_size = head_size if vocab_size is None else vocab_size
        if not 1 <= vocab_size <= head_size:
            raise KernelInputError(f"vocab_size is {vocab_size}; expected 1 .. {head_size}, the head's rows")
        check_scale_and_cap(logit_scale=logit_scale, soft_cap=soft_cap)
        for temperature in temperatures:
            if not (math.isfinite(temperature) and temperature > 0):
                raise KernelInputError(f"each of temperatures is {temperature}; expected a finite number > 0")
        if labels is None:
            labels = torch.full((num_tokens,), IGNORE_LABEL, dtype=torch.int64, device=device)
        read = device.type == "cpu"
        check_labels(labels, num_tokens=num_tokens, vocab_size=vocab_size, device=device, read=read)
        if chunk_bytes is None:
            chunk_bytes = CUDA_CHUNK_BYTES if device.type == "cuda" else CPU_CHUNK_BYTES
        if chunk_bytes < 1:
            raise KernelInputError(f"chunk_bytes is {chunk_bytes}; expected at least 1")
        rows = max(1, chunk_bytes // (4 * tiles.padded_width(head_size)))
        return cls(
            hidden=hidden,
            weight=weight,
            bias=bias,
            logits=logits,
            labels=labels,
            vocab_size=vocab_size,
            head_size=head_size,
            temperatures=tuple(float(t) for t in dict.fromkeys(temperatures) if t != 1.0),
            soft_cap=soft_cap,
            logit_scale=logit_scale,
            chunk_rows=rows - rows % 128 if rows > 128 else rows,
            chunk_bytes=chunk_bytes,
            backend=backends.choose(backend, device, torch.float32),
        )

    def rows_as_given(self, bytes_beside: int) -> Iterator[tuple[int, TeacherRows]]:
        """(first token, raw logits of it and some that follow), in order: given ones as views, else float32 products.

        bytes_beside: what each row needs besides its logits, which bounds the rows where the logits exist already.
        """
        num_tokens = self.labels.shape[0]
        given = self.logits if self.logits is None or self.logits.stride(1) == 1 else self.logits.contiguous()
        limit = self.chunk_rows if given is None else max(1, self.chunk_bytes // bytes_beside)
        buffer = None if given is not None else self._buffer(min(limit, num_tokens))
        for start in range(0, num_tokens, limit):
            count = min(limit, num_tokens - start)
            if given is not None:
                raw = given.narrow(0, start, count)
            else:
                assert buffer is not None and self.hidden is not None and self.weight is not None
                out = buffer.narrow(0, 0, count).narrow(1, 0, self.head_size)
                raw = products.logits(self.hidden.narrow(0, start, count), self.weight, self.bias, out=out)
            labels, cap, scale = self.labels.narrow(0, start, count), self.soft_cap, self.logit_scale
            yield start, TeacherRows(raw, labels, self.vocab_size, self.temperatures, cap, scale)

    def chunks(self) -> Iterator[TeacherChunk]:
        """Padded float32 rows, in order; one chunk of no rows when there are no tokens, to have something to join."""
        num_tokens = self.labels.shape[0]
        rows = min(self.chunk_rows, num_tokens)
        buffer = self._buffer(rows)
        for start in range(0, max(1, num_tokens), max(1, rows)):
            yield self._chunk(slice(start, min(start + rows, num_tokens)), buffer)

    def _buffer(self, rows: int) -> Tensor:
        width = tiles.padded_width(self.head_size)
        return torch.empty(rows, width, dtype=torch.float32, device=self.labels.device)

    def _chunk(self, rows: slice, buffer: Tensor) -> TeacherChunk:
        slab = buffer[: rows.stop - rows.start]
        head = slab[:, : self.head_size]
        if self.logits is not None:
            head.copy_(self.logits[rows])
        else:
            assert self.hidden is not None and self.weight is not None
            products.logits(self.hidden[rows], self.weight, self.bias, out=head)
        scale_and_cap_(head, logit_scale=self.logit_scale, soft_cap=self.soft_cap)
        if self.logits is not None or self.bias is not None:
            # -Inf is a way to rule an id out; the passes need a number, since 0 * -Inf would spoil their sums.
            head.clamp_(min=tiles.FILL)
        excluded_lse = torch.logsumexp(head[:, self.vocab_size :], 1)
        # Whole tiles only; the padding and the head's extra rows are below every logit.
        slab = slab[:, : tiles.padded_width(self.vocab_size)]
        slab[:, self.vocab_size :] = tiles.FILL
        labels = self.labels[rows]
        stats = self.backend.tile_stats(slab, labels.clamp_min(0), self.temperatures)
        return TeacherChunk(slab, labels, stats, excluded_lse, self.temperatures)


def _check_inputs(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, logits: Tensor | None
) -> tuple[int, int, torch.device]:
    """(tokens, rows of the head, device) of either way to give logits."""
    if logits is not None:
        if hidden is not None or weight is not None or bias is not None:
            raise KernelInputError("both logits and hidden states or a head are given; expected one of them")
        check_logits(logits)
        return logits.shape[0], logits.shape[1], logits.device
    if hidden is None or weight is None:
        raise KernelInputError("neither logits nor hidden and weight are given; expected one of them")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] < 1:
        raise KernelInputError(
            f"hidden has shape {list(hidden.shape)}, weight {list(weight.shape)}; expected [N, D] and [V, D]"
        )
    dtype, device = hidden.dtype, hidden.device
    if dtype not in FLOAT_DTYPES:
        raise KernelInputError(f"hidden has dtype {dtype}; expected a floating dtype")
    check_tensor("weight", weight, shape=tuple(weight.shape), dtypes=(dtype,), device=device)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), dtypes=(dtype,), device=device)
    return hidden.shape[0], weight.shape[0], device
