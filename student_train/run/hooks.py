"""What an engine that runs the trainer inside its own worker hears of a run, and how it asks for an end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _nothing(record: dict[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """`report` gets each line of metrics, and of each checkpoint its step and place, on all ranks in one order.

    `stop_reason` is asked before every step, as the stop file is: a reason on any rank stops all of them.
    """

    report: Callable[[dict[str, Any]], None] = _nothing
    stop_reason: Callable[[], str | None] = lambda: None
