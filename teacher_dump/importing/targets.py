"""`potstill import targets`: a teacher's targets that another program wrote -> a targets store over a tokens store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from potstill.teacher_dump.importing.targets_config import ImportTargetsConfig

if TYPE_CHECKING:
    from potstill.teacher_dump.importing.import_targets_summary import ImportTargetsSummary

__all__ = ["ImportTargetsConfig", "import_targets"]


def import_targets(config: ImportTargetsConfig) -> ImportTargetsSummary:
    """Read foreign targets into sealed stores; see potstill.teacher_dump.importing.import_targets_run.

    After a kill the same call continues, to the same bytes. Raises UserError for files that are not what they should be
    and StoreError for trouble with the stores.
    """
    from potstill.teacher_dump.importing import import_targets_run

    return import_targets_run.run_import(config)
