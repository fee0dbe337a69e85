"""What the processes of a node share: made once, whoever is killed; damage is noticed; nobody waits without end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from potstill.storage import HungReadError, NodeFolder, StoppedReadError, WriteFailedError, give_up_reads, shared_arrays
from potstill.storage.files.node_folder import default_node_root
from potstill.storage.files.waiting import LIMIT_VARIABLE

ROOT = Path(__file__).parents[2]
KEY = {"what": "squares", "version": 1}
# Says that it builds, then builds slowly: one line in `log` for each build.
SLOW = """
import os, sys, time
import numpy as np
from potstill.storage import NodeFolder, shared_arrays
folder, log, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
def build(add):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    add("half", np.zeros(1000))
    time.sleep(seconds)
    add("squares", np.arange(5) ** 2)
    return {"note": "made"}
found = shared_arrays(NodeFolder(folder, max_bytes=1 << 30), {"what": "squares", "version": 1}, build)
print(found.arrays["squares"].tolist(), found.note["note"])
"""


def start(folder, log, seconds):
    command = [sys.executable, "-c", SLOW, str(folder), str(log), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(what, seconds=20.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def node(tmp_path):
    return NodeFolder(tmp_path / "node", max_bytes=1 << 30)


def made(node, builds, value=7):
    def build(add):
        builds.append(value)
        add("numbers", np.full(1000, value, np.int32))
        add("none", np.zeros((0, 3), np.float32))
        return {"value": value}

    return shared_arrays(node, KEY, build)


def test_arrays_are_built_once_and_come_back_read_only_and_equal(node):
    builds: list[int] = []
    first, again = made(node, builds), made(node, builds)
    assert builds == [7] and again.note == {"value": 7} == first.note
    assert again.arrays["numbers"].tolist() == [7] * 1000 and again.arrays["none"].shape == (0, 3)
    assert not again.arrays["numbers"].flags.writeable and not first.arrays["numbers"].flags.writeable
    alone = made(None, builds)
    assert builds == [7, 7] and np.array_equal(alone.arrays["numbers"], first.arrays["numbers"])
    assert not alone.arrays["numbers"].flags.writeable


@pytest.mark.parametrize("place", [10, 2000, -70, -10, -1])
def test_a_damaged_or_cut_file_is_noticed_and_made_again(node, place, caplog):
    builds: list[int] = []
    held = made(node, builds)
    (path,) = node.path.glob("*.arrays")
    data = path.read_bytes()
    for wrong in (data[:place] + bytes([data[place] ^ 4]) + data[place + 1 or len(data) :], data[:place], b""):
        other = path.with_name("other")  # a file is replaced and never changed: who has it mapped keeps what it was
        other.write_bytes(wrong)
        os.replace(other, path)
        before = len(builds)
        assert made(node, builds).arrays["numbers"].tolist() == [7] * 1000
        assert len(builds) == before + 1 and "it is made again" in caplog.text
        assert path.read_bytes() == data
    assert held.arrays["numbers"].tolist() == [7] * 1000


def test_what_a_build_raises_is_raised_and_leaves_nothing(node):
    def fail(add):
        add("numbers", np.zeros(5))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        shared_arrays(node, KEY, fail)
    assert [path.suffix for path in node.path.iterdir()] == [".lock"]
    assert made(node, []).note == {"value": 7}


def test_several_processes_build_once(tmp_path):
    log = tmp_path / "log"
    processes = [start(tmp_path / "node", log, 0.3) for _ in range(2)]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert outputs == ["[0, 1, 4, 9, 16] made\n"] * 2
    assert len(log.read_text().splitlines()) == 1


def test_a_builder_that_is_killed_holds_nobody_and_leaves_nothing(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "node"
    first = start(folder, log, 600)
    second = None
    try:
        wait_for(log.exists)
        second = start(folder, log, 0)
        wait_for(lambda: list(folder.glob("*/*.tmp")))
        time.sleep(0.5)
        assert second.poll() is None  # it waits
        first.send_signal(signal.SIGKILL)
        assert second.communicate(timeout=20)[0] == "[0, 1, 4, 9, 16] made\n"
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()
    assert log.read_text().split() == [str(first.pid), str(second.pid)]
    assert sorted(path.suffix for path in folder.glob("*/*")) == [".arrays", ".lock"]


def test_a_wait_for_a_builder_that_hangs_is_bounded_and_names_it(tmp_path, monkeypatch):
    log, folder = tmp_path / "log", tmp_path / "node"
    hung = start(folder, log, 600)
    try:
        wait_for(lambda: list(folder.glob("*/*.tmp")))
        monkeypatch.setenv(LIMIT_VARIABLE, "0.3")
        node = NodeFolder(folder, max_bytes=1 << 30)
        with pytest.raises(HungReadError, match=rf"process {hung.pid} of this node makes it and has written nothing"):
            made(node, [])
        monkeypatch.setenv(LIMIT_VARIABLE, "60")
        give_up_reads("SIGTERM")
        with pytest.raises(StoppedReadError, match=f"stopped by SIGTERM while waiting: .*process {hung.pid}"):
            made(node, [])
    finally:
        give_up_reads(None)
        hung.kill()
        hung.wait()


def test_a_disk_that_takes_nothing_is_told_and_the_arrays_are_there(node, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("potstill.storage.files.node_folder.os.rename", full)
    assert made(node, []).arrays["numbers"][0] == 7
    assert "No space left on device" in caplog.text and "works it out for itself" in caplog.text
    assert not list(node.path.glob("*.tmp"))


def test_the_folder_is_held_to_its_size_and_the_least_used_goes_first(tmp_path):
    node = NodeFolder(tmp_path, max_bytes=10_000)
    for number in range(6):
        shared_arrays(node, {"number": number}, lambda add: add("a", np.zeros(500)) or {})
        for place, path in enumerate(sorted(node.path.glob("*.arrays"), key=os.path.getmtime)):
            os.utime(path, (place, place))
        assert sum(path.stat().st_size for path in node.path.glob("*.arrays")) <= 10_000
    builds = []
    for number in (5, 4, 0):
        shared_arrays(node, {"number": number}, lambda add, n=number: builds.append(n) or {})
    assert builds == [0]


def test_a_folder_of_others_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = default_node_root()
    assert root == tmp_path / f"potstill-{os.geteuid()}" and not root.exists()
    node = NodeFolder(root, max_bytes=1000)
    assert not root.exists()  # made when something goes into it
    shared_arrays(node, {"number": 0}, lambda add: add("a", np.zeros(5)) or {})
    assert {path.stat().st_mode & 0o777 for path in (root, node.path)} == {0o700}
    shutil.rmtree(node.path)
    root.chmod(0o777)
    with pytest.raises(WriteFailedError, match=r"with the permissions 777, expected user \d+ and 700"):
        default_node_root()
    root.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteFailedError, match="is no folder; remove it"):
        default_node_root()
    assert json.dumps(sorted(os.listdir(tmp_path / "elsewhere"))) == "[]"
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteFailedError, match="file is no folder"):
        NodeFolder(tmp_path / "file", max_bytes=1)
