"""What libraries print goes to a file, below Python too; what potstill says stays with the person."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from potstill.common.log import setup_logging
from potstill.common.noise import noise_to

SCRIPT = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from potstill.common.log import setup_logging
from potstill.common.noise import noise_to
setup_logging()
early = logging.getLogger("early"); early.addHandler(logging.StreamHandler()); early.propagate = False
with noise_to(Path(sys.argv[1])):
    print("noise of print")
    os.write(1, b"noise below Python on 1\\n")
    os.write(2, b"noise below Python on 2\\n")
    warnings.warn("noise of a warning")
    logging.getLogger("library").warning("noise of a logger")
    early.warning("noise of an early logger")
    subprocess.run(["sh", "-c", "echo noise of a child; echo noise of its errors >&2"])
    logging.getLogger("potstill.x").info("for the person")
    sys.stderr.write("terminal" if sys.stderr.isatty() else "no terminal")
    sys.stderr.write("\\n")
print("summary")
early.warning("after")
"""
NOISE = ("print", "below Python on 1", "below Python on 2", "a warning", "a logger", "an early logger", "a child")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def check_log(path: Path) -> None:
    text = path.read_text()
    assert all(f"noise of {word}" in text or f"noise {word}" in text for word in NOISE), text
    assert "noise of its errors" in text
    assert "I for the person" in text, "the file tells the whole story"


def test_only_what_is_for_a_person_reaches_the_console(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=True)
    assert done.stdout == "summary\n"
    (first, second, third) = done.stderr.splitlines()
    assert first.endswith(" I for the person") and second == "no terminal" and third == "after"
    check_log(tmp_path / "log")


def test_a_terminal_stays_one(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    try:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "log")]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, timeout=60, env=environment())
        os.close(follower)
        shown = os.read(leader, 10000).decode()
    finally:
        os.close(leader)
    assert done.returncode == 0 and done.stdout == b"summary\n"
    assert "\nterminal" in shown and "noise" not in shown
    check_log(tmp_path / "log")


def test_streams_that_are_no_descriptors_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    out, err = sys.stdout, sys.stderr

    def fails() -> None:
        with noise_to(tmp_path / "log"):
            print("noise")
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                warnings.warn("noise too", stacklevel=1)
            logging.getLogger("potstill.x").info("hello")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fails()
    assert (sys.stdout, sys.stderr) == (out, err)
    logging.getLogger("potstill.x").info("afterwards")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition(" I ")[2] for line in captured.err.splitlines()] == ["hello", "afterwards"]
    assert "noise\n" in (tmp_path / "log").read_text() and "noise too" in (tmp_path / "log").read_text()
