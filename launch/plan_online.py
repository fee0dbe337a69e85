"""Online against offline: the teacher beside every student, or a dump once, a store, and students that read it.

Online, a student's run carries the teacher's forward pass for every token that it sees, on the same GPUs, in every
pass over the text again; offline, the dump does so once. What is compared is GPU hours, and money where prices are
named. The teacher's speed is that of its forward pass alone (measured: that of the dump, which also selects).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from potstill.launch.plan_limits import format_hours

# A price in USD of a terabyte kept for a month: S3 Standard in us-east-1, the first 50 TB, list price of 2025.
PRICE_OF_TB_MONTH = 23.0
PRICE_SOURCE = "USD; default: S3 Standard us-east-1, list price of 2025"
# Bytes per parameter under AdamW in mixed precision: weights and gradients in 16 bits, master weights and two moments
# in 32 (Rajbhandari et al. 2020, ZeRO, section 3.1). Activations come on top, here and in the teacher.
_TRAINING_BYTES, _USABLE = 16.0, 0.7
_SAME = 1e-9  # relative: sums of the same hours in another order are no difference
LEFT_OUT = ("online or offline", "not priced: name a student (--student MODEL)")


@dataclass(frozen=True, kw_only=True)
class Prices:
    """In USD; without a price of GPU hours only those hours are compared."""

    gpu_hour: float | None
    tb_month: float
    months: float


@dataclass(frozen=True, kw_only=True)
class OnlinePlan:
    """Both ways, for one student and for many. Hours are those of all GPUs together."""

    student_hours: float  # a run from the store
    own_hours: float  # of an online run, the student's part
    teacher_hours: float  # of an online run, the teacher's part
    dump_hours: float
    store_bytes: float
    passes: float  # how often a student sees each dumped token
    device: str
    num_gpus: int
    least_gpus: tuple[int, int] | None  # that hold an online run, and a student alone
    prices: Prices

    @property
    def saved_hours(self) -> float:
        """Of each student that reads the store."""
        return self.own_hours + self.teacher_hours - self.student_hours

    @property
    def rent(self) -> float:
        """Of the store for the months that it is kept, in USD."""
        return self.store_bytes / 1e12 * self.prices.tb_month * self.prices.months

    def break_even(self) -> int | None:
        """The smallest number of students from which offline takes fewer GPU hours; None: it never does."""
        return fewest(self.dump_hours, self.saved_hours)

    def break_even_money(self) -> int | None:
        """As `break_even`, in USD with the store's rent; ValueError without a price of GPU hours."""
        if self.prices.gpu_hour is None:
            raise ValueError("break_even_money needs a price of GPU hours")
        return fewest(self.dump_hours * self.prices.gpu_hour + self.rent, self.saved_hours * self.prices.gpu_hour)

    def rows(self) -> list[tuple[str, str]]:
        """What and how much, as text."""
        times = f"{self.passes:.2f} times the tokens of the dump"
        rows = [
            (
                "online, a student",
                f"{_hours(self.own_hours + self.teacher_hours)} {self.device} hours: {_hours(self.own_hours)} of its "
                f"own, {_hours(self.teacher_hours)} of the teacher's forward pass ({times})",
            ),
            (
                "offline, a student",
                f"{_hours(self.student_hours)} {self.device} hours, after a dump of {_hours(self.dump_hours)} for all",
            ),
            ("offline is cheaper", f"{_from(self.break_even())} (in {self.device} hours)"),
            ("", self._what_voids()),
        ]
        months = f"{self.prices.months:g} month{'s' * (self.prices.months != 1)}"
        rent = f"{self.rent:,.2f} USD for {months} of the store"
        if self.prices.gpu_hour is None:
            rows.append(("rent of the store", rent))
        else:
            rows.append(
                (
                    "offline is cheaper",
                    f"{_from(self.break_even_money())} (in USD: {self.prices.gpu_hour:g} a {self.device} hour, {rent})",
                )
            )
        if self.least_gpus is not None:
            online, alone = self.least_gpus
            rows.append(
                ("memory, GPUs at least", f"{online} online (teacher and student), {alone} for a student alone")
            )
        return rows

    def notes(self) -> Iterator[str]:
        """What does not fit."""
        if self.least_gpus is not None and self.least_gpus[0] > self.num_gpus >= self.least_gpus[1]:
            yield (
                f"online does not fit {self.num_gpus} GPUs: the teacher's weights beside the student's state need "
                f"{self.least_gpus[0]} or more, a student from the store {self.least_gpus[1]}"
            )

    def _what_voids(self) -> str:
        """How many students a dump must serve, as a store speaks for one teacher, text and selection alone."""
        number = self.break_even()
        if number is None:
            return "the store never pays: reading it ends the student's speed, and the teacher's forward pass does not"
        many = f"{number:,} students" if number > 1 else "one student"
        return f"a new teacher, text or selection voids the store: each needs {many} or more (seeds and settings count)"


def online_plan(
    *,
    student_tokens: float,
    dump_tokens: float,
    student_rate: float,
    step_rate: float,
    teacher_rate: float,
    startup_seconds: float,
    num_gpus: int,
    dump_hours: float,
    store_bytes: float,
    device: str,
    least_gpus: tuple[int, int] | None,
    prices: Prices,
) -> OnlinePlan:
    """Price both ways. Rates are tokens per second over all GPUs: a student from a store, its step alone, the teacher.

    `startup_seconds` is what loading the teacher costs each GPU at the start of each run.
    """
    gpu_hours = num_gpus / 3600
    return OnlinePlan(
        student_hours=student_tokens / student_rate * gpu_hours,
        own_hours=student_tokens / step_rate * gpu_hours,
        teacher_hours=(student_tokens / teacher_rate + startup_seconds) * gpu_hours,
        dump_hours=dump_hours,
        store_bytes=store_bytes,
        passes=student_tokens / dump_tokens,
        device=device,
        num_gpus=num_gpus,
        least_gpus=least_gpus,
        prices=prices,
    )


def fewest(once: float, saved: float) -> int | None:
    """The smallest n with `once < n * saved`; None where nothing is saved."""
    if saved <= 0:
        return None
    return math.floor(once / saved * (1 + _SAME)) + 1


def gpus_that_hold(*, teacher_bytes: float, student_parameters: float, memory: float) -> tuple[int, int]:
    """GPUs that hold teacher and student, and a student alone, both sharded: weights and AdamW's state alone."""
    student = _TRAINING_BYTES * student_parameters
    online, alone = (max(1, math.ceil(need / (_USABLE * memory))) for need in (student + teacher_bytes, student))
    return online, alone


def _hours(hours: float) -> str:
    return format_hours(hours * 3600)


def _from(number: int | None) -> str:
    return "never" if number is None else f"from {number:,} student{'s' * (number > 1)} on"
