"""What stands beside every result: date, commit, machine, versions."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

from potstill.student_train.run.run_folder import versions

SHOWN = ("torch", "deepspeed", "transformers")


def about() -> dict[str, Any]:
    """Date, commit, machine and versions, for the JSON of a result."""
    found = versions()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": found["commit"][:12],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: found[name] for name in ("python", *SHOWN)},
    }


def about_line() -> str:
    """The same in one line of text."""
    found = about()
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['date']}, commit {found['commit']}, {found['machine']}, {packages}. Not measured on a GPU."
