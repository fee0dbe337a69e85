"""Settings that only some formats read: an import that would not look at one that is set is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from potstill.common.errors import UserError


class HasOptions(Protocol):
    """An entry of a table of formats; `options`: the keys of the configuration that not every format reads."""

    @property
    def options(self) -> tuple[str, ...]: ...


def check_options(table: Mapping[str, HasOptions], format: str, settings: Mapping[str, object]) -> None:
    """Raise UserError where a key is set (not None) that other formats of the table read, and this one does not."""
    for key, value in settings.items():
        owners = [name for name, entry in table.items() if key in entry.options]
        if value is not None and owners and format not in owners:
            raise UserError(
                f"{key} is of files of format {' or '.join(owners)}, and these are of format {format}, which has "
                f"none; leave {key} out, or name the format (--format)"
            )
