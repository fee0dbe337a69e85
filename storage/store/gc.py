"""collect_garbage: remove what a sealed store does not name (attempts that lost, temporary files)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from potstill.storage.errors import UnsealedError
from potstill.storage.files.folder import StoreFolder, StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.store.seal import load_manifest
from potstill.storage.store.writer import load_spec

_ATTEMPT = re.compile(r"u\d{7,12}-[0-9a-f]{12}\.arrow")
_SPARE_INDEX = re.compile(r"index(-[0-9a-f]{12})?\.arrow")


@dataclass(frozen=True)
class GcReport:
    """Files that were removed (or would be, in a dry run) and their bytes."""

    dry_run: bool
    files: tuple[str, ...]
    num_bytes: int

    def format(self) -> str:
        """Text for a terminal."""
        verb = "would remove" if self.dry_run else "removed"
        return "\n".join([f"{verb} {len(self.files)} files, {self.num_bytes} bytes", *(f"  {f}" for f in self.files)])


def collect_garbage(path: StorePath, *, dry_run: bool) -> GcReport:
    """Sweep a sealed store; UnsealedError before the seal, when an unnamed file may be a live attempt."""
    folder = open_folder(path)
    manifest = load_manifest(folder, load_spec(folder))
    if manifest is None:
        raise UnsealedError(
            f"{folder.url} is not sealed, and files without a record may still be in use; "
            f"seal it first: potstill seal {folder.url}"
        )
    named = {unit.file for unit in manifest.units}
    doomed = [f"units/{n}" for n in folder.names("units") if _ATTEMPT.fullmatch(n) and n not in named]
    doomed += [f"tmp/{n}" for n in folder.names("tmp")]
    doomed += [n for n in folder.names("") if _SPARE_INDEX.fullmatch(n) and n != manifest.index_file]
    sizes = [folder.size(name) or 0 for name in doomed]
    if not dry_run:
        _remove(folder, doomed)
    return GcReport(dry_run, tuple(doomed), sum(sizes))


def _remove(folder: StoreFolder, names: list[str]) -> None:
    for name in names:
        folder.delete(name)
