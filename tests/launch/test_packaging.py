"""A wheel built from the source distribution works away from the checkout: the links have become real files.

A checkout whose links are text files builds nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("common", "kernels", "launch", "storage", "student_train", "teacher_dump")


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_wheel_from_sdist(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    run("git", "clone", "--quiet", str(ROOT), str(tree), cwd=tmp_path)
    run(sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(tree), cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "ls-files", *ROOMS, cwd=tree).splitlines()
    wanted = {f"potstill/{name}" for name in tracked if name.endswith((".py", ".yaml", ".sh", ".sbatch"))}
    assert wanted - names == set()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"potstill"}
    assert "potstill/py.typed" in names
    assert "potstill/kernels/__init__.py" not in names

    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    rooms = ", ".join(f"potstill.{room}" for room in ("kernels.loss", "storage", "teacher_dump", "student_train"))
    code = f"import {rooms}; print(potstill.student_train.__file__)"
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=site).strip().startswith(str(site))
    listed = run(sys.executable, "-m", "potstill.launch", "presets", cwd=tmp_path, path=site)
    assert "distill" in listed


@pytest.mark.parametrize("links", ["folders", "text", "missing"])
def test_a_checkout_without_links_is_not_built(tmp_path: Path, links: str) -> None:
    package = tmp_path / "src" / "potstill"
    package.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src/potstill/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for room in ROOMS:
        if links == "folders":
            shutil.copytree(ROOT / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
        elif links == "text":
            (package / room).write_text(f"../../{room}")
    code = "import setuptools.build_meta as build; print(build.prepare_metadata_for_build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if links == "folders":
        assert done.returncode == 0, done.stderr
        (listed,) = tmp_path.rglob("SOURCES.txt")
        assert "src/potstill/storage/loading/order.py" in listed.read_text()
        return
    assert done.returncode != 0
    said = done.stderr.strip().splitlines()[-1]
    assert str(package) in said and all(room in said for room in ROOMS) and "core.symlinks" in said
    assert ("text files" if links == "text" else "missing") in said
