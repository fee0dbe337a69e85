"""The rules that keep the house in order: arrows between rooms, links of the package, sizes, listed parts, texts."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("common", "kernels", "launch", "storage", "student_train", "teacher_dump")
STAGES = {"kernels", "storage", "common"}
MAY_IMPORT: dict[str, set[str]] = {  # rooms, or single modules of a room
    "common": set(),
    # Their errors derive from the one base, and stores and run folders share a warning; both import nothing of a room.
    "storage": {"common.errors", "common.permissions"},
    "kernels": {"common.errors"},
    "teacher_dump": STAGES,
    "student_train": STAGES,
    "launch": STAGES | {"teacher_dump", "student_train"},
}
# What a room may not import from outside, and why that would cost something.
FOREIGN = {
    "common": {"torch", "numpy", "pyarrow", "transformers", "deepspeed"},  # `potstill --help` imports it
    "storage": {"torch", "transformers", "deepspeed", "pydantic", "triton"},  # readable without a training stack
    "kernels": {"pyarrow", "transformers", "deepspeed", "pydantic", "zstandard"},  # tensors in, tensors out
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file names in an import, with its line; relative ones made absolute.

    At any depth.
    """
    package = ["potstill", *path.relative_to(ROOT).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*stem, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_between_the_rooms(room: str) -> None:
    wrong = []
    for path in sources(room):
        for line, name in imported(path):
            parts = name.split(".")
            where = f"{path.relative_to(ROOT)}:{line} imports {name}"
            if parts[0] in ROOMS:
                wrong.append(f"{where}; write potstill.{name}")
            elif parts[0] == "potstill" and len(parts) > 1 and parts[1] in ROOMS and parts[1] != room:
                if not {parts[1], ".".join(parts[1:3])} & MAY_IMPORT[room]:
                    wrong.append(f"{where}; {room} may import {sorted(MAY_IMPORT[room]) or 'no other room'}")
            elif parts[0] in FOREIGN.get(room, set()):
                wrong.append(where)
    assert sources(room), f"{room} holds no source"
    assert not sorted(set(wrong)), "\n".join(sorted(set(wrong)))


def test_the_scan_of_imports_sees_each_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "launch" / "inner").mkdir(parents=True)
    path = tmp_path / "launch" / "inner" / "a.py"
    path.write_text(
        "def f():\n    import x.y\n    from .. import b\n    from .c import d\n    from potstill import storage\n"
    )
    names = {name for _, name in imported(path)}
    assert {"x.y", "potstill.launch.b", "potstill.launch.inner.c", "potstill.storage"} <= names


def module_name(path: Path) -> str:
    parts = ("potstill", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree without those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from run_time_nodes(other)
        else:
            yield child
            yield from run_time_nodes(child)


def import_graph(room: str) -> dict[str, set[str]]:
    """Module -> modules of the same room that it imports, at the top or inside functions.

    `from potstill.x import y` leads to the module potstill.x.y where that is one, else to potstill.x.
    """
    modules = {module_name(path): path for path in sources(room)}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        wanted: list[str] = []
        for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.Import):
                wanted += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{path}:{node.lineno}: write the whole name of the module"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted += [one if one in modules else node.module for one in inner]
        graph[name] = {one for one in wanted if one in modules}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which leads to every other of its group, and modules that import themselves."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            for name in graph[waiting.pop()] - found:
                found.add(name)
                waiting.append(name)
        return found

    leads_to = {name: reached(name) for name in graph}
    groups = {
        tuple(sorted(other for other in leads_to[name] if name in leads_to[other]))
        for name in graph
        if name in leads_to[name]
    }
    return sorted(map(list, groups))


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_circle(room: str) -> None:
    assert circles(import_graph(room)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_does_not_use_its_own_front_door(room: str) -> None:
    # The package's __init__ is for other rooms; inside, the module itself is named, so that no circle can begin there.
    through = [name for name, wanted in import_graph(room).items() if f"potstill.{room}" in wanted]
    assert through == []


def test_inner_packages_import_nothing() -> None:
    # Importing a module runs the packages around it: what they imported would be a circle that no module names.
    packages = [path for path in sources(*ROOMS) if path.name == "__init__.py"]
    inner = [path for path in packages if path.parent.parent != ROOT]
    assert inner and [path for path in inner if list(imported(path))] == []


def test_the_search_for_circles_sees_each_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    inner = tmp_path / "launch" / "inner"
    inner.mkdir(parents=True)
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from potstill.launch.inner import a\n"
    (tmp_path / "launch" / "__init__.py").write_text("from potstill.launch.inner.d import x\n")
    (inner / "a.py").write_text("from potstill.launch.inner import b\n")
    (inner / "b.py").write_text("def f():\n    import potstill.launch.inner.c\n")
    (inner / "c.py").write_text("def f():\n    from potstill.launch.inner.a import x\n")
    (inner / "d.py").write_text(typed + "def f():\n    from potstill.launch import x\n")
    group = [f"potstill.launch.inner.{name}" for name in "abc"]
    graph = import_graph("launch")
    assert circles(graph) == [["potstill.launch", "potstill.launch.inner.d"], group]
    assert graph["potstill.launch.inner.d"] == {"potstill.launch"}


def test_package_is_links_to_the_rooms() -> None:
    package = ROOT / "src" / "potstill"
    links = {path.name: os.readlink(path) for path in package.iterdir() if path.is_symlink()}
    assert links == {room: f"../../{room}" for room in ROOMS}
    assert all((package / room).is_dir() for room in ROOMS)
    assert (package / "py.typed").is_file()


def test_kernels_is_a_namespace_folder() -> None:
    # A regular package of this name on sys.path stops transformers from importing any model.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    missing = [room for room in ROOMS if room != "kernels" and not (ROOT / room / "__init__.py").is_file()]
    assert not missing


def test_transformers_imports_a_model_with_the_root_on_the_path() -> None:
    code = "import sys; sys.path.insert(0, ''); from transformers import LlamaForCausalLM; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize("folder", [*ROOMS, "tests", "benchmarks", "examples"])
def test_files_and_functions_stay_small(folder: str) -> None:
    too_long = []
    for path in sources(folder):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text, str(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not too_long, "\n".join(too_long)


def test_every_benchmark_is_listed() -> None:
    from benchmarks.__main__ import BENCHMARKS

    # What can be run by itself is a benchmark; the other files are what benchmarks share.
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py")}
    scripts = {name for name, text in files.items() if 'if __name__ == "__main__"' in text} - {"__main__"}
    assert {entry.script for entry in BENCHMARKS} == scripts


def test_every_preset_is_listed_with_a_summary() -> None:
    from potstill.launch.presets import list_presets

    listed = {preset.name: preset.summary for preset in list_presets()}
    assert set(listed) == {path.stem for path in (ROOT / "launch" / "presets").glob("*.yaml")}
    assert "lm" in listed
    assert all(listed.values()), listed


def tracked_texts() -> Iterator[tuple[Path, str]]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_machine_or_registry_is_named() -> None:
    # Written in halves, so that this file does not hold the words it looks for.
    words = [
        "/wo" + "rk/",
        "/tmp/" + "base",
        "pypi" + ".org",
        "python" + "hosted",
        "--index" + "-url",
        "/ro" + "ot/",
        "pip." + "conf",
    ]
    found = [
        f"{path.relative_to(ROOT)}:{number} {word}"
        for path, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), start=1)
        for word in words
        if word in line
    ]
    assert not found, "\n".join(found)


# Words that a reader of technical English would stumble over; what users see and what the code says of itself.
QUAINT = re.compile(r"\b(mend(s|ed|ing|able)?|hangs? on|very same|for ever|goes on)\b", re.IGNORECASE)


def test_texts_are_in_plain_english() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
    code = sources(*ROOMS, "benchmarks", "examples")
    plain = [path for room in ROOMS for path in (ROOT / room).rglob("*.[ys]*") if path.suffix in (".yaml", ".sh")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*pages, *code, *plain]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if QUAINT.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "kernels"])
def test_no_name_of_a_front_door_is_also_a_folder_of_its_room(room: str) -> None:
    """Importing a module of such a folder would put the folder in the place of the function."""
    folders = {path.name for path in (ROOT / room).iterdir() if path.is_dir()}
    door = importlib.import_module(f"potstill.{room}")
    assert not folders & set(getattr(door, "__all__", ()))


def test_the_tests_that_the_page_of_demands_names_exist() -> None:
    """Files by their name, and after a colon tests by a part of theirs."""
    page = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"\b(test_\w+)(?:: ((?:\w+)(?:, \w+_\w+)*))?", page)
    assert len(named) > 60
    absent = [file for file, _ in named if file not in files]
    for file, tests in named:
        absent += [f"{file}: {part}" for part in tests.split(", ") if "_" in part and part not in files.get(file, "")]
    assert not absent
