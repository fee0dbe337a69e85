"""The way out of a command that a signal has ended where it could not go on."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import atexit, sys, time
from potstill.common.entry_point import run_command
from potstill.common.errors import PreemptedError
atexit.register(time.sleep, 60)
def work():
    print("so far")
    raise PreemptedError("stopped by SIGTERM while a read of a file had not come back")
sys.exit(run_command(work, program="potstill try", show_traceback=True))
"""


def test_a_preempted_command_says_why_and_leaves_at_once_with_75() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (75, "so far\n")
    assert done.stderr == "potstill try: stopped by SIGTERM while a read of a file had not come back\n"
