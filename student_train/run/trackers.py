"""Places that figures go to besides the JSON lines: TensorBoard and Weights & Biases (extra: tracking)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Literal, Protocol

from potstill.common.errors import UserError
from potstill.student_train.config.train import LoggingConfig


class Tracker(Protocol):
    """A place that figures go to besides the JSON lines."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one line of metrics. Raises OSError when it cannot be written."""

    def close(self) -> None:
        """Write what is left."""


def flat_numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numeric figures of a record, named kind/figure, those of a group inside kind/group/name/figure."""
    found: dict[str, float] = {}

    def add(place: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                add(f"{place}/{name}", part)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[place] = float(value)

    for name, value in record.items():
        if name != "step":
            add(f"{record['kind']}/{name}", value)
    return found


class TensorBoardTracker:
    """TensorBoard events in `<run>/tensorboard`."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        for name, value in flat_numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases; `offline` writes to `<run>/wandb`, and nowhere else, and sends nothing."""

    def __init__(self, run: Path, *, mode: Literal["offline", "online"], name: str) -> None:
        # Its own log would else go to the user's cache, which on a cluster's node may be no place to write.
        os.environ.setdefault("WANDB_CACHE_DIR", str(run / "wandb" / "cache"))
        if mode == "offline":
            # The argument below alone does not reach its telemetry, which would still call its server at exit.
            os.environ["WANDB_MODE"] = mode
        import wandb

        # One id per folder: a resumed run continues in the same place, and two folders never meet.
        key = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(project="potstill", name=name, dir=str(run), mode=mode, id=key, resume="allow")
        except wandb.Error as error:
            raise UserError(
                f"logging.wandb is {mode} but wandb fails: {error}; correct that, or set logging.wandb: offline "
                f"(then: wandb sync {run / 'wandb'}/offline-run-*)"
            ) from error

    def log(self, record: dict[str, Any]) -> None:
        self._run.log(flat_numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def check_trackers(options: LoggingConfig) -> None:
    """Refuse trackers that cannot work here, before a model is built and anything is written. Raises UserError."""
    wanted = {"tensorboard": options.tensorboard, "wandb": options.wandb != "off"}
    for package in (name for name, is_wanted in wanted.items() if is_wanted):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"logging.{package} needs the extra: pip install 'potstill[tracking]'")
    if options.wandb == "online":
        import wandb

        # wandb.init would ask for a key on a terminal, and a job that has one but no person would wait without end.
        if not wandb.login(prompt=False, verify=False):
            raise UserError(
                "logging.wandb is online, but wandb has no key here: set WANDB_API_KEY, run `wandb login` on this "
                "machine first (and see that WANDB_MODE is not set), or take logging.wandb: offline"
            )


def open_trackers(run: Path, options: LoggingConfig, *, name: str) -> list[Tracker]:
    """The trackers that the configuration asks for. Raises UserError when one does not start."""
    trackers: list[Tracker] = []
    if options.tensorboard:
        trackers.append(TensorBoardTracker(run))
    if options.wandb != "off":
        trackers.append(WandbTracker(run, mode=options.wandb, name=name))
    return trackers
