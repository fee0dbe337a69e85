"""The words of a claim: where it works, its arms, what it found, and what it draws.

A claim file has three functions and the `CLAIM` that names them:

    build(bench)        makes texts, teachers and stores, once: yields lists of jobs; what stands between two `yield`s
                        may read what the first list made (choose a checkpoint of the teacher, say)
    arms(bench)         {name: Arm}: the training configuration of each arm; equal configurations are run once
    judge(bench, runs)  Outcome: findings (of which those with `rule` decide), tables, plots

Its head says in words: the paper's sentence and figure, the set-up, the arms, the pass rule, the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from potstill.common.jobs import Job

if TYPE_CHECKING:
    from benchmarks.claims.runs import Runs

Scale = Literal["quick", "cpu", "gpu"]
SCALES: tuple[Scale, ...] = ("quick", "cpu", "gpu")
COUNTED = ("seeds", "samples")  # units of an effect that is a number of things


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where a claim works and how large.

    work: folder of everything; data: folder of real texts (claims that need one refuse without it); scale: `quick`
    shows the machinery, `cpu` is for two cores, `gpu` for one GPU; seeds: of the students.
    """

    work: Path
    data: Path
    scale: Scale
    seeds: tuple[int, ...]

    def folder(self, name: str) -> Path:
        """A folder of the claims' stores; scales stand apart. It is created."""
        path = self.work / "built" / self.scale / name
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: a tree of `potstill train`'s configuration without run.output_dir and run.seed.

    evals: name -> further words of `potstill eval` (`--heldout`, ...) on the finished run; Runs.evaluated reads the
    figures.
    """

    config: dict[str, Any]
    evals: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison.

    effect: its size in `unit` (a mean of paired differences, a number of seeds); interval: 95 % of that mean, or None;
    standardised: Cohen's d of the pairs, or None; values: by seed; passed: whether it is as the claim says; rule:
    whether it decides, or is told beside.
    """

    text: str
    passed: bool
    effect: float
    unit: str
    values: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    standardised: float | None = None
    rule: bool = True


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Curves of arms: thin lines for seeds, a thick one for their mean. curves: arm -> one list of (x, y) per seed."""

    name: str
    title: str
    x: str
    y: str
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]]
    log_x: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the report; the first column is text, the others numbers already written out."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a claim found. It passes when every finding that is a rule does. notes: sentences below the tables."""

    findings: tuple[Finding, ...]
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the claim holds by its rules; False without any."""
        rules = [finding.passed for finding in self.findings if finding.rule]
        return bool(rules) and all(rules)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim. The first finding that is a rule is its headline. needs: folders below --data that it reads."""

    name: str
    title: str
    build: Callable[[Bench], Iterator[list[Job]]]
    arms: Callable[[Bench], dict[str, Arm]]
    judge: Callable[[Bench, Runs], Outcome]
    needs: tuple[str, ...] = ()
