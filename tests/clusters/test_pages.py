"""The pages of docs/cluster: short, listed in docs/cluster.md, and each of them run by a test that reads it."""

from __future__ import annotations

import pytest

from tests.clusters.pages import PAGES, ROOT, blocks, commands

NAMES = sorted(path.stem for path in PAGES.glob("*.md"))
TESTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "clusters").glob("test_*.py")}


def test_every_engine_has_its_page_in_the_list() -> None:
    index = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert NAMES and [name for name in NAMES if f"(cluster/{name}.md)" not in index] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_short_and_what_it_says_is_run(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120 and commands(name)
    assert {block.language for block in blocks(name)} <= {"sh", "python", "yaml", "text"}
    readers = [test for test, source in TESTS.items() if f'"{name}"' in source and test != "test_pages.py"]
    assert readers, f"no test of tests/clusters reads docs/cluster/{name}.md"
