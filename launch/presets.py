"""Presets: commented YAML files in `launch/presets/`, looked up by name."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path

from potstill.common.errors import ConfigError

log = logging.getLogger("potstill.launch.presets")
FOLDER = Path(__file__).resolve().parent / "presets"
# Names that presets had before, and still have for those who know them by these.
RENAMED = {"minillm_plm": "miniplm"}


@dataclass(frozen=True)
class Preset:
    """One preset: its name, its file, and the first line of comment in the file."""

    name: str
    path: Path
    summary: str


def _summary(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            text = line.lstrip("# ").strip()
            if text:
                return text
        elif line.strip():
            break
    return ""


def list_presets() -> list[Preset]:
    """All presets in the order of their names."""
    return [Preset(path.stem, path, _summary(path)) for path in sorted(FOLDER.glob("*.yaml"))]


def find_preset(name: str) -> Preset:
    """The preset of that name, also of one it had before, which the log says. Raises ConfigError naming the nearest."""
    known = {preset.name: preset for preset in list_presets()}
    if name in RENAMED:
        log.warning("preset %s is called %s now; the old name is still found", name, RENAMED[name])
        name = RENAMED[name]
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    raise ConfigError(f"preset {name!r} does not exist in {FOLDER}; {hint}")
