"""How the last step went, asked of all ranks at once and judged one step late, so that no step waits for the device.

Before step s all ranks add up a few figures on the device: the weight sums of the batch of s, which are needed at once
but only on the device, and what the host wants to know: whether step s - 1 was finite, its loss, whether a line of
metrics could be written, whether a rank was asked to stop. The host reads these before step s + 1, when they have long
arrived. So a bad step is found one step late, and a request to stop takes effect one step late, on all ranks alike.
`settle` looks at once: nothing is saved or measured behind a step that was not judged.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.student_train.data.unit_sums import NOTHING, UnitSums
from potstill.student_train.run.engine import all_reduce_sum
from potstill.student_train.run.late_read import LateRead
from potstill.student_train.run.metrics import MetricsLog
from potstill.student_train.run.run_base import RunBase
from potstill.student_train.run.saves import Saves
from potstill.student_train.run.spikes import LossSpikeError
from potstill.student_train.run.stop import StopRequest
from potstill.student_train.run.write_failures import ROOM

log = logging.getLogger(__name__)
_WEIGHT, _KD_WEIGHT, _UNITS, _UNIT_WEIGHT, _CHOSEN, _BAD, _LOSS, _UNWRITTEN, _STOP = range(9)


class MetricsWriteError(UserError):
    """A line of metrics could not be written; the message names the folder, the cause and the last checkpoint."""


class LossNotFiniteError(UserError):
    """The loss became NaN or infinite; the message says at which step, on which rows, and what was saved."""


@dataclass(frozen=True)
class GlobalSums:
    """Sums over the global batch, float64 [] on the device; of units where the mean of weights is over these, else 0.

    weight, kd_weight: of StepBatch; units, unit_weight, chosen: count, weight and chosen of UnitSums.
    """

    weight: Tensor
    kd_weight: Tensor
    units: Tensor
    unit_weight: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class _Question:
    """What was asked of the ranks when `step` steps were done; the answer is on its way to the host."""

    step: int
    judges_step: bool  # whether a step was trained since the question before: step - 1
    skipped_steps: int  # that DeepSpeed had counted by then, on every rank
    reason: str | None  # why this rank wants to stop


class StepWatch:
    """Looks after the steps of one run."""

    def __init__(self, base: RunBase, *, metrics: MetricsLog, stop: StopRequest, saves: Saves) -> None:
        self._base, self._metrics, self._stop, self._saves = base, metrics, stop, saves
        self._bad: Tensor | None = None  # float64 []: > 0 once a local loss of the step was not finite
        self._loss: Tensor | None = None  # float64 []: this rank's share of the step's global loss
        self._skipped_steps = base.state.skipped  # that a question has told of
        self._question: _Question | None = None
        self._answer = LateRead(9, base.topology.device)
        self._stop_reason: str | None = None

    def note(self, loss: Tensor) -> None:
        """Remember, on the device, one micro-batch's share [] of the step's global loss, and whether it was finite."""
        share = loss.detach().double()
        bad = (~torch.isfinite(share)).double()
        self._bad = bad if self._bad is None else self._bad + bad
        self._loss = share if self._loss is None else self._loss + share

    def begin_step(
        self, weight_sum: float, kd_weight_sum: float = 0.0, units: UnitSums | None = None
    ) -> tuple[GlobalSums, str | None]:
        """Judge by the answers that are there, and ask anew. One small all-reduce, no wait for the device.

        The sums are those of this rank's part of the batch. Returns the global ones, and why to stop before this step,
        the same on all ranks but for the words. Raises what `read` raises.
        """
        self.read()
        values = self._ask(weight_sum, kd_weight_sum, units or NOTHING)
        sums = (values[place] for place in (_WEIGHT, _KD_WEIGHT, _UNITS, _UNIT_WEIGHT, _CHOSEN))
        return GlobalSums(*sums), self._stop_reason

    def settle(self) -> None:
        """Let all ranks judge the last step and line of metrics now, before anything is built on them.

        Raises what `read` raises.
        """
        self.read()
        self._ask(0.0, 0.0, NOTHING)
        self.read()

    def read(self) -> None:
        """Judge by the answer to the last question, if it was not read yet. The same on all ranks.

        Raises LossNotFiniteError, LossSpikeError and MetricsWriteError.
        """
        question, self._question = self._question, None
        if question is None:
            return
        answer = self._answer.finish()
        if answer[_STOP]:
            # A signal to all ranks may have come to this one only after it was asked: its own words come first.
            own = question.reason or self._stop.reason()
            self._stop_reason = self._stop_reason or own or "another rank's request"
        self._check_finite(question, answer[_BAD])
        if question.judges_step and self._base.config.spike_policy != "off":
            self._check_spike(question.step - 1, answer[_LOSS])
        if answer[_UNWRITTEN]:
            self._raise_unwritten(question.step)

    def _ask(self, weight_sum: float, kd_weight_sum: float, units: UnitSums) -> Tensor:
        """Add up this rank's figures with those of the others. Returns the sums, float64 [9] on the device."""
        question = _Question(
            step=self._base.state.step,
            judges_step=self._loss is not None,
            skipped_steps=int(self._base.engine.skipped_steps),
            reason=self._stop.reason(),
        )
        values = torch.zeros(9, dtype=torch.float64, device=self._base.topology.device)
        # Numbers of the host are filled in, as a copy from it would wait for the device.
        values[_WEIGHT].fill_(weight_sum)
        if kd_weight_sum:
            values[_KD_WEIGHT].fill_(kd_weight_sum)
        if units is not NOTHING:
            for place, value in ((_UNITS, units.count), (_UNIT_WEIGHT, units.weight), (_CHOSEN, units.chosen)):
                values[place].fill_(value)
        values[_BAD].fill_(float(question.skipped_steps - self._skipped_steps))
        values[_UNWRITTEN].fill_(float(self._metrics.failure is not None))
        values[_STOP].fill_(float(question.reason is not None))
        if self._bad is not None and self._loss is not None:
            values[_BAD] += self._bad
            values[_LOSS] += self._loss
        self._bad = self._loss = None
        self._skipped_steps = question.skipped_steps
        self._question = question
        self._answer.start(all_reduce_sum(values))
        return values

    def _check_finite(self, question: _Question, bad: float) -> None:
        """Stop on a loss that was not finite. Raises LossNotFiniteError with the step, its rows and what is saved."""
        if not bad:
            return
        step, rows = question.step - 1, self._rows(question.step - 1)
        if self._base.config.nan_policy == "skip":
            self._base.state.skipped = question.skipped_steps
            log.warning("step %d was not finite; its update was skipped. Rows of its global batch: %s", step, rows)
            return
        raise LossNotFiniteError(
            f"the loss of step {step} is not finite. Rows of its global batch: {rows}. "
            f"Last checkpoint: {self._saves.last or 'none'}; metrics up to here are in {self._metrics.path}. "
            "Lower optimizer.lr, lengthen schedule.warmup, or look at these rows (potstill inspect), then start again: "
            "the run resumes from that checkpoint"
        )

    def _check_spike(self, step: int, loss: float) -> None:
        """Warn of a loss far above the window, or stop. Raises LossSpikeError with step, rows and figures."""
        if loss == 0.0 and self._base.plan.weighs_by_scores(step):
            return  # nothing of its batch weighed anything (loop.agree): the next loss would be a spike beside zeros
        config, window = self._base.config, self._base.state.spikes
        stage = self._base.plan.segment(step).span.index
        spike = window.judge(loss, stage=stage, window=config.spike_window, sigma=config.spike_sigma)
        if spike is None:
            return
        found = (
            f"step {step} is a loss spike: {spike.format(sigma=config.spike_sigma)}. Rows of its global batch: "
            f"{self._rows(step)}"
        )
        if config.spike_policy == "warn":
            if self._base.topology.is_main:
                log.warning("%s. Spikes of this run so far: %d", found, window.num_spikes)
            return
        raise LossSpikeError(
            f"{found}. Nothing was saved after it. Last checkpoint: {self._saves.last or 'none'}; metrics up to here "
            f"are in {self._metrics.path}. Look at these rows (potstill inspect), lower optimizer.lr, raise "
            "spike_sigma, or set spike_policy: warn, then start again: the run resumes from that checkpoint"
        )

    def _raise_unwritten(self, step: int) -> None:
        found = self._metrics.failure
        raise MetricsWriteError(
            f"step {step}: a line of metrics could not be written in {self._metrics.path.parent}: "
            f"{'see the message of rank 0' if found is None else found}. Nothing is saved behind it. Last checkpoint: "
            f"{self._saves.last or 'none'}. Please {ROOM} and start the same command again: the run resumes from there"
        ) from found

    def _rows(self, step: int) -> str:
        return ", ".join(str(row) for row in self._base.plan.rows(step).tolist())
