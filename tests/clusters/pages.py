"""What the pages of docs/cluster tell people to type, so that the tests run it as it stands there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "cluster"
_BLOCK = re.compile(r"^```([a-z]+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of docs/cluster/`page`.md in order, all of them or those of one language."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    found = [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in _BLOCK.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def commands(page: str) -> list[str]:
    """Every command of the `sh` blocks of a page, with continued lines joined, comments and empty lines left out."""
    joined = "".join(block.text for block in blocks(page, "sh")).replace("\\\n", " ")
    lines = [re.sub(r"\s+#\s.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
