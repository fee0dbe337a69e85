"""Lines of metrics over the training steps since the line before."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from potstill.student_train.run.metrics import Meter, MetricsLog, ModelCost, loss_figures, peak_memory_bytes
from potstill.student_train.run.run_base import RunBase
from potstill.student_train.run.source_figures import source_figures, source_text
from potstill.student_train.run.step_watch import StepWatch

log = logging.getLogger(__name__)


class TrainLines:
    """Writes the lines, and holds what a line tells of the last step: its learning rate and gradient norm."""

    def __init__(
        self,
        base: RunBase,
        *,
        watch: StepWatch,
        meter: Meter,
        metrics: MetricsLog,
        cost: ModelCost,
    ) -> None:
        self._base, self._watch = base, watch
        self._meter, self._metrics, self._cost = meter, metrics, cost
        self._waited_seconds = 0.0  # of data, when the last line was written
        self.lr = 0.0  # of the last step
        self.empty_steps = 0  # since the last line, whose rows and documents all weighed 0
        self.plain_norm: Tensor | None = None  # []: gradient norm of the last step, where the optimizer keeps none

    @property
    def is_open(self) -> bool:
        """Whether there was a step since the last line."""
        return bool(self._meter.digests)

    def end(self) -> None:
        """Write a line over the steps since the last one; there must be one (a collective call).

        Raises what StepWatch.read raises: a line tells what is known of the steps before its last one.
        """
        self._watch.read()
        seconds = self._meter.seconds()
        sums, losses = self._meter.reduce()
        self._base.state.tokens += int(sums["tokens"])
        self._base.state.runtime_seconds += seconds
        record = self._record(sums, losses, seconds)
        self._metrics.write(record)
        if self._base.topology.is_main:
            step, total = self._base.state.step, self._base.plan.total_steps
            sources = f" ({source_text(record['sources'])})" if "sources" in record else ""
            log.info("step %d/%d loss %.4f lr %.3g%s", step, total, record["loss"], self.lr, sources)
            if self.empty_steps:
                log.warning(
                    "%d of the %d steps up to step %d had no loss: by the scores of rescoring all that was in their "
                    "batches weighs 0",
                    *(self.empty_steps, len(losses), step),
                )
        self.empty_steps = 0
        self._meter.reset()

    def _record(self, sums: dict[str, float], losses: list[float], seconds: float) -> dict[str, Any]:
        base, state, num_steps = self._base, self._base.state, len(losses)
        norm = base.engine.get_global_grad_norm() if self.plain_norm is None else self.plain_norm
        sources = source_figures(sums, base.plan.source_names)
        waited, self._waited_seconds = base.legs.wait_seconds - self._waited_seconds, base.legs.wait_seconds
        return {
            "kind": "train",
            "step": state.step,
            "tokens": state.tokens,
            "stage": base.plan.segment(state.step - 1).span.name,
            "loss": sum(losses) / num_steps,
            **loss_figures(sums),
            **({"sources": sources} if sources else {}),
            "lr": self.lr,
            "grad_norm": None if norm is None else float(norm),
            **({"empty_steps": self.empty_steps} if self.empty_steps else {}),
            "skipped_steps": int(base.engine.skipped_steps),
            **({} if base.config.spike_policy == "off" else {"loss_spikes": state.spikes.num_spikes}),
            "tokens_per_second": sums["tokens"] / seconds,
            "mfu": self._cost.utilisation(sums, seconds=seconds, world_size=base.topology.world_size),
            "flops_saved_share": self._cost.saved_share(sums),
            "row_share": base.plan.row_share(state.step - 1),
            "step_seconds": seconds / num_steps,
            "data_wait_seconds": waited,
            "peak_memory_bytes": peak_memory_bytes(base.topology.device),
            "runtime_seconds": state.runtime_seconds,
            "step_losses": losses,
            "row_digests": self._meter.digests,
        }
