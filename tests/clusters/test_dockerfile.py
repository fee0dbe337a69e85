"""The Dockerfile, as far as it can be looked at without a container engine: its instructions, and its context."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.clusters.pages import ROOT

KNOWN = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "HEALTHCHECK", "CMD"}


@dataclass(frozen=True)
class Instruction:
    word: str
    text: str


def parse(text: str) -> list[Instruction]:
    """Instructions with continued lines joined and comments left out, as the builder reads them."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines() if line.strip()]


DOCKERFILE = parse((ROOT / "Dockerfile").read_text())


def texts(word: str) -> list[str]:
    return [instruction.text for instruction in DOCKERFILE if instruction.word == word]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the checkout out of the context; the last rule that matches decides."""
    out = False
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#"):
            pattern = rule.removeprefix("!").removeprefix("**/")
            parts = path.split("/")
            places = parts if rule.startswith("**/") else parts[:1]
            if any(fnmatch(part, pattern) for part in places):
                out = not rule.startswith("!")
    return out


def test_instructions() -> None:
    assert {instruction.word for instruction in DOCKERFILE} == KNOWN
    assert DOCKERFILE[0] == Instruction("ARG", "BASE=python:3.12-slim") and texts("FROM") == ["${BASE}"]
    defined = {text.split("=")[0] for text in texts("ARG")} | {"PATH"}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(instruction.text for instruction in DOCKERFILE)))
    assert used <= defined and {"EXTRAS", "PIP_OPTIONS"} <= used
    for command in texts("RUN"):
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=30)
    assert texts("USER") == ["10001"], "what runs is not root"
    after = [instruction.word for instruction in DOCKERFILE][-4:]
    assert after == ["USER", "WORKDIR", "HEALTHCHECK", "CMD"], "nothing is built as another user, or left to root"
    assert texts("HEALTHCHECK") == ["NONE"]
    assert not re.search(r"(?i)token|secret|password|_KEY", " ".join(texts("ENV") + texts("ARG")))


def test_what_is_copied_is_there_and_nothing_else_reaches_the_builder() -> None:
    sources = [word for text in texts("COPY") for word in shlex.split(text)[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    assert not any(ignored(source) for source in sources)
    for path in (".git", ".venv", "tests", "docs", "runs/mine", ".env", "launch/__pycache__", "hf_token"):
        assert ignored(path), path
    rooms = {path.name for path in (ROOT / "src" / "potstill").iterdir() if path.is_symlink()}
    assert rooms <= set(sources) and "src" in sources, "a room that is not copied would be missing in the image"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_installation_works_on_what_is_copied_alone(tmp_path: Path) -> None:
    """The pip line of the image, in a folder of what COPY brings: resolved with the constraints, and built."""
    for text in texts("COPY"):
        *sources, target = shlex.split(text)
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, symlinks=True)
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    (line,) = [text for text in texts("RUN") if " pip " in text]
    extras = dict(text.split("=", 1) for text in texts("ARG"))["EXTRAS"]
    line = line.replace("${PIP_OPTIONS}", "--dry-run --no-build-isolation").replace("${EXTRAS}", extras)
    line = line.replace("python -m", f"{sys.executable} -m")
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Would install" in done.stdout, done.stdout + done.stderr
    build = f"{sys.executable} -m pip wheel --no-deps --no-build-isolation -w wheels ."
    subprocess.run(shlex.split(build), cwd=tmp_path, check=True, capture_output=True, timeout=200)
    (wheel,) = (tmp_path / "wheels").glob("potstill-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"potstill/launch/node.py", "potstill/launch/templates/train_k8s.yaml"} <= names
