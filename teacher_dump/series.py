"""A series of teachers over the same rows: each checkpoint of one teacher into a store of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from potstill.common.errors import UserError
from potstill.storage import StoreReader
from potstill.teacher_dump.config import DumpConfig
from potstill.teacher_dump.identity import check_fits, load_config
from potstill.teacher_dump.job import WorkerSummary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeriesSummary:
    """What a worker did for each checkpoint; looks to a caller like the summary of one dump."""

    members: tuple[WorkerSummary, ...]

    @property
    def num_workers(self) -> int:
        return self.members[0].num_workers

    @property
    def num_missing(self) -> int:
        return sum(member.num_missing for member in self.members)

    @property
    def sealed(self) -> bool:
        return all(member.sealed for member in self.members)

    def format(self) -> str:
        """The members' lines, one after another."""
        return "\n".join(member.format() for member in self.members)


def series_configs(config: DumpConfig) -> list[DumpConfig]:
    """One configuration per checkpoint, in order, with the output OUTPUT/NAME.

    A checkpoint is a folder below `teacher.model` or a path of its own; where `teacher.model` is a hub id, it is a
    revision. Raises UserError when a folder is missing or two checkpoints have the same name.
    """
    teacher = config.teacher
    configs: list[DumpConfig] = []
    for name in teacher.checkpoints:
        update: dict[str, object] = {"checkpoints": []}
        below = Path(teacher.model) / name
        if below.is_dir():
            update["model"] = str(below)
        elif Path(name).is_dir():
            update["model"] = name
        elif Path(teacher.model).is_dir():
            raise UserError(f"checkpoint {name!r}: neither {below} nor {name} is a folder")
        else:
            update["load_options"] = {**teacher.load_options, "revision": name}
        output = f"{config.output.rstrip('/')}/{Path(name).name}"
        configs.append(config.model_copy(update={"teacher": teacher.model_copy(update=update), "output": output}))
    outputs = [member.output for member in configs]
    twice = sorted({output for output in outputs if outputs.count(output) > 1})
    if twice:
        raise UserError(f"two checkpoints would be written to {twice[0]}; name folders with different last parts")
    return configs


def dump_series(config: DumpConfig, run: Callable[[DumpConfig], WorkerSummary]) -> SeriesSummary:
    """Run `run` for each checkpoint in order; what is complete is passed over, so a broken series continues.

    Every checkpoint is held against the rows before the first is run: days later is too late to hear of another
    tokenizer. Raises UserError as `run` does.
    """
    configs = series_configs(config)
    tokens = StoreReader(config.tokens)
    for member in configs:
        check_fits(member.teacher, load_config(member.teacher), tokens.spec)
    if "://" not in config.output:
        Path(config.output).mkdir(exist_ok=True)  # a store makes its own folder, but not the one around it
    summaries = []
    for number, member in enumerate(configs, start=1):
        log.info("checkpoint %d of %d -> %s", number, len(configs), member.output)
        summaries.append(run(member))
    return SeriesSummary(tuple(summaries))
