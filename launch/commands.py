"""The table of commands. A new one is a `Command` in one of the files below and an entry here."""

from __future__ import annotations

from potstill.launch.command import Command, CommandGroup
from potstill.launch.completion_command import completion_command
from potstill.launch.demo_command import DEMO
from potstill.launch.import_commands import IMPORT
from potstill.launch.inspect_command import INSPECT
from potstill.launch.plan import PLAN
from potstill.launch.prune_command import PRUNE
from potstill.launch.repair_command import REPAIR
from potstill.launch.rollout_command import ROLLOUT
from potstill.launch.status_command import STATUS
from potstill.launch.store_commands import GC, SEAL, STATS
from potstill.launch.student_commands import EVAL, EXPORT, PRESETS, REPORT
from potstill.launch.teacher_commands import DUMP, PREPARE, SCORE
from potstill.launch.train_command import TRAIN
from potstill.launch.verify_command import VERIFY

_COMPLETED: tuple[Command | CommandGroup, ...] = (
    PLAN,
    PREPARE,
    IMPORT,
    DUMP,
    SCORE,
    ROLLOUT,
    STATUS,
    SEAL,
    VERIFY,
    REPAIR,
    INSPECT,
    STATS,
    GC,
    PRUNE,
    PRESETS,
    TRAIN,
    EVAL,
    REPORT,
    EXPORT,
    DEMO,
)
COMMANDS = (*_COMPLETED, completion_command(_COMPLETED))
