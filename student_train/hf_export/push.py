"""The two halves of `export --push`: a look before anything is made, and the upload of the checked folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from potstill.common.errors import UserError
from potstill.common.hub_upload import run_upload
from potstill.student_train.config.train import ExportConfig

LOOK_SECONDS = 60.0
# An upload may take what the folder takes at a slow line's speed, and some for the requests around it.
UPLOAD_SECONDS, SLOWEST_BYTES_PER_SECOND = 300.0, 1e6


def look_first(config: ExportConfig) -> Mapping[str, Any]:
    """What stands in the repository of `config.push`; raises UserError where it may not be pushed to."""
    return run_upload("look", _asked(config), seconds=LOOK_SECONDS)


def push_folder(config: ExportConfig, *, step: int, seen: Mapping[str, Any]) -> str:
    """Push `config.output_dir` on top of what `look_first` saw; returns a line for a person. Raises UserError."""
    folder = config.output_dir.resolve()
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    asked = {**_asked(config), "seen": dict(seen), "folder": str(folder), "message": f"potstill export of step {step}"}
    try:
        found = run_upload("upload", asked, seconds=UPLOAD_SECONDS + num_bytes / SLOWEST_BYTES_PER_SECOND)
    except UserError as error:
        raise UserError(
            f"{error}\nthe export itself is whole and checked: {config.output_dir}; push it by hand with `hf upload "
            f"{config.push} {config.output_dir}`, or export again"
        ) from error
    return f"pushed to {found['url']}: {found['files']} files, compared by their digests"


def _asked(config: ExportConfig) -> dict[str, Any]:
    return {
        "repo": config.push,
        "revision": config.push_revision,
        "private": config.private,
        "force": config.force,
    }
