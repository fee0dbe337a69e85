"""No import circle in this room: not through an import inside a function, nor through one for types only."""

from __future__ import annotations

from tests.test_house import ROOT, imported, sources


def test_no_module_imports_itself_through_others() -> None:
    files = {".".join(["potstill", *path.relative_to(ROOT).with_suffix("").parts]): path for path in sources("storage")}
    names = {name.removesuffix(".__init__"): path for name, path in files.items()}
    reached = {name: {found for _, found in imported(path) if found in names} - {name} for name, path in names.items()}
    assert "potstill.storage.rows.columns" in reached["potstill.storage.store.spec"]
    for _ in names:
        for found in reached.values():
            found |= set().union(*(reached[other] for other in found))
    assert not sorted(name for name, found in reached.items() if name in found)
