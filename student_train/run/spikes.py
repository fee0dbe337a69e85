"""Loss spikes: a step whose loss stands far above the steps before it. A pure rule, and its memory between steps.

The rule is the one of OLMo-core's optimizer that skips steps (`optim/skip_step_optimizer.py`): above the mean of the
last losses by more than `sigma` of their standard deviations. Here it warns or stops, and never drops an update: a
dropped one would change what the run has learnt from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from potstill.common.errors import UserError

# A spread over fewer losses is too rough to judge by; OLMo-core too waits for half a window.
SHORTEST_WINDOW = 4


class LossSpikeError(UserError):
    """The loss jumped and spike_policy is stop; the message says at which step, on which rows, and by how much."""


@dataclass(frozen=True)
class Spike:
    """A loss (nats) above `limit` = mean + sigma * std of the `num_losses` losses before it."""

    loss: float
    mean: float
    std: float
    limit: float
    num_losses: int

    def format(self, *, sigma: float) -> str:
        """The figures in words."""
        return (
            f"loss {self.loss:.5g} is above {self.limit:.5g} = mean {self.mean:.5g} + {sigma:g} * std {self.std:.3g} "
            f"of the {self.num_losses} steps before"
        )


def find_spike(before: Sequence[float], loss: float, *, window: int, sigma: float) -> Spike | None:
    """Judge `loss` by the last `window` finite losses of `before`; None also while there is less than half a window."""
    last = before[-window:]
    if len(last) < max(SHORTEST_WINDOW, window // 2) or not math.isfinite(loss):
        return None
    # Centred on the first loss, so that equal losses have exactly their value as mean and no spread.
    mean = last[0] + math.fsum(value - last[0] for value in last) / len(last)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in last) / (len(last) - 1))
    limit = mean + sigma * std
    return Spike(loss, mean, std, limit, len(last)) if loss > limit else None


@dataclass
class SpikeWindow:
    """The last finite losses of a stage, and how many spikes the run has had; part of the checkpoint."""

    stage: int | None = None  # None: no loss was judged yet
    losses: list[float] = field(default_factory=list)  # nats, oldest first
    num_spikes: int = 0

    def judge(self, loss: float, *, stage: int, window: int, sigma: float) -> Spike | None:
        """Judge one step's global loss (nats) by the losses before it, then remember it.

        A new stage has another loss, so it starts an empty window. A loss that is not finite is left out: it is the
        business of nan_policy, and one of them would spoil every mean. All ranks give the same all-reduced loss and so
        come to the same answer.
        """
        if self.stage != stage:
            self.stage, self.losses = stage, []
        spike = find_spike(self.losses, loss, window=window, sigma=sigma)
        if math.isfinite(loss):
            self.losses = [*self.losses, loss][-window:]
        if spike is not None:
            self.num_spikes += 1
        return spike
