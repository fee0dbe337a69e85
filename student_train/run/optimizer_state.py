"""The optimizer's state made as at the first step of a run, under every ZeRO stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def clear_optimizer(optimizer: Any) -> None:
    """Set moments and step counters to 0, in place; weights, their float32 copies and learning rates stay.

    `optimizer`: of a DeepSpeed engine. An optimizer that steps from moments of 0 and a counter of 0 takes the step of
    one that was just made. This rank's part alone is touched, so that ranks need not talk. Raises RuntimeError at a
    state that it does not know.
    """
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[name] = type(value)(0)
            else:
                raise RuntimeError(
                    f"the optimizer keeps {name} of type {type(value).__name__}, which cannot be set back; this is a "
                    "defect of potstill, please report it with optimizer.kind, zero_stage and deepspeed"
                )
