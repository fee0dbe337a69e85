"""Settings for every test: one thread per process, no network look-ups, and the folder of real data where it exists.

The environment is set before anything imports torch, so that child processes inherit it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.campaign import summary

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# DeepSpeed 0.19 still calls two collectives that torch 2.13 marks as old: one warning for each process.
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.distributed.c10d_logger")


# A shell that runs the tests in the background has them ignore SIGINT, and so would each process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


if not _has_gpu():
    # Silences one warning in each process; on a machine with a GPU DeepSpeed finds it by itself.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name bytes by their length: their content (a gzip header holds the time) can differ between test processes."""
    return f"{argname}-{len(val)}-bytes" if isinstance(val, bytes) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End with what the campaigns counted: a line of JSON each, and their sum."""
    if lines := summary():
        terminalreporter.section("campaigns")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Keep torch to one thread: two ranks with two threads each thrash on two cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that a test runs sets up logging to a stream that is closed when the test ends."""
    logger = logging.getLogger("potstill")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:] = handlers
    logger.propagate = propagate
    logger.setLevel(level)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real texts and models beside the checkout; tests that need it skip themselves where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data: {SHARED_DATA} does not exist")
    return SHARED_DATA


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Give a real file system of so many KiB, and change its size when asked again."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def sized(kib: int) -> Path:
        nonlocal mounted
        remount = ["-o", "remount"] if mounted else []
        command = ["mount", "-t", "tmpfs", *remount, "-o", f"size={kib}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no `mount` here to make a small disk with")
        if done.returncode:
            pytest.skip(f"this system does not let the test make a small disk: {done.stderr.strip()}")
        mounted = True
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", str(place)], check=True)
