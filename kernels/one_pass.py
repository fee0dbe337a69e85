"""A slab by one launch of row_kernel.py, wherever that has what the call asks for; else by two passes.

Importing this needs triton; calling it needs a GPU, or triton's interpreter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from potstill.kernels.backend import SlabPass, SlabTokens
from potstill.kernels.checks import tail_at
from potstill.kernels.device_guard import on_device_of
from potstill.kernels.divergences_triton import TWINS
from potstill.kernels.row_kernel import row_kernel
from potstill.kernels.settings import LossSettings
from potstill.kernels.types import KernelInputError

# Lanes for the entries that a row's registers hold; with more, the steps between two passes cost little beside them.
MAX_LANES = 1024
LOAD_BYTES = 16  # of one thread at a time
SMALLEST_NORMAL = 2.0**-126  # of float32; a temperature below it would be 0 there


@dataclass(frozen=True)
class LaunchShape:
    """How one row is spread over a program: its warps, threads per warp, loads of a thread at a time, and whether the
    second stream runs backwards.

    As many threads per row as there may be mean as few rows in flight as there may be, and the second stream finds them
    in the L2 cache: half the warps cost an H100 a quarter more time. More loads at a time, which a compiler can put
    ahead of one another, cost 3 to 11 %, and a second stream from the row's end 2 to 6 % (docs/kernels.md).
    """

    num_warps: int = 32
    warp_size: int = 32
    loads: int = 1
    backwards: bool = False


def launch_shape(vocab_size: int, dtype: torch.dtype) -> LaunchShape:
    """For rows of V logits: 1024 threads, or what a short row fills."""
    warp_size = 64 if torch.version.hip else 32
    elements = LOAD_BYTES // dtype.itemsize * warp_size
    warps = min(1024 // warp_size, max(1, triton.next_power_of_2(-(-vocab_size // elements))))
    return LaunchShape(num_warps=warps, warp_size=warp_size)


def fill_of(dtype: torch.dtype) -> float:
    """The value that takes a column out of the stream: finite, far below every logit, held exactly by the dtype."""
    return -65504.0 if dtype == torch.float16 else -(2.0**100)


def settings_of(settings: LossSettings) -> dict[str, Any]:
    """The kernel's arguments that tell of the settings."""
    return {
        "scale": settings.logit_scale,
        "cap": settings.soft_cap or 1.0,
        "student_t": settings.student_temperature,
        "teacher_t": max(settings.temperature, SMALLEST_NORMAL),
        "option": next(iter(settings.constants.values()), 0.0),
        "MODE": settings.missing_mass,
        "DIVERGENCE": TWINS[settings.divergence],
        "TEMPERED": settings.temperature != 1.0,
        "TWO": settings.student_temperature != 1.0,
        "PLAIN": settings.plain_gradient,
        "CAP": settings.soft_cap is not None,
    }


def tokens_of(tokens: SlabTokens) -> dict[str, Any]:
    """The kernel's arguments that tell of the tokens and their teacher, with neighbours side by side in memory."""
    targets, settings = tokens.targets, tokens.settings
    found: dict[str, Any] = {
        "token_ptr": None if tokens.rows is None else tokens.rows.contiguous(),
        "first": tokens.first,
        "label_ptr": tokens.labels.contiguous(),
        "weight_ptr": tokens.weights.contiguous(),
        "kd_weight_ptr": tokens.kd_weights.contiguous(),
        "factor_ptr": tokens.factors.contiguous(),
        "BK": max(16, triton.next_power_of_2(tokens.width)),
        "num_draws": -1.0,
    }
    if targets is None or tokens.width == 0 or targets.num_entries == 0:
        none = dict.fromkeys(("offset_ptr", "id_ptr", "value_ptr", "tail_ptr"))
        return {**found, **none, "BK": 16, "KIND": "none"}
    kind, values = "logprobs", targets.logprobs
    if targets.log_weights is not None:
        kind, values = "log_weights", targets.log_weights
    elif settings.entry.needs_counts:
        kind, values = "counts", targets.counts
        found["num_draws"] = -1.0 if targets.num_draws is None else float(targets.num_draws)
    assert values is not None  # the call's checks saw to it
    tail = tail_at(targets, settings.temperature) if kind == "logprobs" and settings.needs_tail else None
    given = {"offset_ptr": targets.offsets, "id_ptr": targets.ids, "value_ptr": values}
    found |= {name: value.contiguous() for name, value in given.items()}
    return {**found, "tail_ptr": None if tail is None else tail.contiguous(), "KIND": kind}


@dataclass(frozen=True)
class OnePass:
    """A SlabPass (backend.py) by one launch.

    otherwise: who takes what the kernel lacks: a divergence without a twin, or more than MAX_LANES entries per token.
    shape: launch_shape, or another for a trial.
    """

    otherwise: SlabPass
    shape: Callable[[int, torch.dtype], LaunchShape] = launch_shape

    def takes(self, tokens: SlabTokens) -> bool:
        """Whether the kernel has all that these tokens ask for."""
        return tokens.settings.divergence in TWINS and tokens.width <= MAX_LANES

    def __call__(
        self,
        slab: Tensor,
        tokens: SlabTokens,
        *,
        out: Tensor,
        with_gradient: bool,
        factor: Tensor | None = None,
        source: Tensor | None = None,
    ) -> None:
        if tokens.count == 0:
            return
        with on_device_of(slab):
            if not self.takes(tokens):
                self.otherwise(slab, tokens, out=out, with_gradient=with_gradient, factor=factor, source=source)
                return
            if source is not None and source.dtype != slab.dtype:
                raise KernelInputError(f"source is {source.dtype}, its slab {slab.dtype}; the kernel wants one dtype")
            shape = self.shape(slab.shape[1], slab.dtype)
            row_kernel[(tokens.count,)](
                x_ptr=slab,
                source_ptr=source,
                upstream_ptr=factor,
                out_ptr=out,
                stride_x=slab.stride(0),
                stride_source=0 if source is None else source.stride(0),
                stride_out=out.stride(0),
                V=slab.shape[1],
                U=shape.loads,
                R=shape.num_warps * shape.warp_size,
                C=LOAD_BYTES // slab.dtype.itemsize,
                BACKWARDS=shape.backwards,
                FILL=fill_of(slab.dtype),
                GRADIENT=with_gradient,
                num_warps=shape.num_warps,
                **tokens_of(tokens),
                **settings_of(tokens.settings),
            )
