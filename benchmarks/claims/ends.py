"""What the arms of a comparison end with, and at what price, as a table: steps, wall time, bytes of targets read."""

from __future__ import annotations

from typing import Any

from benchmarks.claims.base import Arm, Table
from benchmarks.claims.paired import mean_and_sd
from benchmarks.claims.runs import Runs
from benchmarks.claims.stages import store_bytes
from potstill.common.spread import Spread, differences
from potstill.storage import StoreReader

HEADER = ("arm", "held-out loss", "below its labels", "step at the labels' end", "seconds", "MB of targets")


def taught_steps(arm: Arm) -> int:
    """Steps of an arm whose stage names targets."""
    config = arm.config
    total, start, taught = int(config["run"]["max_steps"]), 0, 0
    for stage in config["curriculum"]:
        until = stage.get("until", total)
        end = until if isinstance(until, int) else round(until * total)
        taught += end - start if stage.get("targets") else 0
        start = end
    return taught


def _target_megabytes(arm: Arm) -> float:
    data: dict[str, Any] = arm.config["data"]
    places = [
        place for source in [data, *data.get("sources", {}).values()] for place in source.get("targets", {}).values()
    ]
    taught = taught_steps(arm)
    if not places or not taught:
        return 0.0
    return taught * int(data["global_batch_rows"]) * store_bytes(places[0]) / StoreReader(places[0]).num_rows / 1e6


def _step(found: list[float | None]) -> str:
    """The mean over the seeds that came there, and how many did not."""
    reached = [step for step in found if step is not None]
    if not reached:
        return "never"
    missing = len(found) - len(reached)
    return f"{Spread.of(reached).mean:.0f}" + (f" ({missing} never)" if missing else "")


def ends_table(title: str, runs: Runs, baselines: dict[str, str]) -> Table:
    """A line for each arm -> its label arm: means and standard deviations over the seeds, differences paired.

    The step is the first evaluated one at which the arm's loss is that of its label arm's end, or less. Bytes are
    those of the rows that stages with targets draw, in the store; seconds leave out evaluations.
    """
    lines = []
    for arm, baseline in baselines.items():
        ends, labels = runs.final(arm), runs.final(baseline)
        lines.append(
            (
                arm,
                mean_and_sd(ends),
                "" if arm == baseline else mean_and_sd(differences(labels, ends)),
                _step(runs.reach(arm, labels)),
                mean_and_sd(runs.final(arm, "runtime_seconds"), 0),
                f"{_target_megabytes(runs.arms[arm]):.3f}",
            )
        )
    return Table(title=title, header=HEADER, rows=tuple(lines))
